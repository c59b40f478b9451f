"""Codecs turn rotated rows into bytes, and bytes into rows. Each codec is one file."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from sawkv.format.codecs.integer import IntegerCodec
from sawkv.format.codecs.passthrough import PassthroughCodec


class Codec(Protocol):
    """Encodes rows along the last dimension. A codec does not know of pages."""

    def encode(self, y: torch.Tensor, feedback: Any = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode rows.

        Args:
            y: [..., head_dim] fp32. With feedback [..., num_kv_heads, head_dim].
            feedback: a `Feedback`, or None. `PagedKVCache` refuses feedback for codecs that cannot use it.

        Returns:
            Codes [..., row_bytes] uint8, and meta [..., 2] fp16 (scale, zero_point) or None.
        """
        ...

    def decode(self, codes: torch.Tensor, meta: torch.Tensor | None) -> torch.Tensor:
        """Decode rows: [..., head_dim] fp32, equal to what was encoded up to the codec's error."""
        ...


CODECS: dict[str, Codec] = {
    "int2": IntegerCodec(2),
    "int3": IntegerCodec(3),
    "int4": IntegerCodec(4),
    "int8": IntegerCodec(8),
    "bf16": PassthroughCodec(torch.bfloat16),
    "fp16": PassthroughCodec(torch.float16),
    "fp32": PassthroughCodec(torch.float32),
}

__all__ = ["CODECS", "Codec", "IntegerCodec", "PassthroughCodec"]
