"""CUDA backend for Hopper and newer: pages of 4, 3 and 2 bits, limited by memory bandwidth. docs/kernels.md describes
the kernels.

NVRTC compiles the sources at run time, and keeps the result on disk (`runtime`), so installing needs no compiler.
The Triton backend serves all other layouts: INT8 and 16-bit formats, other head_dims, older GPUs.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch

from sawkv import kernels
from sawkv.cache import PagedKVCache
from sawkv.errors import LayoutError
from sawkv.format.layout import GPU_PAGE_SIZES, PageLayout
from sawkv.format.spec import CODEC_BITS
from sawkv.kernels import Layer, Prefixes, ScheduleShape, Step, Turns, structs
from sawkv.kernels.cuda import runtime
from sawkv.kernels.cuda.queries import SHORT_WINDOW, TURNS, QueryShape, can_extend

name = "cuda"
counts = True

MIN_CAPABILITY = (9, 0)
MIN_SHARED_BYTES = 227 << 10
HEAD_DIM_MULTIPLES = {"int4": 32, "int3": 128, "int2": 64}
"""By the codec of K or V. A quarter of a row of K is whole words (of 3 bits: threes of words), a row of V segments."""
ELEMENTS = {torch.bfloat16: "sawkv::Bfloat", torch.float16: "sawkv::Half", torch.float32: "float"}
"""The device code's names of dtypes."""
MERGE_THREADS = 256
MERGE_BLOCKS_PER_SM = 4
MAX_SCHEDULES = 4
"""Schedules for which a layer keeps kernels. An engine has one for decodes and one or two for turns. The limit exists
because a kept schedule that is no longer used still holds much memory.
"""
LOG2_E = math.log2(math.e)
AppendParams = structs.read(runtime.read_source("append.cu"), "AppendParams")
GatherParams = structs.read(runtime.read_source("gather.cu"), "GatherParams")
ScheduleParams = structs.read(runtime.read_source("schedule.cu"), "ScheduleParams")
DecodeParams = structs.read(runtime.read_source("decode.cu"), "DecodeParams")
DEBUG_DEFINES: dict[str, int | str] = {}
"""More macros of decode.cu, for `benchmarks.sanitize`."""


def unsupported_reason(device: torch.device, layout: PageLayout) -> str | None:
    """None for 4, 3 and 2 bits and a head_dim that fits them, if the GPU has Hopper's bulk copies and shared memory."""
    if device.type != "cuda" or torch.version.hip:
        return f"expected an NVIDIA GPU, got {device.type}"
    codecs = {layout.format.k_codec, layout.format.v_codec}
    if not codecs <= HEAD_DIM_MULTIPLES.keys():
        return f"expected {', '.join(HEAD_DIM_MULTIPLES)}, got {layout.format.codec}"
    multiple = max(HEAD_DIM_MULTIPLES[codec] for codec in codecs)
    if layout.head_dim % multiple or layout.head_dim < 64:
        return f"expected head_dim a multiple of {multiple} from 64 for {layout.format.codec}, got {layout.head_dim}"
    if layout.page_size not in GPU_PAGE_SIZES:
        return f"expected page_size {', '.join(map(str, GPU_PAGE_SIZES))}, got {layout.page_size}"
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < MIN_CAPABILITY or getattr(
        properties, "shared_memory_per_block_optin", 0
    ) < MIN_SHARED_BYTES:
        return f"expected Hopper, or newer with as much shared memory, got {properties.name}"
    return runtime.missing_reason()


class Pages:
    """See `sawkv.ops.Pages`."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache = cache
        self._device = cache.pages.device
        self._appends: dict[torch.dtype, _Variant] = {}
        self._gathers: dict[tuple[torch.dtype, bool], _Variant] = {}

    def append(
        self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor, positions: torch.Tensor | None
    ) -> None:
        """See `sawkv.ops.append`."""
        num_tokens = slot_mapping.shape[0]
        if not num_tokens:
            return
        k, v = _vectorizable(k), _vectorizable(v)
        variant = self._appends.get(k.dtype) or self._prepare_append(k.dtype)
        params = AppendParams.from_buffer_copy(variant.params)
        params.slot_mapping, params.num_tokens = slot_mapping.data_ptr(), num_tokens
        if positions is not None:
            params.positions = positions.data_ptr()
        x, token_stride, head_stride = params.x, params.token_stride, params.head_stride
        # One by one: a tuple takes ctypes three times as long.
        x[0], x[1] = k.data_ptr(), v.data_ptr()
        token_stride[0], head_stride[0], _ = k.stride()
        token_stride[1], head_stride[1], _ = v.stride()
        num_kv_heads = self._cache.layout.num_kv_heads
        blocks, kernel, many = _divide_up(num_tokens, variant.tokens_per_block), variant.kernel, variant.many
        if many is not None and 2 * num_kv_heads * blocks > many.resident_blocks:
            blocks = min(
                _divide_up(num_tokens, many.tokens_per_block), max(many.resident_blocks // (2 * num_kv_heads), 1)
            )
            kernel = many.kernel
        kernel.launch((blocks, num_kv_heads, 2), variant.threads, _stream(self._device), params, dependent=True)

    def gather(self, prefixes: Prefixes, k_out: torch.Tensor, v_out: torch.Tensor, rotated: bool) -> None:
        """See `sawkv.ops.gather`."""
        num_tokens, num_seqs = k_out.shape[0], prefixes.seq_lens.shape[0]
        if not num_tokens or not num_seqs:
            return
        variant = self._gathers.get((k_out.dtype, rotated)) or self._prepare_gather(k_out.dtype, rotated)
        params = GatherParams.from_buffer_copy(variant.params)
        params.block_table, params.table_stride = prefixes.block_table.data_ptr(), prefixes.block_table.stride(0)
        params.seq_lens, params.cu_seq_lens = prefixes.seq_lens.data_ptr(), prefixes.cu_seq_lens.data_ptr()
        params.first_positions = _pointer(prefixes.first_positions)
        params.k_out, params.v_out = k_out.data_ptr(), v_out.data_ptr()
        params.num_seqs, params.max_tokens = num_seqs, num_tokens
        blocks = _divide_up(num_tokens, variant.tokens_per_block) * self._cache.layout.num_kv_heads
        variant.kernel.launch((blocks, 1, 1), variant.threads, _stream(self._device), params, dependent=True)

    def _prepare_append(self, dtype: torch.dtype) -> _Variant:
        """The kernel for rows of `dtype`, with the parameters that the cache determines."""
        cache, layout = self._cache, self._cache.layout
        centers, gains, _, weights, steps = zip(*cache.constants, strict=True)
        params = AppendParams(pages=_pointer(cache.pages), page_stride=cache.pages.stride(0), num_slots=cache.num_slots)
        params.num_buckets = cache.num_buckets
        params.counters = _pointer(cache.counters)
        params.center, params.gain = tuple(map(_pointer, centers)), tuple(map(_pointer, gains))
        params.weights, params.step = tuple(map(_pointer, weights)), tuple(map(_pointer, steps))
        does = {"GAIN": _are_there(gains), "FEEDBACK": _are_there(weights), "COUNT": cache.counters is not None}
        does["BY_BUCKET"] = cache.num_buckets > 1
        orders = layout.k_rotation_order, layout.v_rotation_order
        self._appends[dtype] = _Variant.load(
            "append", _page_defines(layout, dtype, *orders), does, self._device, params
        )
        return self._appends[dtype]

    def _prepare_gather(self, dtype: torch.dtype, rotated: bool) -> _Variant:
        """The kernel for outputs of `dtype`, with the parameters that the cache determines."""
        cache, layout = self._cache, self._cache.layout
        added = cache.added_by_gather(rotated)
        inverses = (None, None) if rotated else tuple(constants.gain_inverse for constants in cache.constants)
        params = GatherParams(
            pages=_pointer(cache.pages), page_stride=cache.pages.stride(0), num_kv_heads=layout.num_kv_heads
        )
        params.num_buckets = cache.num_buckets
        params.center, params.gain_inverse = tuple(map(_pointer, added)), tuple(map(_pointer, inverses))
        orders = (0, 0) if rotated else (layout.k_rotation_order, layout.v_rotation_order)
        does = {"GAIN": _are_there(inverses), "BY_BUCKET": cache.num_buckets > 1}
        variant = _Variant.load("gather", _page_defines(layout, dtype, *orders), does, self._device, params)
        self._gathers[dtype, rotated] = variant
        return variant


class _ManyTokens(NamedTuple):
    """append with feedback for more tokens than blocks of its other kernel fit on the GPU at once: blocks stay."""

    kernel: runtime.Kernel
    tokens_per_block: int
    resident_blocks: int


class _Variant(NamedTuple):
    """append or gather compiled for a layout and dtype, and the bytes of its parameters, with zeros for those of each
    call.

    A call sets its own in a copy, so threads may share this object.
    """

    kernel: runtime.Kernel
    params: bytes
    threads: int
    tokens_per_block: int
    many: _ManyTokens | None = None

    @classmethod
    def load(
        cls,
        operation: str,
        defines: dict[str, int | str],
        does: dict[str, bool],
        device: torch.device,
        params: ctypes.Structure,
    ) -> _Variant:
        source, name = f"{operation}.cu", f"sawkv_{operation}"
        defines = defines | {macro: int(value) for macro, value in does.items()}
        kernel = runtime.load(source, name, defines, device)
        many = None
        if does.get("FEEDBACK"):
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
            many = _ManyTokens(
                runtime.load(source, f"{name}_many", defines, device),
                kernel.read_constant("sawkv_many_tokens_per_block"),
                kernel.read_constant("sawkv_blocks_per_sm") * num_sms,
            )
        threads, tokens_per_block = map(kernel.read_constant, ("sawkv_threads", "sawkv_tokens_per_block"))
        return cls(kernel, bytes(params), threads, tokens_per_block, many)


class Schedule(kernels.Schedule):
    """The output of the schedule kernel, and memory for partial results."""

    @staticmethod
    def turns(layout: PageLayout, device: torch.device, num_q_heads: int) -> Turns | None:
        """See `kernels.Schedule.turns`."""
        if not can_extend(layout, device):
            return None
        group = num_q_heads // layout.num_kv_heads
        limits = tuple((rows // group, least) for rows, least in TURNS.items() if rows >= group)
        shapes = [(n, QueryShape.of(group, n, layout.head_dim, extends=True)) for n, _ in limits]
        # Query rows that are split alike share the schedule of the most query tokens: units are as many as they need.
        query_lens = {(shape.kernel, shape.chunk_rows): n for n, shape in shapes}
        return Turns(tuple(query_lens.values()), limits)

    def __init__(self, shape: ScheduleShape) -> None:
        super().__init__(shape)
        layout, device = shape.layout, shape.device
        group, extends = shape.num_q_heads // layout.num_kv_heads, can_extend(layout, device)
        bits = CODEC_BITS[layout.format.k_codec] + CODEC_BITS[layout.format.v_codec]
        has_short_units = bits < 8 or 0 < shape.sliding_window <= SHORT_WINDOW
        self.queries = QueryShape.of(group, shape.max_query_len, layout.head_dim, extends, has_short_units)
        self.units_per_seq = layout.num_kv_heads * self.queries.row_groups
        self.num_blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self.kernel = runtime.load("schedule.cu", "sawkv_schedule", {"HEAD_DIM": layout.head_dim}, device)
        self.tile_tokens = self.kernel.read_constant("sawkv_tile_tokens")
        max_split_chunks = self.queries.max_split_chunks(self.num_blocks)
        # One claim per block goes beyond the last chunk.
        max_chunks = max_split_chunks + shape.max_num_seqs * self.units_per_seq + self.num_blocks

        def words(*sizes: int) -> torch.Tensor:
            return torch.zeros(sizes, dtype=torch.int32, device=device)

        self.header, self.chunks, self.splits = words(8), words(max_chunks, 8), words(max_split_chunks // 2, 8)
        self.partials = torch.empty(max_split_chunks, self.queries.chunk_rows, layout.head_dim, device=device)
        self.partial_stats = torch.empty(max_split_chunks, self.queries.chunk_rows, 2, device=device)

    def update(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        """See `kernels.Schedule.update`."""
        num_seqs = seq_lens.shape[0]
        params = ScheduleParams(
            *map(_pointer, (seq_lens, query_start_loc, self.header, self.chunks, self.splits)),
            num_seqs,
            self.shape.layout.num_kv_heads,
            self.queries.group,
            self.queries.chunk_rows,
            self.queries.row_groups,
            self.tile_tokens,
            self.queries.tiles_per_chunk,
            self.shape.sliding_window,
            self.num_blocks,
            self.queries.max_chunks_per_block,
            self.queries.units,
        )
        self.kernel.launch((1, 1, 1), 1024, _stream(seq_lens.device), params, shared_bytes=5 * 4 * (num_seqs + 1))


class Attention:
    """See `sawkv.ops.Attention`."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._device = layer.cache.pages.device
        self._variants: dict[tuple[Schedule, torch.dtype, bool], _DecodeVariant] = {}

    def __call__(self, q: torch.Tensor, step: Step, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """See `sawkv.ops.Attention.__call__`."""
        num_seqs, schedule, sinks = step.seq_lens.shape[0], step.schedule, self._layer.sinks
        if not num_seqs or not q.shape[0]:
            return
        assert isinstance(schedule, Schedule)
        if not _is_vectorizable(out):
            raise LayoutError(
                f"out: expected rows aligned to 16 bytes, got strides {list(out.stride())} at address"
                f" {out.data_ptr():#x}"
            )
        q = _vectorizable(q)
        key = schedule, q.dtype, lse is not None
        variant = self._variants.get(key) or self._prepare(*key)
        params = DecodeParams.from_buffer_copy(variant.params)
        params.q, params.out = q.data_ptr(), out.data_ptr()
        params.block_table, params.table_stride = step.block_table.data_ptr(), step.block_table.stride(0)
        params.num_seqs, params.table_columns = num_seqs, step.block_table.shape[1]
        params.q_token_stride, params.q_head_stride, _ = q.stride()
        params.out_token_stride, params.out_head_stride, _ = out.stride()
        if sinks is not None:
            sinks = sinks.float().contiguous()  # in each call, because an engine may overwrite the weights in place
            params.sinks = sinks.data_ptr()
        if lse is not None:
            params.lse = lse.data_ptr()
            params.lse_token_stride, params.lse_head_stride = lse.stride()
        stream = _stream(self._device)
        variant.decode.launch(
            (schedule.num_blocks, 1, 1), variant.threads, stream, params, variant.shared_bytes, dependent=True
        )
        merge_blocks = min(num_seqs * variant.merge_rows_per_seq, MERGE_BLOCKS_PER_SM * schedule.num_blocks)
        variant.merge.launch((merge_blocks, 1, 1), MERGE_THREADS, stream, params, dependent=True)

    def _prepare(self, schedule: Schedule, dtype: torch.dtype, gives_lse: bool) -> _DecodeVariant:
        """The kernels for queries of `dtype`, with the parameters that layer and schedule determine."""
        layer, cache, layout, queries = self._layer, self._layer.cache, self._layer.cache.layout, schedule.queries
        centers, _, inverses, _, _ = zip(*cache.constants, strict=True)
        softcap = layer.logit_softcap
        params = DecodeParams(
            page_stride=cache.pages.stride(0), window=layer.sliding_window, softcap_log2=softcap * LOG2_E
        )
        params.num_buckets, params.num_kv_heads = cache.num_buckets, layout.num_kv_heads
        params.num_pages = cache.pages.shape[0]
        params.scale_log2 = (2 * layer.softmax_scale / softcap if softcap else layer.softmax_scale) * LOG2_E
        params.pages, params.header, params.chunks = map(_pointer, (cache.pages, schedule.header, schedule.chunks))
        params.splits, params.partials, params.partial_stats = map(
            _pointer, (schedule.splits, schedule.partials, schedule.partial_stats)
        )
        params.k_center, params.v_center = map(_pointer, centers)
        params.k_gain_inverse, params.v_gain_inverse = map(_pointer, inverses)
        family = "a" if queries.kernel == "extend" else ""
        defines = _page_defines(layout, dtype, layout.k_rotation_order, layout.v_rotation_order) | {
            **queries.defines,
            "GAIN": int(_are_there(inverses)),
            "SOFTCAP": int(softcap > 0),
            "OFFSET": int(layer.adds_offsets or (gives_lse and centers[0] is not None)),
            "BY_BUCKET": int(cache.num_buckets > 1),
            **DEBUG_DEFINES,
        }
        decode, merge = (
            runtime.load(f"{queries.kernel}.cu", f"sawkv_{kernel}", defines, self._device, family)
            for kernel in (queries.kernel, "merge")
        )
        variant = _DecodeVariant(
            decode,
            merge,
            bytes(params),
            decode.read_constant("sawkv_threads"),
            decode.read_constant("sawkv_shared_bytes"),
            schedule.units_per_seq * queries.rows * queries.row_blocks,
        )
        newest = list(dict.fromkeys(key[0] for key in self._variants if key[0] is not schedule))[1 - MAX_SCHEDULES :]
        kept = {key: known for key, known in self._variants.items() if key[0] in (*newest, schedule)}
        self._variants = kept | {(schedule, dtype, gives_lse): variant}
        return variant


class _DecodeVariant(NamedTuple):
    """decode and merge compiled for a layer and a schedule, and the bytes of their parameters, with zeros for those of
    a call.
    """

    decode: runtime.Kernel
    merge: runtime.Kernel
    params: bytes
    threads: int
    shared_bytes: int
    merge_rows_per_seq: int


def _page_defines(layout: PageLayout, dtype: torch.dtype, k_order: int, v_order: int) -> dict[str, int | str]:
    return {
        "HEAD_DIM": layout.head_dim,
        "PARTS": layout.parts,
        "PAGE_SIZE": layout.page_size,
        "K_BITS": CODEC_BITS[layout.format.k_codec],
        "V_BITS": CODEC_BITS[layout.format.v_codec],
        "K_ORDER": k_order,
        "V_ORDER": v_order,
        "ELEMENT": ELEMENTS[dtype],
    }


def _are_there(of_k_and_v: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether K or V, or both, have this constant."""
    return any(x is not None for x in of_k_and_v)


def _is_vectorizable(x: torch.Tensor) -> bool:
    """Whether all rows of [num_tokens, num_heads, head_dim] are aligned to 16 bytes."""
    token_stride, head_stride, _ = x.stride()
    return not (x.data_ptr() | (token_stride | head_stride) * x.element_size()) & 15  # sizes are powers of two


def _vectorizable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it that vector loads can read."""
    return x if _is_vectorizable(x) else x.clone(memory_format=torch.contiguous_format)


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _stream(device: torch.device) -> int:
    # The function that torch.cuda.current_stream wraps; five times faster.
    return torch._C._cuda_getCurrentRawStream(device.index)


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)
