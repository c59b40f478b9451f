"""From what a model's attention got on calibration text to the samples that methods are fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sawkv.prepare.statistics import LayerStatistics

Reader = Callable[[torch.Tensor], torch.Tensor]
"""Rows [num_tokens, num_kv_heads, head_dim] fp32 to the same shape and dtype, as attention reads them. Does not mutate
its input.
"""


@dataclass(frozen=True)
class LayerStates:
    """What one layer's attention got on some text.

    Attributes:
        q: [num_tokens, num_q_heads, head_dim] fp32, after RoPE.
        k, v: [num_tokens, num_kv_heads, head_dim] fp32, K after RoPE. Windows follow each other.
        output_weight: [hidden_size, num_q_heads * head_dim], the projection that follows, as the model holds it; None
            if it is not found.
        softmax_scale: factor of q.k.
        sliding_window: tokens that a query sees, its own included; 0 is all before it.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    output_weight: torch.Tensor | None
    softmax_scale: float
    sliding_window: int = 0

    def empty_statistics(self) -> LayerStatistics:
        """What rows of such a layer can be added to."""
        statistics = LayerStatistics(
            self.k.shape[1], self.k.shape[2], self.k.device, self.softmax_scale, self.sliding_window
        )
        if self.output_weight is not None:
            statistics.set_output_weight(self.output_weight)
        return statistics


@dataclass(frozen=True)
class Sample:
    """K or V of one layer on calibration text.

    Attributes:
        rows: [num_tokens, num_kv_heads, head_dim] fp32, K after RoPE.
        hessian: [num_kv_heads, head_dim, head_dim] fp32, symmetric, positive semi-definite: storing a row with error e
            costs e^T hessian e. For K it is the mean of q q^T over the queries that read the head, so the cost is the
            squared error of scores before softmax_scale; for V the Gram matrix of the columns of the output projection
            that read the head.
    """

    rows: torch.Tensor
    hessian: torch.Tensor

    @property
    def head_dim(self) -> int:
        return self.rows.shape[-1]


@dataclass(frozen=True)
class LayerSample:
    """K and V of one layer on calibration text, and their statistics, as engines gather them when they
    prepare a model.
    """

    k: Sample
    v: Sample
    statistics: LayerStatistics


def key_hessian(states: LayerStates) -> torch.Tensor:
    """[num_kv_heads, head_dim, head_dim] fp32: the mean of q q^T over the queries that read the head, so that e^T
    hessian e is the mean squared error of scores, before softmax_scale, that an error e of a key makes.
    """
    num_tokens, num_kv_heads, head_dim = states.k.shape
    queries = states.q.view(num_tokens, num_kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
    return queries.mT @ queries / queries.shape[1]


def value_hessian(states: LayerStates) -> torch.Tensor:
    """[num_kv_heads, head_dim, head_dim] fp32: the Gram matrix of the output projection's columns that read the head,
    so that e^T hessian e is the squared error that an error e of the head's output makes in the layer's. The identity
    for an unknown projection.
    """
    _, num_kv_heads, head_dim = states.v.shape
    if states.output_weight is None:
        return torch.eye(head_dim, device=states.v.device).expand(num_kv_heads, -1, -1)
    weight = states.output_weight.float().view(-1, num_kv_heads, states.q.shape[1] // num_kv_heads, head_dim)
    columns = weight.permute(1, 2, 0, 3).flatten(1, 2)
    return columns.mT @ columns


def layer_sample(states: LayerStates) -> LayerSample:
    """K and V of one layer on one window."""
    statistics = states.empty_statistics()
    statistics.add(states.q, states.k, states.v)
    return LayerSample(*samples(states), statistics)


def samples(states: LayerStates) -> tuple[Sample, Sample]:
    """Rows of K and of V, with what their errors cost."""
    return Sample(states.k, key_hessian(states)), Sample(states.v, value_hessian(states))


def joined(samples: Sequence[Sample]) -> Sample:
    """One sample of equally long ones."""
    return Sample(
        torch.cat([sample.rows for sample in samples]), torch.stack([sample.hessian for sample in samples]).mean(0)
    )
