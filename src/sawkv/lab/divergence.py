"""Next-token distributions of one model under many caches, against the same model unquantized, token by token on the same text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sawkv.lab.records import Divergence, PositionKL
from sawkv.prepare.model import EvalModel
from sawkv.prepare.samples import Reader

LOGITS_AT_ONCE = 1 << 24
"""Elements of one piece of logits, so that a large vocabulary fits memory."""

Readers = Sequence[tuple[Reader, Reader] | None]


@dataclass(frozen=True)
class TokenScores:
    """One cache's predictions on windows of text.

    Attributes:
        kl: [num_windows, window - 1] fp32, KL(p || q) in nats, p of the reference.
        loss: the same shape, -log q of the token that follows.
        same_top1: the same shape, bool.
    """

    kl: torch.Tensor
    loss: torch.Tensor
    same_top1: torch.Tensor

    def divergence(self) -> Divergence:
        kl = self.kl.double()
        mean, error = mean_and_error(kl.mean(1))
        return Divergence(
            tokens=kl.numel(),
            mean_kl=mean,
            kl_se=error,
            kl_p999=float(torch.quantile(kl.flatten()[: 1 << 24], 0.999)),
            kl_max=float(kl.max()),
            same_top1=float(self.same_top1.double().mean()),
            ppl=float(self.loss.double().mean().exp()),
        )

    def by_position(self) -> tuple[PositionKL, ...]:
        """Split at 16, 64, 256, 512, 1024, 2048, ... tokens from the start of the window."""
        length = self.kl.shape[1]
        borders = [0, *(border for border in (16, 64, 256, *(512 << i for i in range(20))) if border < length), length]
        parts = []
        for start, end in itertools.pairwise(borders):
            mean, error = mean_and_error(self.kl[:, start:end].double().mean(1))
            parts.append(PositionKL(start, end, mean, error))
        return tuple(parts)


def mean_and_error(window_means: torch.Tensor) -> tuple[float, float]:
    """Mean over windows and its standard error; 0 for the error of a single window, which has none."""
    count = window_means.numel()
    return float(window_means.mean()), float(window_means.std() / count**0.5) if count > 1 else 0.0


def compare(
    model: EvalModel,
    windows: torch.Tensor,
    caches: Mapping[str, Readers],
    *,
    batch: int,
    step: Callable[[int], object] = lambda tokens: None,
) -> tuple[TokenScores, dict[str, TokenScores]]:
    """The reference's scores, and those of each cache.

    Args:
        model: its unquantized cache is the reference.
        windows: [num_windows, window] token ids; each is read from an empty cache.
        caches: readers of every layer, by name.
        batch: windows in a pass.
        step: called with the tokens of each pass.
    """
    parts: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in ("", *caches)}
    for ids in torch.split(windows, batch):
        hidden = {"": model.hidden(ids)[:, :-1]}
        step(ids.numel())
        for name, readers in caches.items():
            with model.reading(readers):
                hidden[name] = model.hidden(ids)[:, :-1]
            step(ids.numel())
        for name, scores in score(hidden, ids, model.logits).items():
            parts[name].append(scores)
    joined = {name: TokenScores(*(torch.cat(column) for column in zip(*rows, strict=True))) for name, rows in parts.items()}
    return joined.pop(""), joined


def compare_floor(reference: EvalModel, floor: EvalModel, windows: torch.Tensor, *, step: Callable[[int], object]) -> TokenScores:
    """The noise of 16-bit arithmetic: `floor` is the model in bf16, and attends by another backend, one window at a time."""
    rows = []
    for ids in torch.split(windows, 1):
        hidden = {"": reference.hidden(ids)[:, :-1]}
        with floor.eager():
            hidden["floor"] = floor.hidden(ids)[:, :-1]
        step(2 * ids.numel())
        rows.append(score(hidden, ids, reference.logits, {"floor": floor.logits})["floor"])
    return TokenScores(*(torch.cat(column) for column in zip(*rows, strict=True)))


@torch.inference_mode()
def score(
    hidden: Mapping[str, torch.Tensor],
    ids: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    other_logits: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """KL, loss and same-top-1 of each entry against entry "", each [num_rows, length - 1] on the CPU.

    Args:
        hidden: states [num_rows, length - 1, size] that `logits` takes, by name.
        ids: [num_rows, length].
        logits: states to logits.
        other_logits: for entries that need another.
    """
    rows, length = hidden[""].shape[:2]
    following = ids[:, 1:].to(hidden[""].device).flatten()
    flat = {name: states.flatten(0, 1) for name, states in hidden.items()}
    found: dict[str, list[list[torch.Tensor]]] = {name: [[], [], []] for name in hidden}
    piece = max(1, LOGITS_AT_ONCE // max(1, logits(flat[""][:1]).shape[-1]))
    for start in range(0, rows * length, piece):
        part = slice(start, start + piece)
        reference = F.log_softmax(logits(flat[""][part]), -1)
        weights, top = reference.exp(), reference.argmax(-1)
        for name, states in flat.items():
            other = reference if name == "" else F.log_softmax((other_logits or {}).get(name, logits)(states[part]), -1)
            kl = (weights * (reference - other)).sum(-1).clamp_min(0)  # rounding alone can make it negative
            loss = -other.gather(-1, following[part, None])[:, 0]
            for column, value in zip(found[name], (kl, loss, other.argmax(-1) == top), strict=True):
                column.append(value.cpu())
    return {name: tuple(torch.cat(column).view(rows, length) for column in columns) for name, columns in found.items()}  # type: ignore[misc]


def reading_only(readers: Readers, layer: int) -> Readers:
    """Only this layer's cache under test, all others unquantized."""
    return [pair if i == layer else None for i, pair in enumerate(readers)]
