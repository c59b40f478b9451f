"""Backends: each implements the same three functions on a `PagedKVCache`, with arguments that `sawkv.ops` has checked.

The fastest backend that supports a device and a layout is chosen; `sawkv doctor` shows the choice and why others were passed over.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Final, Protocol, cast

import torch

from sawkv.cache import PagedKVCache
from sawkv.errors import UnsupportedError
from sawkv.format.layout import PageLayout

logger = logging.getLogger(__name__)

PREFERENCE: Final = ("cuda", "triton", "cpu", "reference")
"""Names of the modules in this package, the fastest first."""


class DecodePlan:
    """A schedule of decode attention: made once, updated once a step, read by every layer. Backends without one use this class itself."""

    def update(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        """Enqueue the schedule of these lengths on the current stream.

        Args:
            seq_lens: [num_seqs] int32, as `decode_attention` will get it.
            query_start_loc: [num_seqs + 1] int32, likewise.

        Raises:
            LayoutError: more sequences than the plan was made for.
        """


class Backend(Protocol):
    """What a module in this package provides."""

    name: str
    counts: bool
    """Whether `append` updates the cache's counters. Those that do not leave them as they are."""

    def unsupported_reason(self, device: torch.device, layout: PageLayout) -> str | None:
        """Why this backend cannot serve the layout on the device, or None if it can. Cheap, except where it builds the kernels."""
        ...

    def append(self, k: torch.Tensor, v: torch.Tensor, cache: PagedKVCache, slot_mapping: torch.Tensor) -> None: ...

    def decode_attention(
        self,
        q: torch.Tensor,
        cache: PagedKVCache,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        *,
        softmax_scale: float,
        max_query_len: int,
        sliding_window: int,
        logit_softcap: float,
        sinks: torch.Tensor | None,
        plan: DecodePlan | None,
    ) -> None: ...

    def gather(
        self,
        cache: PagedKVCache,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seq_lens: torch.Tensor,
        k_out: torch.Tensor,
        v_out: torch.Tensor,
        *,
        rotated: bool,
    ) -> None: ...

    def make_plan(
        self, layout: PageLayout, device: torch.device, num_q_heads: int, max_num_seqs: int, max_query_len: int, sliding_window: int
    ) -> DecodePlan: ...


def load_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        UnsupportedError: there is none of that name, or it cannot be imported here.
    """
    if name not in PREFERENCE:
        raise UnsupportedError(f"backend: expected one of {', '.join(PREFERENCE)}, got {name!r}")
    try:
        return cast(Backend, importlib.import_module(f"sawkv.kernels.{name}"))
    except ImportError as error:
        raise UnsupportedError(f"backend {name}: {error}") from error


def unsupported_reason(name: str, device: torch.device, layout: PageLayout) -> str | None:
    """Why the backend called `name` cannot serve this layout on this device, or None if it can."""
    try:
        return load_backend(name).unsupported_reason(device, layout)
    except UnsupportedError as error:
        return str(error)


@cache
def select_backend(device: torch.device, layout: PageLayout, name: str | None = None) -> Backend:
    """The backend called `name`, or the fastest one that supports `layout` on `device`.

    Raises:
        UnsupportedError: the named backend, or every backend, does not support them; the message gives the reasons.
    """
    reasons: list[str] = []
    for candidate in PREFERENCE if name is None else (name,):
        reason = unsupported_reason(candidate, device, layout)
        if reason is None:
            passed_over = f" ({'; '.join(reasons)})" if reasons else ""
            logger.info("sawkv: %s on %s runs on the %s backend%s", layout.format, device, candidate, passed_over)
            return load_backend(candidate)
        reasons.append(f"{candidate}: {reason}")
    raise UnsupportedError(f"no backend for {layout.format}, head_dim {layout.head_dim}, on {device}: {'; '.join(reasons)}")
