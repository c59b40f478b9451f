"""Channels scaled by static powers of two before they are stored, so that size and importance even out: x ~ s * store(x / s).

The error after a rotation is nearly the same in all channels and grows with sum_i x_i^2 / s_i^2; its cost is sum_i s_i^2 hessian_ii times
that. The product is least at s_i^4 = mean(x_i^2) / hessian_ii (Cauchy-Schwarz). For K a pair (i, i + head_dim / 2) shares its s, so the
scaling commutes with RoPE and can be folded into q_proj and k_proj, or into the QK-norms, once and for all: nothing is left to do at run
time, and powers of two keep the 16-bit model bit-identical. For V it folds into v_proj and o_proj. Source: SmoothQuant, arXiv 2211.10438,
balances activations and weights so; QServe, arXiv 2405.04532, smooths K so. Here for scores. Served fast by any engine that loads the
folded weights: `sawkv balance` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.evaluate.methods.base import Quantizer, Reader, Sample

DEAD_ZONE = 0.75
"""Channels that are off by less than 2 to this power are left alone: rounding to powers of two would gain nothing there."""


@dataclass(frozen=True)
class Balanced:
    """`inner` on scaled channels.

    Attributes:
        inner: what stores them.
        paired: whether channels i and i + head_dim / 2 share a scale, as K needs to be folded (RoPE over part of a head pairs others).
        shared: whether all heads share scales, as QK-norm weights do.
    """

    inner: Quantizer
    paired: bool = False
    shared: bool = False

    def bits(self, head_dim: int) -> float:
        return self.inner.bits(head_dim)

    def fit(self, sample: Sample) -> Reader:
        scale = self.scales(sample)
        hessian = sample.hessian * scale[..., :, None] * scale[..., None, :]
        read = self.inner.fit(Sample(sample.rows / scale, hessian))
        return lambda rows: read(rows / scale) * scale

    def scales(self, sample: Sample) -> torch.Tensor:
        """[num_kv_heads, head_dim] fp32 powers of two."""
        size = sample.rows.square().mean(0)
        weight = sample.hessian.diagonal(dim1=-2, dim2=-1)
        if self.paired:
            size, weight = _mean_of_pairs(size), _mean_of_pairs(weight)
        if self.shared:
            size, weight = size.mean(0, keepdim=True).expand_as(size), weight.mean(0, keepdim=True).expand_as(weight)
        exact = (size.clamp_min(1e-12) / weight.clamp_min(1e-12)).log2() / 4
        exact = exact - exact.median(-1, keepdim=True).values  # a common factor changes nothing
        scales: torch.Tensor = exact.round().where(exact.abs() > DEAD_ZONE, 0.0).clamp(-12, 12).exp2()
        return scales


def _mean_of_pairs(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return ((a + b) / 2).repeat(1, 2)
