"""The kernels on plain tensors: check the arguments, choose a backend, run it.

Data flow: K and V of new tokens -> `append` -> pages; Q and pages -> `Attention` -> output; pages -> `gather` -> 16-bit
K and V.

What stays is said once. A layer has one `Attention` (or `Pages`, if nothing attends to them): its constants are checked
and its backend is chosen when it is made. A step has one `Step`, made by `Schedule.update` and read by all layers that
are alike:

    # once a layer
    attention = Attention(cache, num_q_heads=32, softmax_scale=128**-0.5)
    # once for layers that are alike
    schedule = Schedule(layout, device, num_q_heads=32, max_num_seqs=64, max_query_len=1)
    # once a step
    step = schedule.update(block_table, seq_lens, query_start_loc)
    # each layer and step
    attention.append(k, v, slot_mapping)
    attention(q, step, out)

The functions `append`, `decode_attention` and `gather` do all this in one call.

Only `append` mutates the cache. On a GPU no call of a layer synchronizes, allocates or depends on lengths on the host
(CUDA-graph safe).
"""

from __future__ import annotations

import functools
from copy import copy

import torch

from sawkv import kernels
from sawkv.cache import PagedKVCache
from sawkv.errors import LayoutError
from sawkv.format.layout import PageLayout
from sawkv.kernels import Layer, Prefixes, ScheduleShape, Step, select_backend

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_BOUND = 8
"""Objects that are kept with a cache for the functions below: callers that change constants from call to call get new
ones.
"""


class Pages:
    """`append` and `gather` for the pages of one layer."""

    def __init__(self, cache: PagedKVCache, backend: str | None = None) -> None:
        """
        Args:
            cache: of the layer. `append` mutates it.
            backend: a name from `sawkv doctor`; None chooses by device and format.

        Raises:
            UnsupportedError: no backend, or not the named one, can run this.
        """
        layout = cache.layout
        self.cache = cache
        self._device = cache.pages.device
        self._backend = select_backend(self._device, layout, backend)
        self._kernels = self._backend.Pages(cache)
        self._row_shape = (layout.num_kv_heads, layout.head_dim)

    def append(self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Center, multiply by gains, rotate, quantize, pack and write new tokens' K and V into their slots.

        y = H ((x - center) * gain);  code = clamp(round(y / scale + zero_point), 0, 15);  y ~ (code - zero_point) *
        scale. Scale and zero point are those of a (token, KV head), centers and gains of a KV head.
        Source: SAW-INT4, arXiv 2604.19157. Bytes and departures: docs/format.md.

        Args:
            k, v: [num_tokens, num_kv_heads, head_dim] bf16, fp16 or fp32, K after RoPE; any strides with contiguous
            channels.
            slot_mapping: [num_slots <= num_tokens] int64, `page * page_size + offset`; rows of k and v beyond it are
                padding. Negative and out-of-range slots are skipped. Slots must not repeat.

        Raises:
            LayoutError: shape, dtype or device mismatch.

        Reference: kernels.reference.Pages.append.
        """
        shape, dtype = k.shape, k.dtype
        if not (
            shape[1:] == self._row_shape
            and dtype in FLOAT_DTYPES
            and v.shape == shape
            and v.dtype is dtype
            and k.device == v.device == slot_mapping.device == self._device
            and k.stride()[-1] == v.stride()[-1] == 1
            and slot_mapping.dtype is torch.int64
            and slot_mapping.dim() == 1
            and slot_mapping.stride()[0] == 1
            and slot_mapping.shape[0] <= shape[0]
        ):
            self._check_append(k, v, slot_mapping)
        self._kernels.append(k, v, slot_mapping)

    def gather(self, prefixes: Prefixes, k_out: torch.Tensor, v_out: torch.Tensor, *, rotated: bool = True) -> None:
        """Decode the pages of many sequences into contiguous K and V, for an engine's own prefill attention.

        Rows that stay as they are stored need Q divided by K's gains and rotated by K's order before the attention, and
        its output rotated by V's order and divided by V's gains after it (`rotation.rotate` is its own inverse), before
        V's center is added. Scores of such rows lack softmax_scale * q.k_center: whoever has a soft-cap adds it to
        every score before the cap; whoever has sinks and none subtracts it from the query's sink.

        Args:
            prefixes: which tokens, and where they go; from `prefixes`, made once for all layers of a step.
            k_out, v_out: [max_tokens, num_kv_heads, head_dim] bf16, fp16 or fp32, contiguous. Filled up to what is
            gathered; tokens that
                would fall past max_tokens are dropped.
            rotated: leave the rows as they are stored: centered, multiplied by gains and rotated; otherwise give K and
                V as `append` got them, quantized.

        Raises:
            LayoutError: shape, dtype or device mismatch.

        Reference: kernels.reference.Pages.gather.
        """
        shape, dtype = k_out.shape, k_out.dtype
        if not (
            shape[1:] == self._row_shape
            and dtype in FLOAT_DTYPES
            and v_out.shape == shape
            and v_out.dtype is dtype
            and k_out.device == v_out.device == prefixes.block_table.device == self._device
            and k_out.is_contiguous()
            and v_out.is_contiguous()
        ):
            self._check_gather(prefixes, k_out, v_out)
        self._kernels.gather(prefixes, k_out, v_out, rotated)

    def _check_append(self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """What `append` demands, in full: its own test is short, and stricter."""
        for name, x in (("k", k), ("v", v)):
            _check(name, x, (None, *self._row_shape), FLOAT_DTYPES, self._device)
        if k.shape != v.shape or k.dtype != v.dtype:
            raise LayoutError(f"k and v: expected equal shapes and dtypes, got {_show(k)} and {_show(v)}")
        _check("slot_mapping", slot_mapping, (None,), (torch.int64,), self._device)
        if slot_mapping.shape[0] > k.shape[0]:
            raise LayoutError(
                f"slot_mapping: expected at most {k.shape[0]} slots, one for each token, got {slot_mapping.shape[0]}"
            )

    def _check_gather(self, prefixes: Prefixes, k_out: torch.Tensor, v_out: torch.Tensor) -> None:
        """What `gather` demands, in full."""
        _check("block_table", prefixes.block_table, (None, None), (torch.int32,), self._device)
        for name, x in (("k_out", k_out), ("v_out", v_out)):
            _check(name, x, (None, *self._row_shape), FLOAT_DTYPES, self._device)
            if not x.is_contiguous():
                raise LayoutError(f"{name}: expected a contiguous tensor, got strides {list(x.stride())}")
        if k_out.shape != v_out.shape or k_out.dtype != v_out.dtype:
            raise LayoutError(
                f"k_out and v_out: expected equal shapes and dtypes, got {_show(k_out)} and {_show(v_out)}"
            )


class Attention(Pages):
    """One attention layer over its pages: writes new tokens (`append`), attends to all (a call), decodes prefixes
    (`gather`).
    """

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
        """
        Args:
            cache: of the layer.
            num_q_heads: query heads of the layer, a multiple of its KV heads.
            softmax_scale: usually head_dim ** -0.5.
            sliding_window: a query sees this many tokens, itself included; 0 is no limit.
            logit_softcap: 0 is none.
            sinks: [num_q_heads], a logit per head that takes part in the softmax and carries no value. Read at each
                call.
            backend: a name from `sawkv doctor`; None chooses by device and format.

        Raises:
            LayoutError: constants that do not fit the pages.
            UnsupportedError: no backend, or not the named one, can run this.
        """
        layout, device = cache.layout, cache.pages.device
        if num_q_heads <= 0 or num_q_heads % layout.num_kv_heads:
            raise LayoutError(f"q: expected a multiple of num_kv_heads {layout.num_kv_heads} heads, got {num_q_heads}")
        if sliding_window < 0 or logit_softcap < 0:
            raise LayoutError(
                f"expected sliding_window >= 0 and logit_softcap >= 0, got {sliding_window} and {logit_softcap}"
            )
        if sinks is not None:
            _check("sinks", sinks, (num_q_heads,), FLOAT_DTYPES, device)
        super().__init__(cache, backend)
        self._attend = self._backend.Attention(
            Layer(cache, num_q_heads, softmax_scale, sliding_window, logit_softcap, sinks)
        )
        self._q_shape = (num_q_heads, layout.head_dim)
        self._serves = (layout, device, num_q_heads, sliding_window)
        self._schedule: kernels.Schedule | None = None  # the one that was found to be of such layers

    def __call__(
        self, q: torch.Tensor, step: Step, out: torch.Tensor | None = None, lse: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal attention of each sequence's last tokens over its pages, read as they are stored.

        score = softmax_scale * ((H (q / k_gain)).y_k + q.k_center), soft-capped as `cap * tanh(score / cap)`; weights
        are the softmax over the visible keys (and the sink); out = (H sum(weight * y_v)) / v_gain + v_center, with y_k
        and y_v the rows as they are stored. All that is done to Q and to the output happens here. q.k_center is
        computed only for a soft-cap, sinks or lse: else it changes nothing.

        Args:
            q: [num_tokens, num_q_heads, head_dim] bf16, fp16 or fp32, after RoPE, not rotated; contiguous channels. The
                query tokens of sequence i are rows query_start_loc[i] to query_start_loc[i + 1], and are its last
                tokens: append comes first.
            step: from the schedule of layers such as this one, updated with this step's lengths.
            out: [num_tokens, num_q_heads, head_dim] of q's dtype; allocated if None. Rows of no sequence are left as
                they are.
            lse: [num_tokens, num_q_heads] fp32, filled with the natural log-sum-exp of the scores as above (sink
                included).

        Returns:
            `out`. A query that sees no key gives zeros.

        Raises:
            LayoutError: shape, dtype or device mismatch, or a schedule of other layers.

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
        ):
            self._check_call(q, out, lse)
        if step.schedule is not self._schedule:
            self._take(step.schedule)
        self._attend(q, step, out, lse)
        return out

    def _check_call(self, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """What a call demands, in full."""
        _check("q", q, (None, *self._q_shape), FLOAT_DTYPES, self._device)
        _check("out", out, tuple(q.shape), (q.dtype,), self._device)
        if lse is not None:
            _check("lse", lse, tuple(q.shape[:2]), (torch.float32,), self._device, any_strides=True)

    def _take(self, schedule: kernels.Schedule) -> None:
        """Check a schedule at its first use. Layers get the same one at each step."""
        shape = schedule.shape
        made_for = (shape.layout, shape.device, shape.num_q_heads, shape.sliding_window)
        if made_for != self._serves or type(schedule) is not self._backend.Schedule:
            raise LayoutError(
                "schedule: expected one made for this layout, device, num_q_heads, sliding_window and backend"
            )
        self._schedule = schedule


class Schedule:
    """How the attention of each step is spread over a device: updated once a step, for all layers that are alike.

    It has its buffers for good, so that a CUDA graph may hold the layers' calls while `update` runs before each replay,
    or is captured with them. It serves one stream at a time.
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
        """
        Args:
            layout: of the layers' pages.
            device: of the pages.
            num_q_heads, sliding_window: of the layers, as of `Attention`.
            max_num_seqs: sequences in the largest batch.
            max_query_len: the most query tokens any sequence has. GPU backends take 1 to 8; CPU backends any number.
            backend: as in `Attention`.

        Raises:
            LayoutError: max_query_len is not positive.
            UnsupportedError: no backend, or not the named one, can run this.
        """
        if max_query_len < 1:
            raise LayoutError(f"expected max_query_len >= 1, got {max_query_len}")
        self.device = torch.empty(0, device=device).device  # with its index
        self.max_num_seqs = max_num_seqs
        shape = ScheduleShape(layout, self.device, num_q_heads, max_num_seqs, max_query_len, sliding_window)
        self.kernel = select_backend(self.device, layout, backend).Schedule(shape)

    def update(self, block_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> Step:
        """Enqueue the schedule of these lengths on the current stream. It holds until the next call.

        Args:
            block_table: [num_seqs, max_pages] int32, page of each `page_size` tokens. Entries past a sequence's length
                may hold anything.
            seq_lens: [num_seqs] int32, tokens in the cache, query tokens included. 0 is allowed.
            query_start_loc: [num_seqs + 1] int32, non-decreasing from 0.

        Returns:
            What layers take: these tensors, and the schedule.

        Raises:
            LayoutError: shape, dtype or device mismatch, or more sequences than the schedule was made for.
        """
        _check_lengths(block_table, seq_lens, "query_start_loc", query_start_loc, self.device)
        if seq_lens.shape[0] > self.max_num_seqs:
            raise LayoutError(f"schedule: expected at most {self.max_num_seqs} sequences, got {seq_lens.shape[0]}")
        self.kernel.update(seq_lens, query_start_loc)
        return Step(block_table, seq_lens, query_start_loc, self.kernel)


def prefixes(block_table: torch.Tensor, seq_lens: torch.Tensor, cu_seq_lens: torch.Tensor) -> Prefixes:
    """What `Pages.gather` reads, and where it puts it: checked once for all layers of a step.

    Args:
        block_table: [num_seqs, max_pages] int32.
        seq_lens: [num_seqs] int32, tokens to read of each sequence.
        cu_seq_lens: [num_seqs + 1] int32, where each sequence starts in the outputs; cu_seq_lens[i + 1] >=
            cu_seq_lens[i] + seq_lens[i].

    Raises:
        LayoutError: shape, dtype or device mismatch.
    """
    _check_lengths(block_table, seq_lens, "cu_seq_lens", cu_seq_lens, block_table.device)
    return Prefixes(block_table, seq_lens, cu_seq_lens)


def append(
    k: torch.Tensor, v: torch.Tensor, cache: PagedKVCache, slot_mapping: torch.Tensor, *, backend: str | None = None
) -> None:
    """`Pages.append` in one call: write new tokens' K and V into their slots. Arguments and errors as there."""
    _pages(cache, backend).append(k, v, slot_mapping)


def gather(
    cache: PagedKVCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    *,
    rotated: bool = True,
    backend: str | None = None,
) -> None:
    """`Pages.gather` in one call: decode the pages of many sequences. Arguments and errors as there and
    of `prefixes`.
    """
    _pages(cache, backend).gather(prefixes(block_table, seq_lens, cu_seq_lens), k_out, v_out, rotated=rotated)


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
    """`Attention` in one call, with a schedule of its own. Arguments, result and errors as there and of `Schedule`.

    For users and tests. An engine makes the objects, so that layers share the step's schedule.
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
    if not num_seqs or not q.shape[0]:  # nothing to attend with, but arguments to check
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
    """The `Attention` of these arguments that is kept with the cache; made at the first call. For callers that keep
    caches alone.
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
    """The `Pages` that are kept with the cache."""
    found = cache.bound.get(backend)
    if found is None:
        found = Pages(copy(cache), backend)
        _keep(cache, backend, found)
    assert isinstance(found, Pages)
    return found


def _keep(cache: PagedKVCache, key: object, value: Pages) -> None:
    """`value` holds a copy of the cache, which shares all tensors and has kept nothing: else both would live until
    garbage is collected.
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
    """For callers that bring no schedule. One for each stream, because a schedule serves one launch at a time."""
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
    """Tables and lengths of one batch."""
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
        return  # else what is demanded, in full
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


def _show(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
