"""No quantization: rows stored in a float type. Controls, and the choice of who wants rotation alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PassthroughCodec:
    """Rows kept as `dtype`."""

    dtype: torch.dtype

    def encode(self, y: torch.Tensor, feedback: None = None) -> tuple[torch.Tensor, None]:
        """Rows [..., head_dim] fp32 to their little-endian bytes [..., row_bytes] uint8. They have no errors to feed
        back.
        """
        return y.to(self.dtype).contiguous().view(torch.uint8), None

    def decode(self, codes: torch.Tensor, meta: torch.Tensor | None) -> torch.Tensor:
        """The stored values in fp32: [..., head_dim]."""
        return codes.contiguous().view(self.dtype).float()
