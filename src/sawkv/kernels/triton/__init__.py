"""Triton backend for NVIDIA GPUs from Ampere on: pages of 2 to 16 bits with any head_dim from 64.

The CUDA backend is faster for the layouts that it supports; this backend serves all others. CI runs it in Triton's
interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from sawkv import kernels
from sawkv.cache import PagedKVCache
from sawkv.format.layout import PageLayout
from sawkv.format.spec import CODEC_BITS, NARROWER_V
from sawkv.format.spec import HEAD_DIMS as ANY_HEAD_DIM
from sawkv.kernels import Layer, Prefixes, ScheduleShape, Step
from sawkv.kernels.triton.append import append_kernel
from sawkv.kernels.triton.common import INTERPRETED, columns_of, planes_of
from sawkv.kernels.triton.decode import decode_kernel, merge_kernel, prepare_kernel, schedule_kernel
from sawkv.kernels.triton.gather import gather_kernel

name = "triton"
counts = True

MIN_CAPABILITY = (8, 0)
HEAD_DIMS = tuple(head_dim for head_dim in ANY_HEAD_DIM if head_dim >= 64)
STORED = {
    **dict.fromkeys(("int4", "int3", "int2", *NARROWER_V, "int8"), tl.uint8),
    "bf16": tl.bfloat16,
    "fp16": tl.float16,
}
"""Formats that the kernels support, by the first part of their names, and the type in which they load rows."""
ROTATE_TOKENS = 8
"""Tokens per program that rotates. It has one warp, so butterflies use shuffles instead of shared memory."""
COPY_TOKENS = 16
"""Tokens per program that decodes without rotation. It has four warps."""
FEEDBACK_TOKENS = 16
"""Tokens per program with feedback: the rows of one tensor-core tile. Four warps keep registers per thread low."""
PREPARE_ROWS = 4
SCHEDULE_BLOCK = 128
MIN_TILES_PER_CHUNK = 4
MAX_PIECES = 128
"""Most chunks of one sequence. The merge reads them one after the other."""
CHUNKS_PER_SM = 16
"""Twice the number of decode programs that an H100's SM holds. Chosen by measurement among 8 to 64."""
DECODE_WARPS = 2
DECODE_STAGES = 3
MERGE_ELEMENTS = 2048
LOG2_E = math.log2(math.e)


def unsupported_reason(device: torch.device, layout: PageLayout) -> str | None:
    """None on NVIDIA GPUs from Ampere on, and on CPUs in the interpreter, if the kernels support the layout."""
    if layout.format.codec not in STORED:
        return f"expected {', '.join(STORED)}, got {layout.format.codec}"
    if layout.head_dim not in HEAD_DIMS:
        return f"expected head_dim from {HEAD_DIMS[0]}, got {layout.head_dim}"
    if INTERPRETED.value:
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"expected an NVIDIA GPU, got {device.type}"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"expected Ampere or newer, got {torch.cuda.get_device_name(device)}"
    return None


class Pages:
    """See `sawkv.ops.Pages`."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache = cache
        self._constants = _page_constants(cache.layout)

    def append(
        self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor, positions: torch.Tensor | None
    ) -> None:
        """See `sawkv.ops.append`."""
        cache, layout, num_tokens = self._cache, self._cache.layout, slot_mapping.shape[0]
        if not num_tokens:
            return
        of_k, of_v = cache.constants
        tokens, num_warps = (
            (FEEDBACK_TOKENS, 4) if of_k.weights is not None or of_v.weights is not None else (ROTATE_TOKENS, 1)
        )
        append_kernel[(_divide_up(num_tokens, tokens), layout.num_kv_heads, 2)](
            k,
            v,
            *(x for of in cache.constants for x in (of.center, of.gain, of.weights, of.step)),
            slot_mapping,
            positions,
            cache.pages,
            cache.counters,
            num_tokens,
            cache.num_slots,
            cache.num_buckets,
            cache.pages.stride(0) // 16,
            *k.stride()[:2],
            *v.stride()[:2],
            **self._constants,
            K_ORDER=layout.k_rotation_order,
            V_ORDER=layout.v_rotation_order,
            TOKENS=tokens,
            num_warps=num_warps,
            enable_fp_fusion=False,  # every rounding is part of the format
        )

    def gather(self, prefixes: Prefixes, k_out: torch.Tensor, v_out: torch.Tensor, rotated: bool) -> None:
        """See `sawkv.ops.gather`."""
        cache, layout, num_seqs, max_tokens = (
            self._cache,
            self._cache.layout,
            prefixes.seq_lens.shape[0],
            k_out.shape[0],
        )
        if not num_seqs or not max_tokens:
            return
        tokens, num_warps = (COPY_TOKENS, 4) if rotated else (ROTATE_TOKENS, 1)
        k_added, v_added = cache.added_by_gather(rotated)
        k_inverse, v_inverse = (None if rotated else constants.gain_inverse for constants in cache.constants)
        gather_kernel[(_divide_up(max_tokens, tokens), layout.num_kv_heads, 2)](
            cache.pages,
            prefixes.block_table,
            prefixes.seq_lens,
            prefixes.cu_seq_lens,
            prefixes.first_positions,
            k_inverse,
            k_added,
            v_inverse,
            v_added,
            k_out,
            v_out,
            num_seqs,
            num_seqs.bit_length(),
            max_tokens,
            cache.num_buckets,
            cache.pages.stride(0) // 16,
            prefixes.block_table.stride(0),
            **self._constants,
            K_ORDER=0 if rotated else layout.k_rotation_order,
            V_ORDER=0 if rotated else layout.v_rotation_order,
            BY_BUCKET=cache.num_buckets > 1,
            TOKENS=tokens,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )


class Schedule(kernels.Schedule):
    """The chunks of a step, with buffers for queries and partial results."""

    def __init__(self, shape: ScheduleShape) -> None:
        super().__init__(shape)
        layout, device, max_num_seqs, max_query_len = (
            shape.layout,
            shape.device,
            shape.max_num_seqs,
            shape.max_query_len,
        )
        self.group = shape.num_q_heads // layout.num_kv_heads
        self.width = triton.next_power_of_2(layout.head_dim)
        total_rows = self.group * max_query_len
        self.block_rows = 8 if total_rows <= 8 else 16 if total_rows <= 16 or self.width > 128 else 32
        self.rows = min(total_rows, self.block_rows)
        self.row_groups = _divide_up(total_rows, self.block_rows)
        self.units = layout.num_kv_heads * self.row_groups
        k_bits, v_bits = (CODEC_BITS[codec] for codec in (layout.format.k_codec, layout.format.v_codec))
        self.tile = 64 if k_bits <= 4 and self.width <= 128 else 32  # tokens, limited by registers
        num_sms = 1 if INTERPRETED.value else torch.cuda.get_device_properties(device).multi_processor_count
        self.target_chunks = _divide_up(CHUNKS_PER_SM * num_sms, self.units)
        max_chunks = self.max_chunks(max_num_seqs)

        def words(*sizes: int) -> torch.Tensor:
            return torch.zeros(sizes, dtype=torch.int32, device=device)

        self.num_chunks, self.chunks, self.splits = words(1), words(max_chunks, 4), words(max_num_seqs, 2)
        max_query_rows = max_num_seqs * max_query_len * shape.num_q_heads
        query_dtype = torch.bfloat16 if layout.format.codec == "bf16" else torch.float16
        query_width, result_width = (
            layout.parts * planes_of(bits) * columns_of(self.width // layout.parts, bits) for bits in (k_bits, v_bits)
        )
        self.queries = torch.empty(max_query_rows, query_width, dtype=query_dtype, device=device)
        self.query_stats, self.query_offsets = (
            torch.empty(max_query_rows, layout.parts + 1, device=device),
            torch.empty(max_query_rows, device=device),
        )
        self.partials = torch.empty(max_chunks, self.units, self.rows, result_width, device=device)
        self.partial_stats = torch.empty(max_chunks, self.units, self.rows, 2, device=device)

    def max_chunks(self, num_seqs: int) -> int:
        """Most chunks of any batch of `num_seqs`: each sequence rounds up once."""
        return self.target_chunks + num_seqs

    def update(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        """See `kernels.Schedule.update`."""
        num_seqs = seq_lens.shape[0]
        if not num_seqs:
            return
        schedule_kernel[(num_seqs,)](
            seq_lens,
            query_start_loc,
            self.num_chunks,
            self.chunks,
            self.splits,
            num_seqs,
            self.shape.sliding_window,
            self.target_chunks,
            TILE=self.tile,
            MIN_TILES=MIN_TILES_PER_CHUNK,
            MAX_PIECES=MAX_PIECES,
            BLOCK=SCHEDULE_BLOCK,
            num_warps=1,
            enable_fp_fusion=True,
        )


class Attention:
    """See `sawkv.ops.Attention`. In 16-bit pages, a NaN in V reaches all queries of its sequence in the call."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._constants = _page_constants(layer.cache.layout)
        self._constants["PARTS"] = layer.cache.layout.parts
        self._shape = {key: self._constants[key] for key in ("HEAD_DIM", "WIDTH", "PARTS", "K_BITS", "V_BITS")}

    def __call__(self, q: torch.Tensor, step: Step, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """See `sawkv.ops.Attention.__call__`."""
        layer, cache, layout = self._layer, self._layer.cache, self._layer.cache.layout
        num_seqs, num_q_heads, schedule = step.seq_lens.shape[0], layer.num_q_heads, step.schedule
        if not num_seqs or not q.shape[0]:
            return
        assert isinstance(schedule, Schedule)
        softcap, max_query_len = layer.logit_softcap, schedule.shape.max_query_len
        rows = {"GROUP": schedule.group, "ROWS": schedule.rows, "ROW_GROUPS": schedule.row_groups}
        num_rows = min(q.shape[0], num_seqs * max_query_len) * num_q_heads
        of_k, of_v = cache.constants
        sees_offsets = layer.adds_offsets or (lse is not None and of_k.center is not None)
        by_bucket = cache.num_buckets > 1
        offsets = schedule.query_offsets if sees_offsets else None
        if by_bucket:
            offsets = torch.empty(num_rows, cache.num_buckets, device=q.device)
        completes_scores = softcap > 0 or by_bucket
        prepare_kernel[(_divide_up(num_rows, PREPARE_ROWS),)](
            q,
            of_k.gain_inverse,
            of_k.center if sees_offsets else None,
            schedule.queries,
            schedule.query_stats,
            offsets,
            num_rows,
            num_q_heads,
            cache.num_buckets,
            schedule.group,
            *q.stride()[:2],
            (2 * layer.softmax_scale / softcap if softcap else layer.softmax_scale) * LOG2_E,
            **self._shape,
            ORDER=layout.k_rotation_order,
            ROWS=PREPARE_ROWS,
            num_warps=1,
            enable_fp_fusion=True,
        )
        decode_kernel[(schedule.max_chunks(num_seqs) * schedule.units,)](
            schedule.queries,
            schedule.query_stats,
            offsets if completes_scores else None,
            cache.pages,
            step.block_table,
            step.seq_lens,
            step.query_start_loc,
            schedule.num_chunks,
            schedule.chunks,
            schedule.partials,
            schedule.partial_stats,
            cache.pages.stride(0) // 16,
            step.block_table.stride(0),
            softcap * LOG2_E,
            layer.sliding_window,
            cache.num_buckets,
            **self._constants,
            **rows,
            NUM_KV_HEADS=layout.num_kv_heads,
            BLOCK_ROWS=schedule.block_rows,
            MAX_QUERY_LEN=max_query_len,
            HAS_SOFTCAP=softcap > 0,
            HAS_WINDOW=layer.sliding_window > 0,
            BY_BUCKET=by_bucket,
            TILE=schedule.tile,
            STAGES=DECODE_STAGES,
            num_warps=DECODE_WARPS * layout.parts,
            enable_fp_fusion=True,
        )
        merge_kernel[(num_seqs, schedule.units, schedule.rows)](
            schedule.partials,
            schedule.partial_stats,
            schedule.splits,
            step.query_start_loc,
            None if completes_scores else offsets,
            of_v.gain_inverse,
            of_v.center,
            layer.sinks,
            out,
            lse,
            *out.stride()[:2],
            *((0, 0) if lse is None else lse.stride()),
            **self._shape,
            **rows,
            ORDER=layout.v_rotation_order,
            PIECES=MERGE_ELEMENTS // schedule.width,
            num_warps=1,
            enable_fp_fusion=False,  # so that all lanes with copies of a sum have the same bits
        )


def _page_constants(layout: PageLayout) -> dict[str, Any]:
    multiplier, period = layout.swizzle_factors
    return {
        "HEAD_DIM": layout.head_dim,
        "WIDTH": triton.next_power_of_2(layout.head_dim),
        "K_BITS": CODEC_BITS[layout.format.k_codec],
        "V_BITS": CODEC_BITS[layout.format.v_codec],
        "STORED": STORED[layout.format.codec],
        "PAGE_SIZE": layout.page_size,
        "SWIZZLE_MULTIPLIER": multiplier,
        "SWIZZLE_PERIOD": period,
    }


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)
