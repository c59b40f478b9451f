"""Text and tasks that the small models learn from.

Text: the sources and documentation of the running Python installation: the standard library, and every installed
package whose metadata declares an MIT, BSD, Apache, ISC or PSF licence. Whole files are held out for evaluation, chosen
by a hash of their names.

Tasks: pass-keys and values hidden in that text, dictionaries to look up, and passages to copy. They make attention
sharp and long, and give recall that can fail, which is what a test of a KV cache needs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_ID = 0
MAX_FILE_BYTES = 200_000
HELD_OUT_SHARE = 50
"""One file of this many is held out."""

_PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation)\b", re.IGNORECASE)
_OTHER = re.compile(r"\b(GPL|LGPL|AGPL|MPL|Mozilla|Proprietary|Commercial|EULA|NVIDIA)\b|GNU", re.IGNORECASE)

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Texts by split, and the names of what they come from."""

    train: list[str]
    held_out: list[str]
    packages: list[str]


def collect(max_bytes: int, seed: int = 0) -> Corpus:
    """Read permissively licensed sources and documentation of this Python, up to about `max_bytes`, in a random order
    of files.
    """
    files = [
        (path, "Python standard library")
        for path in Path(sysconfig.get_path("stdlib")).rglob("*.py")
        if "site-packages" not in path.parts
    ]
    for distribution in importlib.metadata.distributions():
        if _permissive(distribution):
            name = f"{distribution.metadata['Name']} {distribution.version}"
            for entry in distribution.files or []:
                if entry.suffix in {".py", ".md", ".rst"}:
                    files.append((Path(str(distribution.locate_file(entry))), name))
    random.Random(seed).shuffle(files)
    splits: tuple[list[str], list[str]] = ([], [])
    packages, seen, size = set(), set(), 0
    for path, package in files:
        try:
            raw = path.read_bytes()
            text = raw.decode()
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(raw).digest()
        if not 200 < len(raw) < MAX_FILE_BYTES or digest in seen or _looks_like_data(text):
            continue
        seen.add(digest)
        held_out = int.from_bytes(digest[:4], "little") % HELD_OUT_SHARE == 0
        splits[held_out].append(text)
        packages.add(package)
        size += len(raw)
        if size > max_bytes:
            break
    return Corpus(*splits, sorted(packages, key=str.lower))


def _permissive(distribution: importlib.metadata.Distribution) -> bool:
    metadata = distribution.metadata
    declared = " ".join(
        [
            *(metadata.get_all("License-Expression") or []),
            *(text[:60] for text in metadata.get_all("License") or []),
            *(c for c in metadata.get_all("Classifier") or [] if c.startswith("License")),
        ]
    )
    return bool(_PERMISSIVE.search(declared)) and not _OTHER.search(declared)


def _looks_like_data(text: str) -> bool:
    """Tables and generated files: few letters, or very long lines."""
    letters = sum(map(str.isalpha, text[:4000])) / len(text[:4000])
    return letters < 0.35 or len(text) / (text.count("\n") + 1) > 120


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; digits stay single, so that numbers are copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z_]+| ?[^\sA-Za-z_\d]+|\n+| +"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    """All texts in one array, each followed by the end-of-text token."""
    parts = []
    for start in range(0, len(texts), 2000):
        for encoding in tokenizer.encode_batch(texts[start : start + 2000]):
            parts.append(np.array([*encoding.ids, END_ID], dtype=np.uint16))
    return np.concatenate(parts)


# ---- tasks


@dataclass(frozen=True)
class Task:
    """One document: token ids, and for each the weight of its loss (0 for what cannot be predicted)."""

    ids: list[int]
    weights: list[float]
    answers: list[tuple[int, int]]
    """Spans of `ids` that recall must reproduce."""


class _Writer:
    """Builds a task from pieces of text and of corpus tokens."""

    def __init__(self, tokenizer: Tokenizer, answer_weight: float) -> None:
        self._tokenizer, self._answer_weight = tokenizer, answer_weight
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.answers: list[tuple[int, int]] = []

    def text(self, text: str, weight: float = 0.2) -> None:
        self.tokens(self._tokenizer.encode(text).ids, weight)

    def tokens(self, ids: list[int], weight: float = 1.0) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def answer(self, text: str) -> None:
        start = len(self.ids)
        self.text(text, self._answer_weight)
        self.answers.append((start, len(self.ids)))

    def done(self) -> Task:
        return Task(self.ids, self.weights, self.answers)


class TaskMaker:
    """Draws tasks whose filler is real text.

    Args:
        tokenizer: the model's.
        filler: corpus tokens to hide things in; use the held-out split for evaluation.
        seed: of the draws.
        answer_weight: loss weight of the tokens to be recalled.
    """

    def __init__(self, tokenizer: Tokenizer, filler: Tokens, seed: int, answer_weight: float = 4.0) -> None:
        self._tokenizer, self._filler, self._answer_weight = tokenizer, filler, answer_weight
        self._random = random.Random(seed)

    def draw(self, max_length: int) -> Task:
        """A task of a random kind, of at most about `max_length` tokens; short ones are as likely as long ones."""
        low, high = np.log2(96), np.log2(max(max_length, 97))
        length = int(2 ** self._random.uniform(low, high))
        kind = self._random.choice((self.pass_key, self.pass_key, self.lookup, self.lookup, self.copy))
        return kind(length)

    def pass_key(self, length: int, depth: float | None = None) -> Task:
        """A number stated once at `depth` (0 to 1, None for random) of the text, asked for at its end."""
        rng, writer = self._random, self._writer()
        key = f"{rng.randrange(10**5):05d}"
        name = rng.choice(("pass key", "pass key", "pass key", "magic number", "secret number", "access code"))
        room = max(0, length - 48)
        before = int(room * (rng.random() if depth is None else depth))
        writer.tokens(self._passage(before))
        writer.text(f"\nThe {name} is {key}.\n")
        writer.tokens(self._passage(room - before))
        writer.text(f"\nWhat is the {name}? The {name} is")
        writer.answer(f" {key}")
        writer.text(".\n", 1.0)
        return writer.done()

    def lookup(self, length: int) -> Task:
        """A dictionary or a list of `name: value` lines, with text around it, and some of its keys asked for at the
        end.
        """
        rng, writer = self._random, self._writer()
        pairs_room = int(max(40, length - 60) * rng.uniform(0.2, 1.0))
        count = max(2, min(pairs_room // 16, 120))
        pairs = {self._word(rng.randrange(3, 6)): self._word(4, digits=rng.random() < 0.5) for _ in range(count)}
        filler_room = max(0, length - 60 - 16 * count)
        before = int(filler_room * rng.random())
        writer.tokens(self._passage(before))
        as_dict = rng.random() < 0.5
        writer.text("\ntable = {\n" if as_dict else "\nSettings:\n")
        for key, value in pairs.items():
            writer.text(f'    "{key}": "{value}",\n' if as_dict else f"{key}: {value}\n", 0.1)
        writer.text("}\n" if as_dict else "\n")
        writer.tokens(self._passage(filler_room - before))
        for key in rng.sample(list(pairs), min(3, len(pairs))):
            writer.text(f'\nassert table["{key}"] == "' if as_dict else f"\nThe value of {key} is ")
            writer.answer(pairs[key])
            writer.text('"' if as_dict else ".", 1.0)
        writer.text("\n", 1.0)
        return writer.done()

    def copy(self, length: int) -> Task:
        """A passage of text or of random words, then the same again."""
        rng, writer = self._random, self._writer()
        half = max(12, (length - 16) // 2)
        if rng.random() < 0.5:
            passage = self._tokenizer.decode(self._passage(half))
        else:
            passage = " ".join(self._word(rng.randrange(2, 6), digits=rng.random() < 0.3) for _ in range(half // 4))
        passage = passage.replace(END_OF_TEXT, "")
        writer.text("Original:\n", 1.0)
        writer.text(passage, 0.1)
        writer.text("\nCopy:\n", 1.0)
        writer.answer(passage)
        writer.text("\n", 1.0)
        return writer.done()

    def _writer(self) -> _Writer:
        return _Writer(self._tokenizer, self._answer_weight)

    def _passage(self, length: int) -> list[int]:
        start = self._random.randrange(max(1, len(self._filler) - length))
        passage = self._filler[start : start + length]
        return [int(token) for token in passage if token != END_ID]

    def _word(self, length: int, digits: bool = False) -> str:
        alphabet = "0123456789" if digits else "abcdefghijklmnopqrstuvwxyz"
        return "".join(self._random.choice(alphabet) for _ in range(length))


def rows(
    corpus: Tokens, tasks: TaskMaker, length: int, task_share: float, seed: int
) -> Iterator[tuple[Tokens, npt.NDArray[np.float32]]]:
    """Endless training rows of `length + 1` tokens with loss weights: plain text, or tasks one after the other."""
    rng = random.Random(seed)
    while True:
        if rng.random() >= task_share:
            start = rng.randrange(len(corpus) - length - 1)
            yield corpus[start : start + length + 1], np.ones(length + 1, dtype=np.float32)
            continue
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) <= length:
            task = tasks.draw(length - 64 if not ids else max(length - len(ids), 96))
            ids += [*task.ids, END_ID]
            weights += [*task.weights, 1.0]
        yield np.array(ids[: length + 1], dtype=np.uint16), np.array(weights[: length + 1], dtype=np.float32)
