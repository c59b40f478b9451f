"""From what a model's attention got on calibration text to the samples that methods are fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sawkv.evaluate.methods import LayerSample, Method, Reader, Sample
from sawkv.integrations.transformers_eval import EvalModel, LayerStates


def key_hessian(states: LayerStates) -> torch.Tensor:
    """[num_kv_heads, head_dim, head_dim] fp32: the mean of q q^T over the queries that read the head, so that e^T hessian e is the mean
    squared error of scores, before softmax_scale, that an error e of a key makes."""
    num_tokens, num_kv_heads, head_dim = states.k.shape
    queries = states.q.view(num_tokens, num_kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
    return queries.mT @ queries / queries.shape[1]


def value_hessian(states: LayerStates) -> torch.Tensor:
    """[num_kv_heads, head_dim, head_dim] fp32: the Gram matrix of the output projection's columns that read the head, so that
    e^T hessian e is the squared error that an error e of the head's output makes in the layer's. The identity for an unknown projection."""
    _, num_kv_heads, head_dim = states.v.shape
    if states.output_weight is None:
        return torch.eye(head_dim, device=states.v.device).expand(num_kv_heads, -1, -1)
    weight = states.output_weight.float().view(-1, num_kv_heads, states.q.shape[1] // num_kv_heads, head_dim)
    columns = weight.permute(1, 2, 0, 3).flatten(1, 2)
    return columns.mT @ columns


def spread(num_windows: int, window: int, context: int) -> list[int]:
    """Positions at which windows begin, evenly over a context. Keys turn with their position, so what is learned of them at the first
    positions does not hold for later ones."""
    return torch.linspace(0, max(0, context - window), num_windows).long().tolist()


def layer_sample(states: LayerStates) -> LayerSample:
    """K and V of one layer, with what their errors cost."""
    return LayerSample(Sample(states.k, key_hessian(states)), Sample(states.v, value_hessian(states)))


def collect_samples(model: EvalModel, ids: torch.Tensor, context: int = 0) -> list[LayerSample]:
    """Samples of all layers on token ids [num_rows, length], rows at positions spread over `context` tokens, or all at 0."""
    firsts = spread(len(ids), ids.shape[1], context)
    windows = [
        [layer_sample(states) for states in model.states(row, first)] for row, first in zip(torch.split(ids, 1), firsts, strict=True)
    ]
    return [
        LayerSample(_joined([window.k for window in layer]), _joined([window.v for window in layer]))
        for layer in zip(*windows, strict=True)
    ]


def _joined(samples: Sequence[Sample]) -> Sample:
    """One sample of equally long ones."""
    return Sample(torch.cat([sample.rows for sample in samples]), torch.stack([sample.hessian for sample in samples]).mean(0))


def fit(method: Method, samples: Sequence[LayerSample]) -> list[tuple[Reader, Reader]]:
    """Readers of K and V for each layer."""
    return [method.fit(sample) for sample in samples]
