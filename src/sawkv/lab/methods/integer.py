"""Token-wise integers: the codecs of `sawkv.format.codecs`. Without a rotation they are plain INT4 and INT8.

y ~ (code - zero_point) * scale, with one fp16 scale and zero point per row. Source: SAW-INT4, arXiv 2604.19157.
docs/format.md specifies the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.format.codecs import CODECS
from sawkv.format.constants import MAX_SCALE, MIN_SCALE
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader

META_BITS = 32


@dataclass(frozen=True)
class Coded:
    """Rows through one of the product's codecs: `int4`, `int8`, `bf16`, `fp16` or `fp32`."""

    codec: str

    def bits(self, head_dim: int) -> float:
        codes, meta = CODECS[self.codec].encode(torch.zeros(1, head_dim))
        return (codes.numel() * 8 + (0 if meta is None else META_BITS)) / head_dim

    def fit(self, sample: Sample) -> Reader:
        codec = CODECS[self.codec]
        return lambda rows: codec.decode(*codec.encode(rows))


def nearest(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round the last axis to integers of `bits` bits between its smallest and largest value. Scale and smallest value
    are in fp16, as several rivals store them; sawkv stores a zero point instead.
    """
    top = (1 << bits) - 1
    low = x.amin(-1, keepdim=True).clamp(-MAX_SCALE, MAX_SCALE).half().float()
    scale = ((x.amax(-1, keepdim=True) - low) / top).clamp(MIN_SCALE, MAX_SCALE).half().float()
    return ((x - low) / scale).round().clamp(0, top) * scale + low
