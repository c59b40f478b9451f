"""Centering: x ~ c + store(x - c), with c the mean of the head's calibration rows. Served by sawkv.

An offset of K adds the same q.c to all scores of a query, which the softmax ignores, so kernels need not add it back.
For V, whose attention weights sum to 1, c is added once to the output. So centering costs nothing at decode. It removes
offsets such as those of a k_proj bias (Qwen2.5), which a rotation would only spread over channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from sawkv.lab.methods.base import Quantizer
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader


@dataclass(frozen=True)
class Centered:
    """`inner` on rows less their head's center, [num_kv_heads, head_dim] fp32."""

    inner: Quantizer

    def bits(self, head_dim: int) -> float:
        return self.inner.bits(head_dim)

    def fit(self, sample: Sample) -> Reader:
        center = sample.rows.mean(0)
        read = self.inner.fit(Sample(sample.rows - center, sample.hessian))
        return lambda rows: read(rows - center) + center
