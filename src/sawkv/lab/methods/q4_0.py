"""llama.cpp's q4_0: blocks of 32 channels with one fp16 scale and no zero point. A comparison.

scale = m / -8 with m the value of largest magnitude, code = min(15, floor(x / scale + 8.5)), x ~ (code - 8) * scale.
Source: ggml's reference quantization of q4_0. llama.cpp rotates K and V before it stores them so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.format.constants import MAX_SCALE
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader

BLOCK = 32


@dataclass(frozen=True)
class Q40:
    """Rows in blocks of 32 channels."""

    def bits(self, head_dim: int) -> float:
        return 4 + 16 / BLOCK

    def fit(self, sample: Sample) -> Reader:
        def read(rows: torch.Tensor) -> torch.Tensor:
            blocks = rows.view(*rows.shape[:-1], -1, BLOCK)
            largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
            scale = largest / -8
            inverse = torch.where(scale == 0, 0, 1 / scale)
            codes = (blocks * inverse + 8.5).floor().clamp_max(15)
            stored: torch.Tensor = (codes - 8) * scale.clamp(-MAX_SCALE, MAX_SCALE).half().float()
            return stored.flatten(-2)

        return read
