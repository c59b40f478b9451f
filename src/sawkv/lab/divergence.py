"""Compares next-token distributions of one model under many caches with those of the unquantized model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sawkv.lab.records import Divergence, PositionKL
from sawkv.prepare.model import EvalModel
from sawkv.prepare.states import LayerReaders

LOGITS_AT_ONCE = 1 << 24
"""Elements of one piece of logits, so that those of a large vocabulary fit in memory."""

Readers = Sequence[LayerReaders | None]


@dataclass(frozen=True)
class TokenScores:
    """Predictions through one cache on windows of text.

    Attributes:
        kl: [num_windows, window - 1] fp32, KL(p || q) in nats, p being the reference's distribution.
        loss: same shape, -log q of the next token.
        same_top1: same shape, bool, whether p and q have the same most likely token.
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
        """KL by position in the window, split at 16, 64, 256, 512, 1024, 2048, ... tokens."""
        length = self.kl.shape[1]
        borders = [0, *(border for border in (16, 64, 256, *(512 << i for i in range(20))) if border < length), length]
        parts = []
        for start, end in itertools.pairwise(borders):
            mean, error = mean_and_error(self.kl[:, start:end].double().mean(1))
            parts.append(PositionKL(start, end, mean, error))
        return tuple(parts)


def mean_and_error(window_means: torch.Tensor) -> tuple[float, float]:
    """Mean over windows, and its standard error. The error of a single window is given as 0."""
    count = window_means.numel()
    return float(window_means.mean()), float(window_means.std() / count**0.5) if count > 1 else 0.0


def _ignore(tokens: int) -> None:
    """No progress is shown."""


class Reference:
    """The unquantized model on windows of text, with which caches are compared.

    Args:
        model: its unquantized cache is the reference.
        windows: [num_windows, window] token ids. Each is read from an empty cache.
        batch: windows per pass.
        room: bytes of the reference's states to keep on the CPU. Other states are computed again for each cache.
        step: called with the number of tokens of each pass.
    """

    def __init__(
        self,
        model: EvalModel,
        windows: torch.Tensor,
        batch: int,
        room: int,
        step: Callable[[int], object] = _ignore,
    ) -> None:
        self._model, self._batches = model, torch.split(windows, batch)
        self._states: list[torch.Tensor | None] = []
        self._scores: list[tuple[torch.Tensor, ...]] = []
        for ids in self._batches:
            states = model.hidden(ids)[:, :-1]
            self._scores.append(score({"": states}, ids, model.logits)[""])
            room -= states.numel() * states.element_size()
            self._states.append(states.cpu() if room >= 0 else None)
            step(ids.numel())

    def scores(self) -> TokenScores:
        """The reference's own scores: losses, with KL 0."""
        return _joined(self._scores)

    def compare(self, readers: Readers, step: Callable[[int], object] = _ignore) -> TokenScores:
        """The scores of one cache, given the readers of every layer."""
        rows = []
        for ids, states in zip(self._batches, self._states, strict=True):
            pair = {"": self._model.hidden(ids)[:, :-1] if states is None else states.to(self._model.device)}
            with self._model.reading(readers):
                pair["other"] = self._model.hidden(ids)[:, :-1]
            rows.append(score(pair, ids, self._model.logits)["other"])
            step(ids.numel())
        return _joined(rows)


def _joined(rows: Sequence[tuple[torch.Tensor, ...]]) -> TokenScores:
    return TokenScores(*(torch.cat(column) for column in zip(*rows, strict=True)))


def compare_floor(
    reference: EvalModel, floor: EvalModel, windows: torch.Tensor, *, step: Callable[[int], object]
) -> TokenScores:
    """Measure the noise of 16-bit arithmetic: `floor` is the model in bf16 with another attention backend, one window
    per pass.
    """
    rows = []
    for ids in torch.split(windows, 1):
        hidden = {"": reference.hidden(ids)[:, :-1]}
        with floor.eager():
            hidden["floor"] = floor.hidden(ids)[:, :-1]
        step(2 * ids.numel())
        rows.append(score(hidden, ids, reference.logits, {"floor": floor.logits})["floor"])
    return _joined(rows)


@torch.inference_mode()
def score(
    hidden: Mapping[str, torch.Tensor],
    ids: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    other_logits: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """KL, loss and top-1 agreement of each entry against entry "".

    Args:
        hidden: states [num_rows, length - 1, size], by name.
        ids: [num_rows, length].
        logits: maps states to logits.
        other_logits: maps for entries that need another.

    Returns:
        By name, three tensors [num_rows, length - 1] on the CPU.
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
            kl = (weights * (reference - other)).sum(-1).clamp_min(0)  # rounding can make it slightly negative
            loss = -other.gather(-1, following[part, None])[:, 0]
            for column, value in zip(found[name], (kl, loss, other.argmax(-1) == top), strict=True):
                column.append(value.cpu())
    joined: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    for name, (kls, losses, tops) in found.items():
        shaped = [torch.cat(column).view(rows, length) for column in (kls, losses, tops)]
        joined[name] = (shaped[0], shaped[1], shaped[2])
    return joined


def reading_only(readers: Readers, layer: int) -> Readers:
    """Readers that quantize one layer and leave all others unquantized."""
    return [pair if i == layer else None for i, pair in enumerate(readers)]
