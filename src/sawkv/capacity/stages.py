"""How vLLM deals out a model's layers and weights to the stages of a pipeline."""

from __future__ import annotations

from itertools import accumulate

from sawkv.capacity.model import ModelShape


def pipeline_stages(num_layers: int, count: int) -> list[range]:
    """Layers of each stage (vLLM's `get_pp_indices`): the last but one gets the first of those that are left over."""
    sizes = [num_layers // count] * count
    for i in range(2, num_layers % count + 2):
        sizes[-i] += 1
    ends = list(accumulate(sizes))
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def stage_weights(stage: range, shape: ModelShape, weight_bytes: int) -> int:
    """Bytes of a stage's weights. The first has the embedding, and the last a draft and the output layer, which takes
    as much as the embedding. A tied one is on both.
    """
    if len(stage) == shape.num_layers:
        return weight_bytes
    layers = weight_bytes - shape.draft_bytes - shape.table_bytes * (1 if shape.ties else 2)
    is_last = stage.stop == shape.num_layers
    ends = shape.table_bytes * ((stage.start == 0) + is_last) + shape.draft_bytes * is_last
    return layers * len(stage) // shape.num_layers + ends
