"""Samples of K and V, made from a model's attention states on calibration text, for the lab's methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sawkv.prepare.statistics import LayerStatistics

Reader = Callable[[torch.Tensor], torch.Tensor]
"""Maps rows [num_tokens, num_kv_heads, head_dim] fp32 of one sequence, from its first token on, to what attention would
read after they were stored, same shape and dtype. Does not change its input.
"""


@dataclass(frozen=True)
class Kept:
    """Tokens that a query reads as they are, without quantization.

    Attributes:
        first: tokens at the start of the sequence.
        last: tokens up to the query, itself included.
        tile: those of the query's own tile of so many tokens, which may not be complete yet.
    """

    first: int = 0
    last: int = 0
    tile: int = 1

    def mask(self, length: int) -> torch.Tensor:
        """[length, length] bool, true where the query of the row reads the key of the column as it is."""
        key = torch.arange(length)
        query = key[:, None]
        kept = (key < self.first) | (key > query - self.last) | (key // self.tile == query // self.tile)
        return kept & (key <= query)

    def share(self, length: int) -> float:
        """The share of a sequence's tokens that is kept, at `length` tokens; a mean over its last tile."""
        return float(self.mask(length)[-self.tile :].sum(-1).double().mean()) / length


LayerReaders = tuple[Reader, Reader] | tuple[Reader, Reader, Kept]
"""How attention reads K, how it reads V, and what it reads unquantized."""


@dataclass(frozen=True)
class LayerStates:
    """Q, K and V of one attention layer on some text.

    Attributes:
        q: [num_tokens, num_q_heads, head_dim] fp32, after RoPE.
        k, v: [num_tokens, num_kv_heads, head_dim] fp32, K after RoPE. Windows follow each other.
        output_weight: [hidden_size, num_q_heads * head_dim], the output projection in the model's dtype; None if it is
            not found.
        softmax_scale: factor of q.k.
        sliding_window: tokens that a query sees, itself included; 0 is no limit.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    output_weight: torch.Tensor | None
    softmax_scale: float
    sliding_window: int = 0

    def empty_statistics(self, context: int = 0) -> LayerStatistics:
        """Statistics without rows, for a layer of this shape. `context`: positions that get buckets."""
        statistics = LayerStatistics(
            self.k.shape[1], self.k.shape[2], self.k.device, self.softmax_scale, self.sliding_window, context
        )
        if self.output_weight is not None:
            statistics.set_output_weight(self.output_weight)
        return statistics


@dataclass(frozen=True)
class Sample:
    """Rows of K or V of one layer on calibration text, and the cost of their errors.

    Attributes:
        rows: [num_tokens, num_kv_heads, head_dim] fp32, K after RoPE.
        hessian: [num_kv_heads, head_dim, head_dim] fp32, symmetric, positive semi-definite. An error e of a row costs
            e^T hessian e. For K the hessian is the mean of q q^T over the queries that read the head, so the cost is
            the squared error of scores before softmax_scale. For V it is the Gram matrix of the output projection's
            columns that read the head.
    """

    rows: torch.Tensor
    hessian: torch.Tensor

    @property
    def head_dim(self) -> int:
        return self.rows.shape[-1]


@dataclass(frozen=True)
class LayerSample:
    """K and V of one layer on calibration text, and the statistics that engines gather when they prepare a model."""

    k: Sample
    v: Sample
    statistics: LayerStatistics


def key_hessian(states: LayerStates) -> torch.Tensor:
    """The mean of q q^T over the queries that read each KV head: [num_kv_heads, head_dim, head_dim] fp32.

    e^T hessian e is the mean squared error of scores, before softmax_scale, for an error e of a key.
    """
    num_tokens, num_kv_heads, head_dim = states.k.shape
    queries = states.q.view(num_tokens, num_kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
    return queries.mT @ queries / queries.shape[1]


def value_hessian(states: LayerStates) -> torch.Tensor:
    """The Gram matrix of the output projection's columns that read each KV head: [num_kv_heads, head_dim, head_dim]
    fp32.

    e^T hessian e is the squared error of the layer's output for an error e of the head's output. Without a known
    projection it is the identity.
    """
    _, num_kv_heads, head_dim = states.v.shape
    if states.output_weight is None:
        return torch.eye(head_dim, device=states.v.device).expand(num_kv_heads, -1, -1)
    weight = states.output_weight.float().view(-1, num_kv_heads, states.q.shape[1] // num_kv_heads, head_dim)
    columns = weight.permute(1, 2, 0, 3).flatten(1, 2)
    return columns.mT @ columns


def layer_sample(states: LayerStates) -> LayerSample:
    """Sample and statistics of K and V of one layer on one window."""
    statistics = states.empty_statistics()
    statistics.add(states.q, states.k, states.v)
    return LayerSample(*samples(states), statistics)


def samples(states: LayerStates) -> tuple[Sample, Sample]:
    """Samples of K and of V."""
    return Sample(states.k, key_hessian(states)), Sample(states.v, value_hessian(states))


def joined(samples: Sequence[Sample]) -> Sample:
    """Join samples of equal length."""
    return Sample(
        torch.cat([sample.rows for sample in samples]), torch.stack([sample.hessian for sample in samples]).mean(0)
    )
