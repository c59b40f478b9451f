"""INT4 simulated in 32-bit pages, which hold the values that INT4 pages decode to. An engine on INT4 pages must equal
an engine on these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sawkv import ops
from sawkv.format.codecs import CODECS, IntegerCodec, PassthroughCodec
from sawkv.format.feedback import Feedback

_int4, _fp32 = IntegerCodec(4), PassthroughCodec(torch.float32)


class Simulated(PassthroughCodec):
    """Stores rows as INT4 decodes them."""

    def encode(self, y: torch.Tensor, feedback: Feedback | None = None) -> tuple[torch.Tensor, None]:
        return _fp32.encode(_int4.decode(*_int4.encode(y, feedback)))


def append_by_reference(**changed: Any) -> None:
    """From now on, have the reference write the pages in this process, for a cache that is changed so."""

    written = ops.Pages.append

    def append(
        self: ops.Pages,
        k: torch.Tensor,
        v: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> None:
        is_recent = self.cache.layout.k_rotation_order == 0  # the newest tokens, which are kept as they are
        pages = self if is_recent else ops.Pages(replace(self.cache, **changed), "reference")
        written(pages, k, v, slot_mapping, positions)

    ops.Pages.append = append  # type: ignore[method-assign]


def simulate_int4() -> Callable[[], None]:
    """From now on, have pages of the fp32 formats hold rows that were quantized and decoded. Returns what ends it.

    The codec is Python's, so the reference writes. The backend that the engine chooses still reads.
    """
    before = ops.Pages.append, CODECS["fp32"]
    append_by_reference()
    CODECS["fp32"] = Simulated(torch.float32)

    def end() -> None:
        ops.Pages.append, CODECS["fp32"] = before  # type: ignore[method-assign]

    return end
