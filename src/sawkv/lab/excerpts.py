"""Text samples of an evaluation: KL per token of an excerpt, tokens with the largest KL, diverging greedy texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sawkv.lab.divergence import Readers, TokenScores
from sawkv.lab.records import Fork, FreeRun, Surprise
from sawkv.prepare.model import EvalModel

Decode = Callable[[Sequence[int]], str]
"""Maps token ids to text."""

EXCERPT = 240
"""Tokens in the excerpt."""
WORST = 6
"""Number of tokens with the largest KL that are kept, with their predictions."""
FORKS = 3
"""Number of greedy texts that are kept."""
FORK_TOKENS = 24
"""Tokens shown after the place where two texts diverge."""
BEFORE = 24
"""Tokens shown before such a place."""


def pieces(decode: Decode, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token. If several tokens make up one character, the last of them has it."""
    found, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(shown) :])
        shown = text
    return tuple(found)


def excerpt_kl(scores: TokenScores) -> tuple[float, ...]:
    """KL of the last tokens of the first window."""
    return tuple(float(f"{value:.3g}") for value in scores.kl[0, -EXCERPT:].tolist())


def worst(
    model: EvalModel, windows: torch.Tensor, scores: TokenScores, readers: Readers, decode: Decode
) -> tuple[Surprise, ...]:
    """The tokens with the largest KL, at most one per window."""
    kl, positions = scores.kl.max(1)
    found = []
    for window in kl.argsort(descending=True)[:WORST].tolist():
        position = int(positions[window])
        ids = windows[window, : position + 1]
        guesses = [_guess(model, ids)]
        with model.reading(readers):
            guesses.append(_guess(model, ids))
        (expected, expected_p), (chosen, chosen_p) = ((decode([token]), round(p, 4)) for token, p in guesses)
        before, token = decode(ids[-BEFORE:].tolist()), decode([int(windows[window, position + 1])])
        found.append(
            Surprise(window, position, float(kl[window]), before, token, expected, expected_p, chosen, chosen_p)
        )
    return tuple(found)


def _guess(model: EvalModel, ids: torch.Tensor) -> tuple[int, float]:
    """The most likely next token, and its probability."""
    p, token = model.logits(model.hidden(ids[None])[0, -1]).softmax(-1).max(-1)
    return int(token), float(p)


def forks(
    model: EvalModel, prompts: torch.Tensor, continuation: torch.Tensor, run: FreeRun, readers: Readers, decode: Decode
) -> tuple[Fork, ...]:
    """Both texts of the first free runs that diverge. Arguments as in `tasks.free_run`, which made `run`."""
    found: list[Fork] = []
    for i, agreed in enumerate(run.tokens):
        if agreed >= run.limit or len(found) == FORKS:
            continue
        following = continuation[i].cpu()
        common = torch.cat([prompts[i], following[:agreed]])
        with model.reading(readers):
            other = model.continue_greedily(common[None], FORK_TOKENS)[0].tolist()
        reference = following[agreed : agreed + FORK_TOKENS].tolist()
        found.append(
            Fork(i, agreed, decode(common[-BEFORE:].tolist()), decode(reference), decode(other[: len(reference)]))
        )
    return tuple(found)
