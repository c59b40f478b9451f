"""Unquantized rows in a float type: a control for tests, and rotation without quantization for users."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PassthroughCodec:
    """Rows stored as `dtype`."""

    dtype: torch.dtype

    def encode(self, y: torch.Tensor, feedback: None = None) -> tuple[torch.Tensor, None]:
        """Rows [..., head_dim] fp32 to their little-endian bytes [..., row_bytes] uint8. There is no meta, and feedback
        has no effect.
        """
        return y.to(self.dtype).contiguous().view(torch.uint8), None

    def decode(self, codes: torch.Tensor, meta: torch.Tensor | None) -> torch.Tensor:
        """The stored values in fp32: [..., head_dim]."""
        return codes.contiguous().view(self.dtype).float()
