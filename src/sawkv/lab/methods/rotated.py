"""Rotation before another quantizer, undone when read: y = H D x, x ~ D H y'.

H is block-diagonal Hadamard with blocks of `order` channels (SAW-INT4, arXiv 2604.19157; `format.rotation`). D is the
identity or fixed random signs (QuIP#, arXiv 2402.04396), which break up rows that lie along a row of H. sawkv serves it
without signs. Signs would cost one sign flip per channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.format.rotation import rotate
from sawkv.format.spec import CacheFormat
from sawkv.lab.methods.base import Quantizer
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader

SIGNS_SEED = 4


@dataclass(frozen=True)
class Rotated:
    """`inner` in a rotated basis.

    Attributes:
        inner: what stores the rotated rows.
        order: channels in a block; None for the format's default at the model's head_dim.
        signs: whether random signs come before the Hadamard blocks.
    """

    inner: Quantizer
    order: int | None = None
    signs: bool = False

    def bits(self, head_dim: int) -> float:
        return self.inner.bits(head_dim)

    def fit(self, sample: Sample) -> Reader:
        head_dim = sample.head_dim
        order = CacheFormat("int4", self.order, self.order).resolve(head_dim).k_rotation_order
        signs = random_signs(head_dim).to(sample.rows.device) if self.signs else None

        def forward(rows: torch.Tensor) -> torch.Tensor:
            return rotate(rows if signs is None else rows * signs, order)

        def backward(rows: torch.Tensor) -> torch.Tensor:
            rows = rotate(rows, order)
            return rows if signs is None else rows * signs

        hessian = forward(forward(sample.hessian).transpose(-1, -2))
        read = self.inner.fit(Sample(forward(sample.rows), hessian))
        return lambda rows: backward(read(forward(rows)))


def random_signs(head_dim: int) -> torch.Tensor:
    """[head_dim] fp32 of -1 and 1, always the same."""
    return torch.randint(0, 2, (head_dim,), generator=torch.Generator().manual_seed(SIGNS_SEED)).float() * 2 - 1
