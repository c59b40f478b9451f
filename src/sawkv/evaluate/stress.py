"""Function-preserving stress: some RoPE pairs of keys made larger, and the same of queries smaller, so that the model computes what it did.

Channels i and i + head_dim / 2 of K are scaled by s and those of Q by 1 / s, in the QK-norms' weights where the model has them, else in the
rows of k_proj and q_proj. With s a power of two every product in bf16 is exact, and the 16-bit model's logits are bit-identical. Keys then
have the outlier channels of large models. It is our stress test: no trained model was found to look like it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn

from sawkv.errors import UnsupportedError

PAIRS_STRESSED = 2


def stressed_pairs(layer: int, head_dim: int) -> list[int]:
    """The pairs of a layer that are scaled, always the same."""
    return sorted(random.Random(layer).sample(range(head_dim // 2), PAIRS_STRESSED))


@torch.no_grad()
def apply_stress(layers: Sequence[nn.Module], head_dim: int, s: int) -> None:
    """Scale the pairs of `stressed_pairs` by `s` in the weights, in place.

    Args:
        layers: attention modules with `q_proj` and `k_proj`, and `q_norm` and `k_norm` over head_dim if they normalize.
        head_dim: channels of a head; RoPE turns all of them, channel i with i + head_dim / 2.
        s: a power of two.

    Raises:
        UnsupportedError: s is not a power of two, or a module has no such parts.
    """
    if s < 1 or s & (s - 1):
        raise UnsupportedError(f"stress: expected a power of two, got {s}")
    for index, layer in enumerate(layers):
        factor = torch.ones(head_dim)
        for pair in stressed_pairs(index, head_dim):
            factor[[pair, pair + head_dim // 2]] = s
        for side, by in (("q", 1 / factor), ("k", factor)):
            norm, projection = getattr(layer, f"{side}_norm", None), getattr(layer, f"{side}_proj", None)
            if norm is not None:
                if norm.weight.shape != factor.shape:
                    raise UnsupportedError(f"stress: expected a {side}_norm over head_dim {head_dim}, got {list(norm.weight.shape)}")
                norm.weight.mul_(by.to(norm.weight))
            elif isinstance(projection, nn.Linear) and projection.out_features % head_dim == 0:
                rows = by.repeat(projection.out_features // head_dim).to(projection.weight)
                projection.weight.mul_(rows[:, None])
                if projection.bias is not None:
                    projection.bias.mul_(rows)
            else:
                raise UnsupportedError(f"stress: expected attention with {side}_proj or {side}_norm, got {type(layer).__name__}")
