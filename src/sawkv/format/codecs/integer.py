"""Token-wise asymmetric integers: each row of head_dim values has one scale and one zero point.

Source: SAW-INT4, arXiv 2604.19157. Departures (docs/decisions/0001): the zero point is not clamped to the range of
codes, and the scale is rounded up and bounded from below, so that every finite row has an error of at most scale / 2.
Without feedback the first and last code lie on the smallest and largest value. With feedback (docs/decisions/0012), and
always below 4 bits (0027), each code stands for an interval, and the intervals together cover the row's range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.format.constants import MAX_SCALE, MAX_ZERO_POINT, MIN_SCALE
from sawkv.format.feedback import Feedback


@dataclass(frozen=True)
class IntegerCodec:
    """Unsigned codes of `bits` bits: 2, 3, 4 or 8. docs/format.md says how they share bytes."""

    bits: int

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    def encode(self, y: torch.Tensor, feedback: Feedback | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode rows.

        Args:
            y: [..., head_dim] fp32. With feedback [..., num_kv_heads, head_dim].
            feedback: how rounding errors move later channels, or None.

        Returns:
            Codes [..., head_dim * bits / 8] uint8, and meta [..., 2] fp16 (scale, zero_point).
        """
        lo, hi = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        finite = (lo.abs() < torch.inf) & (hi.abs() < torch.inf)  # amin and amax propagate NaN
        covers = feedback is not None or self.bits < 4  # whether intervals cover the range, or codes do
        intervals, first = (self.max_code + 1, -0.5) if covers else (self.max_code, 0.0)
        by_range = (hi - lo) * torch.tensor(1 / intervals, dtype=torch.float32, device="cpu")
        by_offset = torch.maximum(lo.abs(), hi.abs()) / MAX_ZERO_POINT
        wanted = torch.maximum(by_range, by_offset).clamp_min(MIN_SCALE)
        scale = _fp16_up(wanted.clamp_max(MAX_SCALE))
        inv = scale.float().reciprocal()
        # The clamp acts only where the scale saturates, for ranges beyond fp16. Such values are lost, but stay finite.
        zero_point = (first - lo * inv).clamp(-MAX_ZERO_POINT, MAX_ZERO_POINT).half()
        # fp64 holds the product and the sum exactly enough that one rounding to fp32 gives what fma gives.
        shifted = (y.double() * inv.double() + zero_point.double()).float()
        if feedback is not None:
            shifted = feedback.move(shifted, self.max_code).where(finite & (wanted <= MAX_SCALE), shifted)
        codes = shifted.round().clamp(0, self.max_code).where(finite, 0).to(torch.uint8)
        meta = torch.cat([scale.where(finite, torch.nan), zero_point.where(finite, 0)], -1)
        return pack(codes, self.bits), meta

    def decode(self, codes: torch.Tensor, meta: torch.Tensor | None) -> torch.Tensor:
        """(code - zero_point) * scale in fp32: [..., head_dim]."""
        if meta is None:
            raise TypeError("integer codes need their scale and zero point")
        values = meta.float()
        return (unpack(codes, self.bits).float() - values[..., 1:]) * values[..., :1]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., head_dim] uint8 of `bits` bits to bytes [..., head_dim * bits / 8] uint8."""
    if bits == 3:
        return _pack_3(codes)
    per_byte = 8 // bits
    shifts = (bits * torch.arange(per_byte, device=codes.device)).to(torch.uint8)
    parts: torch.Tensor = torch.unflatten(codes, -1, (-1, per_byte)) << shifts
    return parts.sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: codes [..., head_dim] uint8."""
    if bits == 3:
        return _unpack_3(packed)
    per_byte = 8 // bits
    shifts = (bits * torch.arange(per_byte, device=packed.device)).to(torch.uint8)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _pack_3(codes: torch.Tensor) -> torch.Tensor:
    """32 codes in three little-endian words of 32 bits. Each half of the words holds 16 codes: five in each 16-bit half
    word, from its lowest bit on, and the bits of the last one on top of the three.
    """
    halves = torch.unflatten(codes.int(), -1, (-1, 2, 16))
    fives = torch.unflatten(halves[..., :15], -1, (3, 5)) << 3 * torch.arange(5, device=codes.device)
    last = (halves[..., 15:] >> torch.arange(3, device=codes.device)) & 1
    words = fives.sum(-1) | last << 15  # [..., 2 halves, 3 words]
    return torch.stack((words & 255, words >> 8), -1).transpose(-3, -2).flatten(-4).to(torch.uint8)


def _unpack_3(packed: torch.Tensor) -> torch.Tensor:
    low, high = torch.unflatten(packed.int(), -1, (-1, 3, 2, 2)).transpose(-3, -2).unbind(-1)
    words = low | high << 8
    fives = (words[..., None] >> 3 * torch.arange(5, device=packed.device)) & 7
    last = (words >> 15 << torch.arange(3, device=packed.device)).sum(-1, keepdim=True)
    return torch.cat((fives.flatten(-2), last), -1).flatten(-3).to(torch.uint8)


def _fp16_up(x: torch.Tensor) -> torch.Tensor:
    """The smallest fp16 at or above x, for 0 < x <= MAX_SCALE."""
    nearest = x.half()
    return (nearest.view(torch.int16) + (nearest.float() < x)).view(torch.float16)
