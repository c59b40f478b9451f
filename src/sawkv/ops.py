"""Operations on tensors: check the arguments, choose a backend, run its kernel. Over 400 lines: half of them are
contracts.

`append` writes K and V of new tokens to pages. `Attention` reads Q and pages, and writes the output. `gather` decodes
pages to K and V in 16 or 32 bits.

Each layer has one `Attention` object (or `Pages`, if it never attends to its pages). Its constructor checks the
constants and chooses the backend. Each step has one `Step`, which `Schedule.update` makes, and which layers of equal
shape share:

    # once per layer
    attention = Attention(cache, num_q_heads=32, softmax_scale=128**-0.5)
    # once for layers of equal shape
    schedule = Schedule(layout, device, num_q_heads=32, max_num_seqs=64, max_query_len=1)
    # once per step
    step = schedule.update(block_table, seq_lens, query_start_loc)
    # once per layer and step
    attention.append(k, v, slot_mapping)
    attention(q, step, out)

The functions `append`, `decode_attention` and `gather` do all of this in one call.

Only `append` changes the cache. On a GPU, calls of `append` and `Attention` do not synchronize, and their launches do
not depend on lengths on the host, so CUDA graphs can capture them.
"""

from __future__ import annotations

import functools
from copy import copy

import torch

from sawkv import kernels
from sawkv.cache import PagedKVCache
from sawkv.errors import LayoutError, UnsupportedError
from sawkv.format.layout import PageLayout
from sawkv.kernels import Layer, Prefixes, ScheduleShape, Step, select_backend

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_BOUND = 8
"""Most objects that the functions below keep with one cache. A caller that changes constants at each call evicts the
oldest.
"""


class Pages:
    """`append` and `gather` for the pages of one layer."""

    def __init__(self, cache: PagedKVCache, backend: str | None = None) -> None:
        """Bind kernels to a cache.

        Args:
            cache: of the layer. `append` writes to it.
            backend: a name from `sawkv doctor`; None chooses by device and format.

        Raises:
            UnsupportedError: the named backend, or every backend, cannot serve this cache.
        """
        layout = cache.layout
        self.cache = cache
        self._device = cache.pages.device
        self._kernels = select_backend(self._device, layout.rows, backend).Pages(cache.rows())
        self._head_shape = (layout.num_kv_heads, layout.head_dim)
        self._row_shape = (layout.rows.num_kv_heads, layout.rows.head_dim)
        self._has_parts = layout.parts > 1
        self._has_buckets = cache.num_buckets > 1

    def append(
        self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor, positions: torch.Tensor | None = None
    ) -> None:
        """Center, scale, rotate, quantize and pack K and V of new tokens, and write them to their slots.

        With H the rotation and x one row, `y = H ((x - center) * gain)`, `code = clamp(round(y / scale + zero_point),
        0, 2**bits - 1)`, and readers get `(code - zero_point) * scale`. Each (token, KV head) has its own scale and
        zero point, and each KV head its own center and gain. Source: SAW-INT4, arXiv 2604.19157. docs/format.md fixes
        the bytes; docs/decisions/0001 lists the departures.

        Args:
            k, v: [num_tokens, num_kv_heads, head_dim] bf16, fp16 or fp32, K after RoPE. Channels are contiguous; other
                strides are free.
            slot_mapping: [num_slots] int64 with num_slots <= num_tokens; a slot is `page * page_size + offset`. Rows of
                k and v from num_slots on are padding. Slots that are negative or out of range are skipped. Slots must
                not repeat.
            positions: [num_slots] int64 or longer, places of the tokens in their sequences. Needed, and read, only if K
                has several centers.

        Raises:
            LayoutError: shape, dtype or device mismatch.
            UnsupportedError: k or v would need a gradient.

        Reference: kernels.reference.Pages.append.
        """
        shape, dtype = k.shape, k.dtype
        if not (
            shape[1:] == self._head_shape
            and dtype in FLOAT_DTYPES
            and v.shape == shape
            and v.dtype is dtype
            and k.device == v.device == slot_mapping.device == self._device
            and k.stride()[-1] == v.stride()[-1] == 1
            and slot_mapping.dtype is torch.int64
            and slot_mapping.dim() == 1
            and slot_mapping.stride()[0] == 1
            and slot_mapping.shape[0] <= shape[0]
            and not (k.requires_grad or v.requires_grad)
        ):
            self._check_append(k, v, slot_mapping)
        if self._has_buckets:
            self._check_positions(slot_mapping, positions)
        if self._has_parts:
            k, v = k.reshape(-1, *self._row_shape), v.reshape(-1, *self._row_shape)
        self._kernels.append(k, v, slot_mapping, positions if self._has_buckets else None)

    def gather(self, prefixes: Prefixes, k_out: torch.Tensor, v_out: torch.Tensor, *, rotated: bool = True) -> None:
        """Decode pages of many sequences into contiguous K and V, for an engine's own prefill attention.

        With `rotated=True` rows keep the basis in which they are stored. Before attention, the caller then divides Q by
        K's gain and rotates it by K's order. After attention, the caller rotates the output by V's order, divides it by
        V's gain and adds V's center (`rotation.rotate` is its own inverse). Scores then lack `softmax_scale *
        q.k_center`. With a soft-cap, add that term to every score before the cap. With sinks and no soft-cap, subtract
        it from the query's sink. If K has several centers, the term is that of the first one, for all keys.

        Args:
            prefixes: the tokens to read and their places in the outputs; `prefixes` makes it once per step for all
                layers.
            k_out, v_out: [max_tokens, num_kv_heads, head_dim] bf16, fp16 or fp32, contiguous. Up to 256 rows behind
                the last sequence become zero, since attention may read the rest of a tile. Other rows that no token
                falls on are left as they are. Tokens beyond max_tokens are dropped.
            rotated: True leaves rows centered, scaled and rotated. False undoes all three, so K and V are those given
                to `append`, up to quantization.

        Raises:
            LayoutError: shape, dtype or device mismatch.

        Reference: kernels.reference.Pages.gather.
        """
        shape, dtype = k_out.shape, k_out.dtype
        if not (
            shape[1:] == self._head_shape
            and dtype in FLOAT_DTYPES
            and v_out.shape == shape
            and v_out.dtype is dtype
            and k_out.device == v_out.device == prefixes.block_table.device == self._device
            and k_out.is_contiguous()
            and v_out.is_contiguous()
        ):
            self._check_gather(prefixes, k_out, v_out)
        if self._has_parts:
            k_out, v_out = k_out.view(-1, *self._row_shape), v_out.view(-1, *self._row_shape)
        self._kernels.gather(prefixes, k_out, v_out, rotated)

    def _check_append(self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Make the full check of `append`'s arguments, for its message. `append` itself makes a shorter and stricter
        test.
        """
        for name, x in (("k", k), ("v", v)):
            _check(name, x, (None, *self._head_shape), FLOAT_DTYPES, self._device)
        if k.shape != v.shape or k.dtype != v.dtype:
            raise LayoutError(f"k and v: expected equal shapes and dtypes, got {_show(k)} and {_show(v)}")
        _check("slot_mapping", slot_mapping, (None,), (torch.int64,), self._device)
        if slot_mapping.shape[0] > k.shape[0]:
            raise LayoutError(
                f"slot_mapping: expected at most {k.shape[0]} slots, one for each token, got {slot_mapping.shape[0]}"
            )

    def _check_positions(self, slot_mapping: torch.Tensor, positions: torch.Tensor | None) -> None:
        if positions is None:
            raise LayoutError("positions: expected those of the tokens, because K has several centers, got none")
        _check("positions", positions, (None,), (torch.int64,), self._device)
        if positions.shape[0] < slot_mapping.shape[0]:
            raise LayoutError(
                f"positions: expected {slot_mapping.shape[0]}, one for each slot, got {positions.shape[0]}"
            )

    def _check_gather(self, prefixes: Prefixes, k_out: torch.Tensor, v_out: torch.Tensor) -> None:
        """Make the full check of `gather`'s arguments, for its message."""
        _check("block_table", prefixes.block_table, (None, None), (torch.int32,), self._device)
        for name, x in (("k_out", k_out), ("v_out", v_out)):
            _check(name, x, (None, *self._head_shape), FLOAT_DTYPES, self._device)
            if not x.is_contiguous():
                raise LayoutError(f"{name}: expected a contiguous tensor, got strides {list(x.stride())}")
        if k_out.shape != v_out.shape or k_out.dtype != v_out.dtype:
            raise LayoutError(
                f"k_out and v_out: expected equal shapes and dtypes, got {_show(k_out)} and {_show(v_out)}"
            )


class Attention(Pages):
    """One attention layer over its pages: `append` writes new tokens, a call attends, `gather` decodes prefixes."""

    def __init__(
        self,
        cache: PagedKVCache,
        *,
        num_q_heads: int,
        softmax_scale: float,
        sliding_window: int = 0,
        logit_softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        """Check the layer's constants and choose its backend.

        Args:
            cache: of the layer.
            num_q_heads: query heads of the layer, a multiple of its KV heads.
            softmax_scale: factor of scores, usually head_dim ** -0.5.
            sliding_window: tokens that a query sees, itself included; 0 is no limit.
            logit_softcap: c in `c * tanh(score / c)`; 0 is none.
            sinks: [num_q_heads] logits, one per head, that take part in the softmax and have no value. Read at each
                call.
            backend: a name from `sawkv doctor`; None chooses by device and format.

        Raises:
            LayoutError: the constants do not fit the pages.
            UnsupportedError: the named backend, or every backend, cannot serve this layer.
        """
        layout, device = cache.layout, cache.pages.device
        if num_q_heads <= 0 or num_q_heads % layout.num_kv_heads:
            raise LayoutError(f"q: expected a multiple of num_kv_heads {layout.num_kv_heads} heads, got {num_q_heads}")
        if sliding_window < 0 or logit_softcap < 0:
            raise LayoutError(
                f"expected sliding_window >= 0 and logit_softcap >= 0, got {sliding_window} and {logit_softcap}"
            )
        if sinks is not None:
            _check("sinks", sinks.detach(), (num_q_heads,), FLOAT_DTYPES, device)
        super().__init__(cache, backend)
        self._backend = select_backend(device, layout, backend)
        self._attend = self._backend.Attention(
            Layer(cache, num_q_heads, softmax_scale, sliding_window, logit_softcap, sinks)
        )
        self._q_shape = (num_q_heads, layout.head_dim)
        self._serves = (layout, device, num_q_heads, sliding_window)
        self._schedule: kernels.Schedule | None = None  # the one whose shape was checked

    def __call__(
        self, q: torch.Tensor, step: Step, out: torch.Tensor | None = None, lse: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal attention of the last tokens of each sequence over its pages.

        With y_k and y_v the stored rows, `score = softmax_scale * ((H (q / k_gain)).y_k + q.k_center)`, soft-capped as
        `cap * tanh(score / cap)`. Weights are the softmax over visible keys and the sink, and `out = (H sum(weight *
        y_v)) / v_gain + v_center`. The call does all of this, rotations included. It computes q.k_center only for a
        soft-cap, sinks or lse, or if K has several centers, because otherwise the term does not change the result.

        Args:
            q: [num_tokens, num_q_heads, head_dim] bf16, fp16 or fp32, after RoPE, not rotated, contiguous channels. The
                query tokens of sequence i are rows query_start_loc[i] to query_start_loc[i + 1]. They are the
                sequence's last tokens, so call `append` first.
            step: made for this step by the schedule of layers of this shape.
            out: [num_tokens, num_q_heads, head_dim] in q's dtype; None allocates it. Rows that belong to no sequence
                are left as they are.
            lse: [num_tokens, num_q_heads] fp32, or None. Receives the natural log-sum-exp of the scores, sink included.

        Returns:
            `out`. A query that sees no key gets zeros.

        Raises:
            LayoutError: shape, dtype or device mismatch, or a schedule for layers of another shape.
            UnsupportedError: q would need a gradient.

        Reference: kernels.reference.Attention.
        """
        shape, dtype = q.shape, q.dtype
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=q.device)
        if not (
            lse is None
            and shape[1:] == self._q_shape
            and dtype in FLOAT_DTYPES
            and out.shape == shape
            and out.dtype is dtype
            and q.device == out.device == self._device
            and q.stride()[-1] == out.stride()[-1] == 1
            and not q.requires_grad
        ):
            self._check_call(q, out, lse)
        if step.schedule is not self._schedule:
            self._take(step.schedule)
        self._attend(q, step, out, lse)
        return out

    def _check_call(self, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Make the full check of a call's arguments, for its message."""
        _check("q", q, (None, *self._q_shape), FLOAT_DTYPES, self._device)
        _check("out", out, tuple(q.shape), (q.dtype,), self._device)
        if lse is not None:
            _check("lse", lse, tuple(q.shape[:2]), (torch.float32,), self._device, any_strides=True)

    def _take(self, schedule: kernels.Schedule) -> None:
        """Check a schedule at its first use. A layer gets the same schedule at each step."""
        shape = schedule.shape
        made_for = (shape.layout, shape.device, shape.num_q_heads, shape.sliding_window)
        if made_for != self._serves or type(schedule) is not self._backend.Schedule:
            raise LayoutError(
                "schedule: expected one made for this layout, device, num_q_heads, sliding_window and backend"
            )
        self._schedule = schedule


class Schedule:
    """Spreads the attention of each step over the device. Updated once per step, for all layers of equal shape.

    Its buffers never move. So a CUDA graph may hold the layers' calls, with `update` before each replay or captured
    with them. It serves one stream at a time.
    """

    def __init__(
        self,
        layout: PageLayout,
        device: torch.device | str,
        *,
        num_q_heads: int,
        max_num_seqs: int,
        max_query_len: int,
        sliding_window: int = 0,
        backend: str | None = None,
    ) -> None:
        """Allocate buffers for the largest batch.

        Args:
            layout: of the layers' pages.
            device: of the pages.
            num_q_heads, sliding_window: of the layers, as in `Attention`.
            max_num_seqs: sequences in the largest batch.
            max_query_len: most query tokens of any sequence. The Triton backend takes 1 to 8; others any number.
            backend: as in `Attention`.

        Raises:
            LayoutError: max_query_len is not positive.
            UnsupportedError: the named backend, or every backend, cannot serve such layers.
        """
        if max_query_len < 1:
            raise LayoutError(f"expected max_query_len >= 1, got {max_query_len}")
        self.device = torch.empty(0, device=device).device  # with its index
        self.max_num_seqs = max_num_seqs
        shape = ScheduleShape(layout, self.device, num_q_heads, max_num_seqs, max_query_len, sliding_window)
        self.kernel = select_backend(self.device, layout, backend).Schedule(shape)

    def update(self, block_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> Step:
        """Enqueue the schedule for these lengths on the current stream. It holds until the next call.

        Args:
            block_table: [num_seqs, max_pages] int32, the pages of each sequence. Entries past a sequence's length may
                hold anything.
            seq_lens: [num_seqs] int32, tokens in the cache, query tokens included. 0 is allowed. The CUDA backend
                leaves out a sequence of negative length: its rows of the output stay as they are.
            query_start_loc: [num_seqs + 1] int32, non-decreasing.

        Returns:
            The step, which layers take. It refers to these tensors.

        Raises:
            LayoutError: shape, dtype or device mismatch, or more sequences than the schedule was made for.
        """
        _check_lengths(block_table, seq_lens, "query_start_loc", query_start_loc, self.device)
        if seq_lens.shape[0] > self.max_num_seqs:
            raise LayoutError(f"schedule: expected at most {self.max_num_seqs} sequences, got {seq_lens.shape[0]}")
        self.kernel.update(seq_lens, query_start_loc)
        return Step(block_table, seq_lens, query_start_loc, self.kernel)


def turns(layout: PageLayout, device: torch.device, num_q_heads: int) -> kernels.Turns | None:
    """The requests with more than a few query tokens that should read the pages, and not use `Pages.gather` and the
    engine's own attention. None if nobody measured it.

    Raises:
        UnsupportedError: no backend can serve such layers.
    """
    return select_backend(device, layout).Schedule.turns(layout, device, num_q_heads)


def prefixes(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    first_positions: torch.Tensor | None = None,
) -> Prefixes:
    """Check what `Pages.gather` reads and where it writes, once per step for all layers.

    Args:
        block_table: [num_seqs, max_pages] int32, the pages of each sequence.
        seq_lens: [num_seqs] int32, tokens to read of each sequence.
        cu_seq_lens: [num_seqs + 1] int32, where each sequence starts in the outputs; cu_seq_lens[i + 1] >=
            cu_seq_lens[i] + seq_lens[i].
        first_positions: [num_seqs] int32, position of the first token of each table in its sequence, where a sliding
            window has left out earlier pages; None is 0. Read only if K has several centers.

    Raises:
        LayoutError: shape, dtype or device mismatch.
    """
    device = block_table.device
    _check_lengths(block_table, seq_lens, "cu_seq_lens", cu_seq_lens, device)
    if first_positions is not None:
        _check("first_positions", first_positions, (seq_lens.shape[0],), (torch.int32,), device)
    return Prefixes(block_table, seq_lens, cu_seq_lens, first_positions)


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedKVCache,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Call `Pages.append` of objects kept with the cache: write K and V of new tokens to their slots. Arguments and
    errors as there.
    """
    _pages(cache, backend).append(k, v, slot_mapping, positions)


def gather(
    cache: PagedKVCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    *,
    rotated: bool = True,
    first_positions: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Call `Pages.gather` of objects kept with the cache: decode pages of many sequences. Arguments and errors as there
    and in `prefixes`.
    """
    tokens = prefixes(block_table, seq_lens, cu_seq_lens, first_positions)
    _pages(cache, backend).gather(tokens, k_out, v_out, rotated=rotated)


def decode_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    softmax_scale: float,
    max_query_len: int,
    sliding_window: int = 0,
    logit_softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Call `Attention` with a schedule of its own. Arguments, result and errors as there and in `Schedule`.

    For users and tests. Engines make the objects themselves, so that layers share the schedule of a step.
    """
    layout, device = cache.layout, cache.pages.device
    _check("q", q, (None, None, layout.head_dim), FLOAT_DTYPES, device)
    num_seqs, num_q_heads = seq_lens.shape[0] if seq_lens.ndim else 0, q.shape[1]
    layer = attention(
        cache,
        num_q_heads=num_q_heads,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        logit_softcap=logit_softcap,
        sinks=sinks,
        backend=backend,
    )
    capacity = max(64, 1 << max(0, num_seqs - 1).bit_length())
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    schedule = _own_schedule(layout, device, num_q_heads, capacity, max_query_len, sliding_window, backend, stream)
    if not num_seqs or not q.shape[0]:  # no query, but the arguments were checked
        _check_lengths(block_table, seq_lens, "query_start_loc", query_start_loc, device)
        step = Step(block_table, seq_lens, query_start_loc, schedule.kernel)
    else:
        step = schedule.update(block_table, seq_lens, query_start_loc)
    return layer(q, step, out, lse)


def attention(
    cache: PagedKVCache,
    *,
    num_q_heads: int,
    softmax_scale: float,
    sliding_window: int = 0,
    logit_softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    backend: str | None = None,
) -> Attention:
    """The `Attention` with these arguments that is kept with the cache. The first call makes it. For callers that keep
    no object of their own.
    """
    key = (num_q_heads, softmax_scale, sliding_window, logit_softcap, sinks, backend)
    found = cache.bound.get(key)
    if found is None:
        found = Attention(
            copy(cache),
            num_q_heads=num_q_heads,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            logit_softcap=logit_softcap,
            sinks=sinks,
            backend=backend,
        )
        _keep(cache, key, found)
    assert isinstance(found, Attention)
    return found


def _pages(cache: PagedKVCache, backend: str | None) -> Pages:
    """The `Pages` kept with the cache."""
    found = cache.bound.get(backend)
    if found is None:
        found = Pages(copy(cache), backend)
        _keep(cache, backend, found)
    assert isinstance(found, Pages)
    return found


def _keep(cache: PagedKVCache, key: object, value: Pages) -> None:
    """Keep `value` with the cache.

    `value` refers to a copy of the cache that shares all tensors and keeps nothing. A reference to the cache itself
    would be a cycle, which only the garbage collector frees.
    """
    if len(cache.bound) >= MAX_BOUND:
        cache.bound.clear()
    cache.bound[key] = value


@functools.lru_cache(maxsize=64)
def _own_schedule(
    layout: PageLayout,
    device: torch.device,
    num_q_heads: int,
    max_num_seqs: int,
    max_query_len: int,
    sliding_window: int,
    backend: str | None,
    stream: int,
) -> Schedule:
    """A schedule for callers that bring none. Each stream has one, because a schedule serves one launch at a time."""
    return Schedule(
        layout,
        device,
        num_q_heads=num_q_heads,
        max_num_seqs=max_num_seqs,
        max_query_len=max_query_len,
        sliding_window=sliding_window,
        backend=backend,
    )


def _check_lengths(
    block_table: torch.Tensor, seq_lens: torch.Tensor, starts_name: str, starts: torch.Tensor, device: torch.device
) -> None:
    """Check tables and lengths of one batch."""
    shape, table = seq_lens.shape, block_table.shape
    if (
        seq_lens.dtype is block_table.dtype is starts.dtype is torch.int32
        and seq_lens.device == block_table.device == starts.device == device
        and len(shape) == 1
        and len(table) == 2
        and table[0] == shape[0]
        and starts.shape == (shape[0] + 1,)
        and seq_lens.stride()[0] == block_table.stride()[1] == starts.stride()[0] == 1
    ):
        return  # otherwise the full check below gives the message
    _check("seq_lens", seq_lens, (None,), (torch.int32,), device)
    num_seqs = seq_lens.shape[0]
    _check("block_table", block_table, (num_seqs, None), (torch.int32,), device)
    _check(starts_name, starts, (num_seqs + 1,), (torch.int32,), device)


def _check(
    name: str,
    x: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    any_strides: bool = False,
) -> None:
    fits = len(x.shape) == len(shape) and all(size in (None, got) for size, got in zip(shape, x.shape, strict=True))
    if not fits or x.dtype not in dtypes:
        expected_shape = ", ".join("*" if size is None else str(size) for size in shape)
        expected_dtype = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise LayoutError(f"{name}: expected {expected_dtype} [{expected_shape}], got {_show(x)}")
    if x.device != device:
        raise LayoutError(f"{name}: expected device {device}, that of the pages, got {x.device}")
    if not any_strides and x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
        raise LayoutError(f"{name}: expected a contiguous last dimension, got strides {list(x.stride())}")
    if x.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(f"{name}: expected torch.no_grad(), got a tensor that requires a gradient: none flows")


def _show(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
