"""Samples of K and V, made from a model's attention states on calibration text, which methods are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sawkv.prepare.states import LayerStates
from sawkv.prepare.statistics import LayerStatistics


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


def sample_pair(states: LayerStates) -> tuple[Sample, Sample]:
    """Samples of K and of V of one layer."""
    return Sample(states.k, key_hessian(states)), Sample(states.v, value_hessian(states))


def joined(samples: Sequence[Sample]) -> Sample:
    """Join samples of equal length."""
    return Sample(
        torch.cat([sample.rows for sample in samples]), torch.stack([sample.hessian for sample in samples]).mean(0)
    )
