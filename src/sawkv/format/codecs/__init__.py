"""Codecs: what turns a rotated row into bytes, and back. One file per method."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from sawkv.format.codecs.integer import IntegerCodec
from sawkv.format.codecs.passthrough import PassthroughCodec


class Codec(Protocol):
    """Encodes rows along the last dimension; knows nothing of pages."""

    def encode(self, y: torch.Tensor, feedback: Any = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows [..., head_dim] fp32 to codes [..., row_bytes] uint8 and meta [..., 2] fp16 (scale, zero_point), or no
        meta.

        `feedback` is a `Feedback` or None, for rows [..., num_kv_heads, head_dim]; codecs that a cache refuses it for
        take None alone.
        """
        ...

    def decode(self, codes: torch.Tensor, meta: torch.Tensor | None) -> torch.Tensor:
        """The inverse, up to the codec's error: [..., head_dim] fp32."""
        ...


CODECS: dict[str, Codec] = {
    "int4": IntegerCodec(4),
    "int8": IntegerCodec(8),
    "bf16": PassthroughCodec(torch.bfloat16),
    "fp16": PassthroughCodec(torch.float16),
    "fp32": PassthroughCodec(torch.float32),
}

__all__ = ["CODECS", "Codec", "IntegerCodec", "PassthroughCodec"]
