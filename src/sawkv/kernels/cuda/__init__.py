"""CUDA backend for Hopper and newer: INT4 pages at the speed of memory. docs/kernels.md describes the kernels.

Source is compiled at run time by NVRTC and kept on disk (`runtime`), so that installing needs no compiler. What is not covered here (INT8
and 16-bit formats, head_dim that is not a multiple of 32, older GPUs) is the Triton backend's.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch

from sawkv.cache import PagedKVCache
from sawkv.errors import LayoutError
from sawkv.format.layout import GPU_PAGE_SIZES, PageLayout
from sawkv.kernels import DecodePlan
from sawkv.kernels.cuda import runtime

name = "cuda"
counts = True

MIN_CAPABILITY = (9, 0)
MIN_SHARED_BYTES = 227 << 10
ELEMENTS = {torch.bfloat16: "sawkv::Bfloat", torch.float16: "sawkv::Half", torch.float32: "float"}
"""The device code's names of dtypes."""
MAX_CHUNKS_PER_BLOCK = 8
TILES_PER_CHUNK = 50  # where blocks get few
MERGE_THREADS = 256
MERGE_BLOCKS_PER_SM = 4
LOG2_E = math.log2(math.e)
DEBUG_DEFINES: dict[str, int | str] = {}
"""More macros of decode.cu, for `benchmarks.sanitize`."""


def unsupported_reason(device: torch.device, layout: PageLayout) -> str | None:
    """None for INT4 with head_dim a multiple of 32 on a GPU with Hopper's bulk copies and shared memory."""
    if device.type != "cuda" or torch.version.hip:
        return f"expected an NVIDIA GPU, got {device.type}"
    if layout.format.codec != "int4":
        return f"expected int4, got {layout.format.codec}"
    if layout.head_dim % 32 or not 64 <= layout.head_dim <= 256:
        return f"expected head_dim a multiple of 32 from 64 to 256, got {layout.head_dim}"
    if layout.page_size not in GPU_PAGE_SIZES:
        return f"expected page_size {', '.join(map(str, GPU_PAGE_SIZES))}, got {layout.page_size}"
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < MIN_CAPABILITY or getattr(properties, "shared_memory_per_block_optin", 0) < MIN_SHARED_BYTES:
        return f"expected Hopper, or newer with as much shared memory, got {properties.name}"
    return runtime.missing_reason()


def append(k: torch.Tensor, v: torch.Tensor, cache: PagedKVCache, slot_mapping: torch.Tensor) -> None:
    """See `sawkv.ops.append`."""
    layout = cache.layout
    num_tokens = slot_mapping.shape[0]
    if not num_tokens:
        return
    k, v = _vectorizable(k), _vectorizable(v)
    centers, gains, _, weights, steps = zip(*cache.constants, strict=True)
    (k_token_stride, k_head_stride, _), (v_token_stride, v_head_stride, _) = k.stride(), v.stride()
    params = _AppendParams(
        *map(_pointer, (slot_mapping, cache.pages, cache.counters, k, v, *centers, *gains, *weights, *steps)),
        *(k_token_stride, v_token_stride, k_head_stride, v_head_stride),
        cache.pages.stride(0),
        cache.num_slots,
        num_tokens,
    )
    orders = layout.k_rotation_order, layout.v_rotation_order
    does = _are_there(gains), _are_there(weights), cache.counters is not None
    kernel, threads, tokens_per_block = _page_kernel("append", layout, k.dtype, *orders, k.device, *does)
    grid = (_divide_up(num_tokens, tokens_per_block), layout.num_kv_heads, 2)
    kernel.launch(grid, threads, _stream(k.device), params, dependent=True)


def gather(
    cache: PagedKVCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    *,
    rotated: bool,
) -> None:
    """See `sawkv.ops.gather`."""
    layout = cache.layout
    if not k_out.shape[0] or not seq_lens.shape[0]:
        return
    centers, inverses = ((None, None),) * 2 if rotated else (tuple(x[i] for x in cache.constants) for i in (0, 2))
    params = _GatherParams(
        *map(_pointer, (cache.pages, block_table, seq_lens, cu_seq_lens)),
        *map(_pointer, (*centers, *inverses, k_out, v_out)),
        cache.pages.stride(0),
        block_table.stride(0),
        seq_lens.shape[0],
        k_out.shape[0],
        layout.num_kv_heads,
    )
    orders = (0, 0) if rotated else (layout.k_rotation_order, layout.v_rotation_order)
    kernel, threads, tokens_per_block = _page_kernel("gather", layout, k_out.dtype, *orders, k_out.device, _are_there(inverses))
    grid = (_divide_up(k_out.shape[0], tokens_per_block) * layout.num_kv_heads, 1, 1)
    kernel.launch(grid, threads, _stream(k_out.device), params, dependent=True)


@dataclass(frozen=True)
class QueryShape:
    """How query rows of one (sequence, KV head) are spread: groups that read the pages apart, blocks for different warps, tiles of 8."""

    group: int
    rows: int
    column_tiles: int
    row_blocks: int
    row_groups: int

    @classmethod
    def of(cls, group: int, max_query_len: int, head_dim: int) -> QueryShape:
        total = group * max_query_len
        column_tiles = 1 if total <= 8 or head_dim > 128 else 2
        columns = 8 * column_tiles
        row_blocks = 1
        while row_blocks < 8 and row_blocks * columns < total:
            row_blocks *= 2
        return cls(group, min(total, columns), column_tiles, row_blocks, _divide_up(total, row_blocks * columns))


class CudaPlan(DecodePlan):
    """What the schedule kernel writes, with room for partial results. See `sawkv.ops.make_decode_plan`."""

    def __init__(
        self, layout: PageLayout, device: torch.device, num_q_heads: int, max_num_seqs: int, max_query_len: int, sliding_window: int
    ) -> None:
        self.key = (num_q_heads, max_query_len, sliding_window)
        self.layout = layout
        self.device = device
        self.max_num_seqs = max_num_seqs
        self.sliding_window = sliding_window
        self.shape = QueryShape.of(num_q_heads // layout.num_kv_heads, max_query_len, layout.head_dim)
        self.units_per_seq = layout.num_kv_heads * self.shape.row_groups
        self.num_blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self.kernels = functools.cache(self._load_kernels)
        self.schedule = runtime.load("schedule.cu", "sawkv_schedule", {"HEAD_DIM": layout.head_dim}, device)
        self.tile_tokens = self.schedule.read_constant("sawkv_tile_tokens")
        chunk_rows = 8 * self.shape.column_tiles * self.shape.row_blocks
        max_split_chunks = self.num_blocks * MAX_CHUNKS_PER_BLOCK * 3 // 2  # units in two or more pieces, their number rounded: 4/3 at most
        max_chunks = max_split_chunks + max_num_seqs * self.units_per_seq + self.num_blocks  # and each block's claim beyond the last

        def words(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.header, self.chunks, self.splits = words(8), words(max_chunks, 8), words(max_split_chunks // 2, 8)
        self.partials = torch.empty(max_split_chunks, chunk_rows, layout.head_dim, device=device)
        self.partial_stats = torch.empty(max_split_chunks, chunk_rows, 2, device=device)

    def _load_kernels(
        self, dtype: torch.dtype, has_gains: bool, has_softcap: bool, has_offsets: bool
    ) -> tuple[runtime.Kernel, runtime.Kernel, int, int]:
        """Decode and merge for queries of `dtype`, threads and shared bytes of the first."""
        shape, layout = self.shape, self.layout
        defines = _page_defines(layout, dtype, layout.k_rotation_order, layout.v_rotation_order) | {
            "GROUP": shape.group,
            "ROWS": shape.rows,
            "COLUMN_TILES": shape.column_tiles,
            "ROW_BLOCKS": shape.row_blocks,
            "ROW_GROUPS": shape.row_groups,
            "GAIN": int(has_gains),
            "SOFTCAP": int(has_softcap),
            "OFFSET": int(has_offsets),
            **DEBUG_DEFINES,
        }
        decode, merge = (runtime.load("decode.cu", kernel, defines, self.device) for kernel in ("sawkv_decode", "sawkv_merge"))
        return decode, merge, decode.read_constant("sawkv_threads"), decode.read_constant("sawkv_shared_bytes")

    def update(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        """See `DecodePlan.update`."""
        num_seqs = seq_lens.shape[0]
        if num_seqs > self.max_num_seqs:
            raise LayoutError(f"plan: expected at most {self.max_num_seqs} sequences, got {num_seqs}")
        params = _ScheduleParams(
            *map(_pointer, (seq_lens, query_start_loc, self.header, self.chunks, self.splits)),
            num_seqs,
            self.units_per_seq,
            self.tile_tokens,
            TILES_PER_CHUNK,
            self.sliding_window,
            self.num_blocks,
            MAX_CHUNKS_PER_BLOCK,
        )
        self.schedule.launch((1, 1, 1), 1024, _stream(seq_lens.device), params, shared_bytes=4 * 4 * (num_seqs + 1))


def make_plan(
    layout: PageLayout, device: torch.device, num_q_heads: int, max_num_seqs: int, max_query_len: int, sliding_window: int
) -> DecodePlan:
    """See `sawkv.ops.make_decode_plan`."""
    return CudaPlan(layout, device, num_q_heads, max_num_seqs, max_query_len, sliding_window)


@functools.lru_cache(maxsize=64)
def _own_plan(
    layout: PageLayout, device: torch.device, num_q_heads: int, max_num_seqs: int, max_query_len: int, sliding_window: int, stream: int
) -> CudaPlan:
    """For callers that bring no plan. One for each stream, because a plan serves one launch at a time."""
    return CudaPlan(layout, device, num_q_heads, max_num_seqs, max_query_len, sliding_window)


def decode_attention(
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
) -> None:
    """See `sawkv.ops.decode_attention`."""
    layout = cache.layout
    num_seqs, num_q_heads = seq_lens.shape[0], q.shape[1]
    if not num_seqs or not q.shape[0]:
        return
    stream = _stream(q.device)
    if plan is None:
        capacity = max(64, 1 << (num_seqs - 1).bit_length())
        plan = _own_plan(layout, q.device, num_q_heads, capacity, max_query_len, sliding_window, stream)
        plan.update(seq_lens, query_start_loc)
    if not isinstance(plan, CudaPlan) or plan.key != (num_q_heads, max_query_len, sliding_window) or plan.layout != layout:
        raise LayoutError("plan: expected one made for this layout, num_q_heads, max_query_len and sliding_window")
    if not _is_vectorizable(out):
        raise LayoutError(f"out: expected rows aligned to 16 bytes, got strides {list(out.stride())} at address {out.data_ptr():#x}")
    q = _vectorizable(q)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    centers, _, inverses, _, _ = zip(*cache.constants, strict=True)
    params = _DecodeParams(
        *map(_pointer, (q, cache.pages, block_table, plan.header, plan.chunks, plan.splits, plan.partials, plan.partial_stats)),
        *map(_pointer, (*centers, *inverses, sinks, out, lse)),
        cache.pages.stride(0),
        block_table.stride(0),
        *q.stride()[:2],
        *out.stride()[:2],
        *((0, 0) if lse is None else lse.stride()),
        (2 * softmax_scale / logit_softcap if logit_softcap else softmax_scale) * LOG2_E,
        logit_softcap * LOG2_E,
        sliding_window,
    )
    has_offsets = centers[0] is not None and (logit_softcap > 0 or sinks is not None or lse is not None)
    decode, merge, threads, shared_bytes = plan.kernels(q.dtype, _are_there(inverses), logit_softcap > 0, has_offsets)
    decode.launch((plan.num_blocks, 1, 1), threads, stream, params, shared_bytes, dependent=True)
    most_rows = num_seqs * plan.units_per_seq * plan.shape.rows * plan.shape.row_blocks
    merge_blocks = min(most_rows, MERGE_BLOCKS_PER_SM * plan.num_blocks)
    merge.launch((merge_blocks, 1, 1), MERGE_THREADS, stream, params, dependent=True)


@functools.cache
def _page_kernel(
    operation: str,
    layout: PageLayout,
    dtype: torch.dtype,
    k_order: int,
    v_order: int,
    device: torch.device,
    has_gains: bool,
    feeds_back: bool = False,
    counts: bool = False,
) -> tuple[runtime.Kernel, int, int]:
    """append or gather, its threads a block, and the tokens that a block takes."""
    does = {"GAIN": has_gains, "FEEDBACK": feeds_back, "COUNT": counts} if operation == "append" else {"GAIN": has_gains}
    defines = _page_defines(layout, dtype, k_order, v_order) | {name: int(value) for name, value in does.items()}
    kernel = runtime.load(f"{operation}.cu", f"sawkv_{operation}", defines, device)
    return kernel, kernel.read_constant("sawkv_threads"), kernel.read_constant("sawkv_tokens_per_block")


def _page_defines(layout: PageLayout, dtype: torch.dtype, k_order: int, v_order: int) -> dict[str, int | str]:
    return {
        "HEAD_DIM": layout.head_dim,
        "PAGE_SIZE": layout.page_size,
        "K_ORDER": k_order,
        "V_ORDER": v_order,
        "ELEMENT": ELEMENTS[dtype],
    }


def _are_there(of_k_and_v: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether K or V, or both, have this constant."""
    return any(x is not None for x in of_k_and_v)


def _is_vectorizable(x: torch.Tensor) -> bool:
    """Rows of [num_tokens, num_heads, head_dim] aligned to 16 bytes."""
    token_stride, head_stride, _ = x.stride()
    return not (x.data_ptr() | (token_stride | head_stride) * x.element_size()) & 15  # sizes are powers of two


def _vectorizable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it that vector loads can read."""
    return x if _is_vectorizable(x) else x.clone(memory_format=torch.contiguous_format)


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)  # what torch.cuda.current_stream wraps, at a fifth of its time


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _structure(struct_name: str, pointers: str, longs: str, floats: str, ints: str) -> type[ctypes.Structure]:
    """Mirror of a parameter struct of the device code: its fields in order."""
    kinds = ((pointers, ctypes.c_void_p), (longs, ctypes.c_int64), (floats, ctypes.c_float), (ints, ctypes.c_int32))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(struct_name, (ctypes.Structure,), {"_fields_": fields})


_AppendParams = _structure(
    "AppendParams",
    "slot_mapping pages counters k v k_center v_center k_gain v_gain k_weights v_weights k_step v_step",
    "k_token_stride v_token_stride k_head_stride v_head_stride page_stride num_slots",
    "",
    "num_tokens",
)
_GatherParams = _structure(
    "GatherParams",
    "pages block_table seq_lens cu_seq_lens k_center v_center k_gain_inverse v_gain_inverse k_out v_out",
    "page_stride table_stride",
    "",
    "num_seqs max_tokens num_kv_heads",
)
_ScheduleParams = _structure(
    "ScheduleParams",
    "seq_lens query_start_loc header chunks splits",
    "",
    "",
    "num_seqs units_per_seq tile_tokens tiles_per_chunk window num_blocks max_chunks_per_block",
)
_DecodeParams = _structure(
    "DecodeParams",
    "q pages block_table header chunks splits partials partial_stats k_center v_center k_gain_inverse v_gain_inverse sinks out lse",
    "page_stride table_stride q_token_stride q_head_stride out_token_stride out_head_stride lse_token_stride lse_head_stride",
    "scale_log2 softcap_log2",
    "window",
)
