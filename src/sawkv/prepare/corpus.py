"""The text that models are prepared on: prose, dialogue, code, tables and many scripts. It ships with sawkv;
corpus/SOURCES.md names the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import torch

from sawkv.prepare.turning import PROBE_TOKENS, SHIFTS, buckets_in

SEPARATOR: Final = "\n\n"
WINDOW: Final = 512
"""Tokens per window."""
NUM_WINDOWS: Final = 8
LONGEST_CONTEXT: Final = 32768
"""Largest context over which windows are spread. In longer contexts they would lie too far apart."""
FIRST_TOKENS: Final = 4
"""Tokens of every window that keep the first positions of the context, which models attend to from everywhere."""


def context_of(config: Any) -> int:
    """Tokens of context that a language model's config of Transformers names; `LONGEST_CONTEXT` if it names none."""
    return getattr(config, "max_position_embeddings", None) or LONGEST_CONTEXT


def preparation_text() -> str:
    """The whole text, with documents of different kinds alternating."""
    folder = files("sawkv.prepare") / "corpus"
    kinds = [
        file.read_text(encoding="utf-8").split("\n====\n")
        for file in sorted(folder.iterdir(), key=lambda f: f.name)
        if file.name.endswith(".txt")
    ]
    documents = [
        (place / len(kind), number, text.strip("\n"))
        for number, kind in enumerate(kinds)
        for place, text in enumerate(kind)
    ]
    return SEPARATOR.join(text for *_, text in sorted(documents))


def preparation_windows(
    encode: Callable[[str], Sequence[int]], window: int, num_windows: int, prefix: Sequence[int] = ()
) -> torch.Tensor:
    """Cut windows evenly over the text. A text that is too short is repeated.

    Args:
        encode: text to token ids, without special tokens.
        window: tokens per window.
        num_windows: number of windows.
        prefix: special tokens that the model expects first, such as BOS; each window starts with them.

    Returns:
        [num_windows, window] int64 on the CPU.
    """
    ids = torch.tensor(list(encode(preparation_text())), dtype=torch.int64)
    size = window - len(prefix)
    spare = len(ids) - num_windows * size
    starts = (
        torch.linspace(0, spare, num_windows).long() + torch.arange(num_windows) * size
        if spare > 0
        else torch.arange(num_windows) * size
    )
    taken = ids[(starts[:, None] + torch.arange(size)) % len(ids)]
    return torch.cat([torch.tensor(list(prefix), dtype=torch.int64).expand(num_windows, -1), taken], 1)


def tokens_before(encode: Callable[[str], list[int]], encode_whole: Callable[[str], list[int]]) -> list[int]:
    """The special tokens that a tokenizer puts before a text, such as BOS. `encode` leaves them out."""
    text, whole = encode("a"), encode_whole("a")
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
    return whole[:start]


def random_windows(vocab_size: int, window: int, num_windows: int) -> torch.Tensor:
    """Windows of random ids with a fixed seed, for a model without a tokenizer: [num_windows, window] int64."""
    return torch.randint(0, vocab_size, (num_windows, window), generator=torch.Generator().manual_seed(0))


def preparation_positions(num_windows: int, window: int, context: int) -> torch.Tensor:
    """Positions of the windows' tokens: [num_windows, window] int64 on the CPU.

    RoPE turns keys with their position. What is measured at the first positions does not hold at later ones, and what
    is measured over a long context is worse for short ones. So windows are spread over the octaves of the context: as
    many end between 1,024 and 2,048 as between 16,384 and 32,768. The first tokens of each window stay at the start of
    the context, because models attend to the first tokens from everywhere (StreamingLLM, arXiv 2309.17453). To the
    model, the text in between looks evicted.
    """
    growth = max(1.0, min(context, LONGEST_CONTEXT) / window)
    ends = [window * growth ** (number / max(1, num_windows - 1)) for number in range(num_windows)]
    shifts = torch.tensor([round(end) - window for end in ends])
    places = torch.arange(window)
    return places + shifts[:, None] * (places >= FIRST_TOKENS)


@dataclass(frozen=True)
class Pass:
    """One pass of the model over text, from an empty cache.

    Attributes:
        ids, positions: [num_tokens] int64 on the CPU.
        is_probe: whether the pass only shows how keys turn (`turning`).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    is_probe: bool = False


def passes(windows: torch.Tensor, positions: torch.Tensor, context: int) -> list[Pass]:
    """What a model reads to be prepared: probes, if the context has several buckets of positions, then windows.

    Args:
        windows, positions: [num_windows, window] int64, token ids and their positions.
        context: positions that get buckets. Probes lie within.
    """
    start = windows[0, :PROBE_TOKENS]
    places = torch.arange(len(start), device="cpu")
    shifts = [shift for shift in (0, *SHIFTS) if shift + len(start) <= context] if buckets_in(context) > 1 else []
    probes = [Pass(start, places + shift, True) for shift in shifts]
    return probes + [Pass(*each) for each in zip(windows, positions, strict=True)]
