"""Outliers: the largest values of a row are kept in 16 bits, and another quantizer stores the rest. A comparison.

The `count` values farthest from the row's mean are stored with their channel numbers, replaced by the mean, and put
back when read. Source: KVQuant's dense-and-sparse rows, arXiv 2401.18079. Each costs 16 + 8 bits, and reading needs a
scatter into every row, which no attention kernel does fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.lab.methods.base import Quantizer
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader

BITS_OF_ONE = 16 + 8


@dataclass(frozen=True)
class Outliers:
    """`inner` on rows without their `count` outliers."""

    inner: Quantizer
    count: int

    def bits(self, head_dim: int) -> float:
        return self.inner.bits(head_dim) + self.count * BITS_OF_ONE / head_dim

    def fit(self, sample: Sample) -> Reader:
        read = self.inner.fit(Sample(self._split(sample.rows)[0], sample.hessian))

        def reader(rows: torch.Tensor) -> torch.Tensor:
            rest, channels = self._split(rows)
            kept = rows.gather(-1, channels).half().float()
            return read(rest).scatter(-1, channels, kept)

        return reader

    def _split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = rows.mean(-1, keepdim=True)
        channels = (rows - mean).abs().topk(self.count, -1).indices
        return rows.scatter(-1, channels, mean.expand_as(channels)), channels
