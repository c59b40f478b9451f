"""Stress that preserves the model's function: some RoPE pairs of keys are scaled up, and those of queries down.

In the weights, channels i and i + head_dim / 2 of K are multiplied by s, and those of Q by 1 / s. With s a power of
two, the 16-bit model's logits are bit-identical. Keys then have outlier channels, as keys of large models do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn

from sawkv.errors import UnsupportedError

PAIRS_STRESSED = 2


def stressed_pairs(layer: int, head_dim: int) -> list[int]:
    """The pairs of a layer that are scaled. They are a function of the layer's index."""
    return sorted(random.Random(layer).sample(range(head_dim // 2), PAIRS_STRESSED))


def apply_stress(layers: Sequence[nn.Module], head_dim: int, s: int) -> None:
    """Scale the pairs of `stressed_pairs` by `s` in the weights of attention modules, in place.

    Raises:
        UnsupportedError: s is not a power of two, or a module has no parts to scale.
    """
    if s < 1 or s & (s - 1):
        raise UnsupportedError(f"stress: expected a power of two, got {s}")
    for index, layer in enumerate(layers):
        factors = torch.ones(head_dim)
        for pair in stressed_pairs(index, head_dim):
            factors[[pair, pair + head_dim // 2]] = s
        scale_keys(layer, factors)


@torch.no_grad()
def scale_keys(layer: nn.Module, factors: torch.Tensor) -> None:
    """Multiply key channels by `factors`, [head_dim], and query channels by their inverse, in all heads of an attention
    module, in place.

    Raises:
        UnsupportedError: the module has neither QK-norms over head_dim nor q_proj and k_proj.
    """
    head_dim = factors.numel()
    for side, by in (("q", 1 / factors), ("k", factors)):
        norm, projection = getattr(layer, f"{side}_norm", None), getattr(layer, f"{side}_proj", None)
        if norm is not None:
            if norm.weight.shape != factors.shape:
                raise UnsupportedError(
                    f"keys: expected a {side}_norm over head_dim {head_dim}, got {list(norm.weight.shape)}"
                )
            norm.weight.mul_(by.to(norm.weight))
        elif isinstance(projection, nn.Linear) and projection.out_features % head_dim == 0:
            _scale_rows(projection, by.repeat(projection.out_features // head_dim))
        else:
            raise UnsupportedError(
                f"keys: expected attention with {side}_proj or {side}_norm, got {type(layer).__name__}"
            )


def _scale_rows(projection: nn.Linear, by: torch.Tensor) -> None:
    projection.weight.mul_(by.to(projection.weight)[:, None])
    if projection.bias is not None:
        projection.bias.mul_(by.to(projection.bias))
