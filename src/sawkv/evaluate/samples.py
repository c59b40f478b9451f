"""From what a model's attention got on calibration text to the samples that methods are fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sawkv.evaluate.methods import LayerSample, Method, Reader, Sample
from sawkv.integrations.transformers_eval import EvalModel, LayerStates


def layer_sample(states: LayerStates) -> LayerSample:
    """K and V of one layer, with what their errors cost."""
    num_tokens, num_kv_heads, head_dim = states.k.shape
    queries = states.q.view(num_tokens, num_kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
    of_k = queries.mT @ queries / queries.shape[1]
    if states.output_weight is None:
        of_v = torch.eye(head_dim, device=states.v.device).expand(num_kv_heads, -1, -1)
    else:
        columns = states.output_weight.view(-1, num_kv_heads, states.q.shape[1] // num_kv_heads, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
        of_v = columns.mT @ columns
    return LayerSample(Sample(states.k, of_k), Sample(states.v, of_v))


def collect_samples(model: EvalModel, ids: torch.Tensor) -> list[LayerSample]:
    """Samples of all layers on token ids [num_rows, length]."""
    return [layer_sample(states) for states in model.states(ids)]


def fit(method: Method, samples: Sequence[LayerSample]) -> list[tuple[Reader, Reader]]:
    """Readers of K and V for each layer."""
    return [method.fit(sample) for sample in samples]
