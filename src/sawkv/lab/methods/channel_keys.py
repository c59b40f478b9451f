"""Keys rounded per channel in groups of 64 tokens, values per token in groups of 64 channels. A comparison.

A channel of a group has a scale and a smallest value in fp16, so channels of any offset and size do no harm. Sources:
KIVI, arXiv 2402.02750; the quantized cache of Transformers with quanto, whose groups have 64 values. Both also keep the
last 128 tokens in 16 bits, which is left out here: every read is quantized. Not token-wise: the ranges of a group are
known when its last token is, so a query reads its own group by ranges that up to 63 later tokens took part in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.lab.methods.integer import META_BITS, nearest
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader

GROUP = 64


@dataclass(frozen=True)
class Grouped:
    """Integers of 4 bits in groups of 64, of tokens if `by_channel`, else of channels."""

    by_channel: bool

    def bits(self, head_dim: int) -> float:
        return 4 + META_BITS / GROUP

    def fit(self, sample: Sample) -> Reader:
        def read(rows: torch.Tensor) -> torch.Tensor:
            x = rows.permute(1, 2, 0) if self.by_channel else rows
            coded = torch.cat([nearest(group, 4) for group in torch.split(x, GROUP, -1)], -1)
            return coded.permute(2, 0, 1) if self.by_channel else coded

        return read
