"""Rows stored as their difference from a static vector of the head: x ~ c + store(x - c), c the mean of the calibration
rows.

For K a fixed offset adds the same q.c to all scores of a query, and the softmax does not change: kernels need not add
it back. For V, whose attention weights sum to 1, c is added once to the output. So centering costs nothing at decode.
It removes what a k_proj bias (Qwen2.5) or attention sinks put on every token, which a rotation only spreads. Served by
sawkv.
"""

from __future__ import annotations

from dataclasses import dataclass

from sawkv.lab.methods.base import Quantizer
from sawkv.prepare.samples import Reader, Sample


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
