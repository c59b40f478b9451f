"""Token-wise integers whose range is searched at write: scale and zero point minimize the squared error. A comparison.

For each shrink factor the range is shrunk about its middle, and codes are clamped to it; the best row is kept. Scale
and zero point are then refitted to its codes by least squares. Source: MSE observers of weight quantization (for
example OCTAV, arXiv 2206.06501), applied per row at write. The bytes are those of sawkv's codec, so reading is as fast.
Writing takes about ten times the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.format.constants import MAX_SCALE, MIN_SCALE
from sawkv.lab.methods.integer import META_BITS
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader

SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class RangeSearched:
    """Integers of `bits_per_code` bits, with the range of smallest squared error."""

    bits_per_code: int = 4

    def bits(self, head_dim: int) -> float:
        return self.bits_per_code + META_BITS / head_dim

    def fit(self, sample: Sample) -> Reader:
        return self._read

    def _read(self, rows: torch.Tensor) -> torch.Tensor:
        lo, hi = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        middle, half = (hi + lo) / 2, (hi - lo) / 2
        best = torch.zeros_like(rows)
        least = torch.full_like(lo, torch.inf)
        for shrink in SHRINKS:
            codes, read = self._through(rows, middle - shrink * half, half * (2 * shrink))
            # Least squares of rows on codes: slope and offset that suit these codes best, then codes that suit those.
            centered = codes - codes.mean(-1, keepdim=True)
            slope = (centered * rows).sum(-1, keepdim=True) / centered.square().sum(-1, keepdim=True).clamp_min(1e-12)
            start = rows.mean(-1, keepdim=True) - slope * codes.mean(-1, keepdim=True)
            _, refitted = self._through(rows, start, slope * self._top)
            for candidate in (read, refitted):
                error = (candidate - rows).square().sum(-1, keepdim=True)
                better = error < least
                best, least = candidate.where(better, best), error.where(better, least)
        return best

    @property
    def _top(self) -> int:
        return (1 << self.bits_per_code) - 1

    def _through(
        self, rows: torch.Tensor, start: torch.Tensor, span: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, and the rows that they decode to, with scale and zero point rounded to fp16."""
        scale = (span / self._top).clamp(MIN_SCALE, MAX_SCALE).half().float()
        zero_point = (-start / scale).clamp(-1024, 1024).half().float()
        codes = (rows / scale + zero_point).round().clamp(0, self._top)
        return codes, (codes - zero_point) * scale
