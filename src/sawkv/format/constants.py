"""Numbers that every implementation of the format shares. docs/format.md says where each is used.

Device code gets them from here: `sawkv.kernels.constants` writes them as C++, and Triton kernels import them.
"""

from __future__ import annotations

from typing import Final

MAX_SCALE: Final = 65504.0
"""The largest fp16: a scale beyond it saturates, and the error of its row is not bounded."""
MIN_SCALE: Final = 2.0**-24
"""The smallest positive fp16."""
MAX_ZERO_POINT: Final = 1024.0
"""Bound of |zero_point|. Below it fp16 resolves a quarter of a code or less."""
MAX_SCALE_BITS: Final = 0x7BFF
"""`MAX_SCALE` as fp16 bits."""
NAN_SCALE_BITS: Final = 0x7E00
"""The scale of a row that is not finite, as fp16 bits."""

ERROR_STEPS: Final = 64
"""Steps per code in which feedback passes errors on."""
MAX_WEIGHT: Final = 127
"""Largest 8-bit feedback weight, and largest passed-on error in steps."""

SAMPLE: Final = 1024
"""One slot in this many is sampled for the error counters."""
SAMPLE_HASH: Final = 2654435761
"""Knuth's multiplicative hash. It spreads the sampled slots over pages and offsets."""

BUCKET_SIZE: Final = 2048
"""Positions per bucket. K may have a center per bucket. A kernel's tile lies in one bucket."""

SEGMENT_BYTES: Final = 16
"""Bytes of a row's codes that keep their order. The segments of V are permuted."""
