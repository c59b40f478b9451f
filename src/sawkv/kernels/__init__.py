"""Kernel backends. Each provides the classes `Pages`, `Schedule` and `Attention`, whose arguments `sawkv.ops` has
checked.

Constructors take what does not change between calls. A call runs for every layer and step, so it does little.

`select_backend` takes the fastest backend that supports a device and a layout. `sawkv doctor` shows the choice, and why
other backends were passed over.
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
"""Modules of this package, fastest first."""
NO_FAST_KERNELS: Final = (
    "sawkv: there are no fast kernels here (`sawkv doctor` says why): attention is correct but very slow"
)
"""What engines log where the reference is chosen."""


class ScheduleShape(NamedTuple):
    """The layers and the largest batch that a schedule is made for.

    Attributes:
        layout: of the layers' pages.
        device: of the pages.
        num_q_heads: query heads of a layer.
        max_num_seqs: sequences in the largest batch.
        max_query_len: most query tokens of any sequence. The Triton backend takes 1 to 8; others any number.
        sliding_window: tokens that a query sees, itself included; 0 is no limit.
    """

    layout: PageLayout
    device: torch.device
    num_q_heads: int
    max_num_seqs: int
    max_query_len: int
    sliding_window: int


class Turns(NamedTuple):
    """The requests for which reading the pages is faster than `gather` and an engine's own 16-bit attention. A turn is
    a request with several new tokens on a long cached prefix.

    Attributes:
        query_lens: numbers of query tokens that a schedule of its own pays for, ascending. The last is the most that a
            turn may have.
        limits: most query tokens of a turn, and fewest tokens in the cache of one with so many, both ascending.
    """

    query_lens: tuple[int, ...]
    limits: tuple[tuple[int, int], ...]

    def suit(self, query_len: int, seq_len: int) -> bool:
        """Whether a request with so many new tokens, and so many tokens in the cache with them, is a turn."""
        return any(query_len <= most and seq_len >= least for most, least in self.limits)


class Schedule:
    """How the attention of one step is spread over the device: made once, updated once per step, read by every layer.

    This base class schedules nothing. Backends that need a schedule derive from it.
    """

    def __init__(self, shape: ScheduleShape) -> None:
        self.shape = shape

    @staticmethod
    def turns(layout: PageLayout, device: torch.device, num_q_heads: int) -> Turns | None:
        """The turns that should read the pages; None if nobody measured it."""
        return None

    def update(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        """Enqueue the schedule for these lengths, [num_seqs] and [num_seqs + 1] int32, on the current stream."""


@dataclass(frozen=True, eq=False)
class Step:
    """Pages, lengths and query ranges of the sequences of one step, which `ops.Schedule.update` has checked. All layers
    share it.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    schedule: Schedule


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The tokens that `gather` reads and their places in the outputs, which `ops.prefixes` has checked."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seq_lens: torch.Tensor
    first_positions: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """Constants of one attention layer. Attributes as in `ops.Attention`."""

    cache: PagedKVCache
    num_q_heads: int
    softmax_scale: float
    sliding_window: int
    logit_softcap: float
    sinks: torch.Tensor | None

    @property
    def adds_offsets(self) -> bool:
        """Whether scores need the term q.k_center even if the caller does not ask for the log-sum-exp."""
        if self.cache.num_buckets > 1:
            return True
        return self.cache.k_center is not None and (self.logit_softcap > 0 or self.sinks is not None)


class PageKernels(Protocol):
    """`append` and `gather` for the pages of one layer."""

    def append(
        self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor, positions: torch.Tensor | None
    ) -> None: ...

    def gather(self, prefixes: Prefixes, k_out: torch.Tensor, v_out: torch.Tensor, rotated: bool) -> None: ...


class AttentionKernel(Protocol):
    """Attention of one layer. The same backend made the step's schedule, for layers of this shape."""

    def __call__(self, q: torch.Tensor, step: Step, out: torch.Tensor, lse: torch.Tensor | None) -> None: ...


class Backend(Protocol):
    """The interface of each module in this package."""

    name: str
    counts: bool
    """Whether `append` updates the cache's counters. Other backends leave them unchanged."""

    def unsupported_reason(self, device: torch.device, layout: PageLayout) -> str | None:
        """Why this backend cannot serve the layout on the device, or None if it can. Cheap, unless it has to build
        kernels.
        """
        ...

    Pages: Callable[[PagedKVCache], PageKernels]
    Schedule: type[Schedule]
    Attention: Callable[[Layer], AttentionKernel]


def load_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        UnsupportedError: no backend has that name, or it cannot be imported here.
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
    """The backend called `name`, or without a name the fastest one that supports `layout` on `device`.

    Raises:
        UnsupportedError: the named backend, or every backend, does not support them. The message gives the reasons.
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
