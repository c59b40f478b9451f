"""Backends: each provides three classes, `Pages`, `Schedule` and `Attention`, whose arguments `sawkv.ops` has checked.

What stays from call to call is given when an object is made, so that a call, which runs for every layer of every step,
does little.

The fastest backend that supports a device and a layout is chosen; `sawkv doctor` shows the choice and why others were
passed over.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple, Protocol, cast

import torch

from sawkv.cache import PagedKVCache
from sawkv.errors import UnsupportedError
from sawkv.format.layout import PageLayout

logger = logging.getLogger(__name__)

PREFERENCE: Final = ("cuda", "triton", "cpu", "reference")
"""Names of the modules in this package, the fastest first."""


class ScheduleShape(NamedTuple):
    """What a schedule is made for.

    Attributes:
        layout: of the layers' pages.
        device: of the pages.
        num_q_heads: query heads of a layer.
        max_num_seqs: sequences in the largest batch.
        max_query_len: the most query tokens any sequence has. GPU backends take 1 to 8; others any number.
        sliding_window: a query sees this many tokens, itself included; 0 is no limit.
    """

    layout: PageLayout
    device: torch.device
    num_q_heads: int
    max_num_seqs: int
    max_query_len: int
    sliding_window: int


class Schedule:
    """How one step's attention is spread over a device: made once, updated once a step, read by every layer.

    This class schedules nothing, for backends that need no more. Others derive from it.
    """

    def __init__(self, shape: ScheduleShape) -> None:
        self.shape = shape

    def update(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        """Enqueue the schedule of these lengths, [num_seqs] and [num_seqs + 1] int32, on the current stream."""


@dataclass(frozen=True, eq=False)
class Step:
    """Where the sequences of one step are: what all layers share, as `ops.Schedule.update` has checked it."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    schedule: Schedule


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Which tokens `gather` reads, and where it puts them, as `ops.prefixes` has checked it."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seq_lens: torch.Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """What stays in the attention of a layer. Attributes as of `ops.Attention`."""

    cache: PagedKVCache
    num_q_heads: int
    softmax_scale: float
    sliding_window: int
    logit_softcap: float
    sinks: torch.Tensor | None

    @property
    def adds_offsets(self) -> bool:
        """Whether scores need q.k_center, which centering took from them, even where nobody asks for the
        log-sum-exp.
        """
        return self.cache.k_center is not None and (self.logit_softcap > 0 or self.sinks is not None)


class PageKernels(Protocol):
    """`append` and `gather` of one layer's pages."""

    def append(self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None: ...

    def gather(self, prefixes: Prefixes, k_out: torch.Tensor, v_out: torch.Tensor, rotated: bool) -> None: ...


class AttentionKernel(Protocol):
    """Attention of one layer. The step's schedule was made by the same backend, for layers as this one."""

    def __call__(self, q: torch.Tensor, step: Step, out: torch.Tensor, lse: torch.Tensor | None) -> None: ...


class Backend(Protocol):
    """What a module in this package provides."""

    name: str
    counts: bool
    """Whether `append` updates the cache's counters. Those that do not leave them as they are."""

    def unsupported_reason(self, device: torch.device, layout: PageLayout) -> str | None:
        """Why this backend cannot serve the layout on the device, or None if it can. Cheap, except where it builds the
        kernels.
        """
        ...

    Pages: Callable[[PagedKVCache], PageKernels]
    Schedule: Callable[[ScheduleShape], Schedule]
    Attention: Callable[[Layer], AttentionKernel]


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
    raise UnsupportedError(
        f"no backend for {layout.format}, head_dim {layout.head_dim}, on {device}: {'; '.join(reasons)}"
    )
