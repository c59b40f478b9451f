"""Recall: prompts that hide a fact in real text and ask for it at the end.

An answer counts if every token of it is the model's first choice, as greedy decoding would need. One teacher-forced
pass decides this, because token-wise methods read the same in one pass and token by token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sawkv.errors import SawkvError
from sawkv.lab.divergence import Readers
from sawkv.lab.records import FreeRun, Recall
from sawkv.prepare.model import EvalModel
from sawkv.prepare.text import Encode

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Prompt:
    """Token ids. The last `answer_length` of them are the answer."""

    task: str
    length: int
    depth: float
    ids: tuple[int, ...]
    answer_length: int


def make_prompts(
    encode: Encode, filler: torch.Tensor, prefix: Sequence[int], *, lengths: Sequence[int], count: int, seed: int = 0
) -> list[Prompt]:
    """Make `count` pass-key prompts and `count` needle prompts for each length and depth.

    Args:
        encode: the model's tokenizer.
        filler: [num_tokens] ids of real text to hide facts in.
        prefix: ids at the start of every prompt.
        lengths: approximate tokens per prompt.
        count: prompts per task, length and depth.
        seed: of the random choices.

    Raises:
        SawkvError: a length is more than the filler has.
    """
    if max(lengths, default=0) > len(filler):
        raise SawkvError(f"recall: expected at most {len(filler)} tokens, those of the text, got {max(lengths)}")
    rng = random.Random(seed)
    prompts = []
    for length in lengths:
        for depth in DEPTHS:
            for _ in range(count):
                for task, make in (("passkey", _pass_key), ("needle", _needle)):
                    fact, question, answer = make(rng, encode)
                    room = max(0, length - len(prefix) - len(fact) - len(question) - len(answer))
                    head = int(room * depth)
                    passages = [_passage(rng, filler, size) for size in (head, room - head)]
                    ids = (*prefix, *passages[0], *fact, *passages[1], *question, *answer)
                    prompts.append(Prompt(task, length, depth, ids, len(answer)))
    return prompts


def _pass_key(rng: random.Random, encode: Encode) -> tuple[list[int], list[int], list[int]]:
    key = encode(f" {rng.randrange(10**5):05d}")
    fact = [*encode("\nThe pass key is"), *key, *encode(".\n")]
    return fact, encode("\nWhat is the pass key? The pass key is"), key


def _needle(rng: random.Random, encode: Encode) -> tuple[list[int], list[int], list[int]]:
    """A table of four entries, and a question for one of them."""
    names = [_word(rng) for _ in range(4)]
    values = [encode(_word(rng)) for _ in names]
    fact = encode("\ntable = {\n")
    for name, value in zip(names, values, strict=True):
        fact += [*encode(f'    "{name}": "'), *value, *encode('",\n')]
    fact += encode("}\n")
    asked = rng.randrange(len(names))
    return fact, encode(f'\nassert table["{names[asked]}"] == "'), values[asked]


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(4))


def _passage(rng: random.Random, filler: torch.Tensor, size: int) -> list[int]:
    start = rng.randrange(max(1, len(filler) - size))
    passage: list[int] = filler[start : start + size].tolist()
    return passage


def recall(
    model: EvalModel,
    prompts: Sequence[Prompt],
    readers: Readers | None,
    *,
    tokens_at_once: int,
    step: Callable[[int], object],
) -> tuple[Recall, ...]:
    """Count the prompts that are answered correctly, by task, length and depth."""
    cells: dict[tuple[str, int, float], list[bool]] = {}
    for batch in _batches(prompts, tokens_at_once):
        size = max(len(prompt.ids) for prompt in batch)
        # Padding comes last, where a causal model cannot see it.
        ids = torch.tensor([[*prompt.ids, *[prompt.ids[-1]] * (size - len(prompt.ids))] for prompt in batch])
        with model.reading(readers if readers is not None else [None] * len(model.layers)):
            hidden = model.hidden(ids)
        for row, prompt in zip(hidden, batch, strict=True):
            end = len(prompt.ids)
            choice = model.logits(row[end - prompt.answer_length - 1 : end - 1]).argmax(-1).tolist()
            right = choice == list(prompt.ids[end - prompt.answer_length :])
            cells.setdefault((prompt.task, prompt.length, prompt.depth), []).append(right)
        step(ids.numel())
    return tuple(Recall(*cell, correct=sum(answers), asked=len(answers)) for cell, answers in sorted(cells.items()))


def _batches(prompts: Sequence[Prompt], tokens_at_once: int) -> list[list[Prompt]]:
    batches: list[list[Prompt]] = []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids)):
        if not batches or (len(batches[-1]) + 1) * len(prompt.ids) > tokens_at_once:
            batches.append([])
        batches[-1].append(prompt)
    return batches


def free_run(model: EvalModel, prompts: torch.Tensor, continuation: torch.Tensor, readers: Readers) -> FreeRun:
    """How many tokens of the reference's `continuation`, [num_rows, limit], greedy decoding through the cache follows,
    after prompts [num_rows, length].

    One pass over both decides it: up to the first different choice, decoding sees the same tokens.
    """
    limit = continuation.shape[1]
    tokens = []
    for prompt, following in zip(prompts, continuation.cpu(), strict=True):
        ids = torch.cat([prompt, following])[None]
        with model.reading(readers):
            choice = model.logits(model.hidden(ids)[0, len(prompt) - 1 : -1]).argmax(-1).cpu()
        agreed = (choice == following).long().cumprod(0)
        tokens.append(int(agreed.sum()))
    return FreeRun(limit, tuple(tokens))
