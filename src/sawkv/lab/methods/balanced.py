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

from sawkv.lab.methods.base import Quantizer
from sawkv.prepare.balance import channel_scales
from sawkv.prepare.samples import Reader, Sample


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
        scale = channel_scales(sample, paired=self.paired, shared=self.shared)
        hessian = sample.hessian * scale[..., :, None] * scale[..., None, :]
        read = self.inner.fit(Sample(sample.rows / scale, hessian))
        return lambda rows: read(rows / scale) * scale
