"""append: center, scale, rotate, quantize, pack and write. A program takes K or V of TOKENS tokens of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from sawkv.format import constants
from sawkv.format.counters import COLUMNS
from sawkv.kernels.triton.common import bucket_of, low_half, rotate, round_to, swizzled, widen

COUNTER_COLUMNS = tl.constexpr(len(COLUMNS))
# A kernel sees module constants only as tl.constexpr.
MAX_SCALE = tl.constexpr(constants.MAX_SCALE)
MIN_SCALE = tl.constexpr(constants.MIN_SCALE)
MAX_ZERO_POINT = tl.constexpr(constants.MAX_ZERO_POINT)
NAN_SCALE_BITS = tl.constexpr(constants.NAN_SCALE_BITS)
ERROR_STEPS = tl.constexpr(float(constants.ERROR_STEPS))
MAX_WEIGHT = tl.constexpr(float(constants.MAX_WEIGHT))
SAMPLE_HASH = tl.constexpr(constants.SAMPLE_HASH)
SAMPLED_BELOW = tl.constexpr(2**32 // constants.SAMPLE)


@triton.jit(do_not_specialize=["num_tokens"])  # which differs from step to step
def append_kernel(
    k,
    v,
    k_center,
    k_gain,
    k_weights,
    k_step,
    v_center,
    v_gain,
    v_weights,
    v_step,
    slot_mapping,
    positions,
    pages,
    counters,
    num_tokens,
    num_slots,
    num_buckets,
    page_stride_16,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    STORED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    K_ORDER: tl.constexpr,
    V_ORDER: tl.constexpr,
    SWIZZLE_MULTIPLIER: tl.constexpr,
    SWIZZLE_PERIOD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid [token blocks, num_kv_heads, 2]. `page_stride_16` counts 16-byte units, other strides elements. STORED is
    the type of 16-bit rows. With positions, K has a center per bucket.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    is_kept = (slot >= 0) & (slot < num_slots)
    slot = tl.where(is_kept, slot, 0)
    K_SPAN: tl.constexpr = PAGE_SIZE * (HEAD_DIM * K_BITS // 8 + (4 if K_BITS < 16 else 0))
    V_SPAN: tl.constexpr = PAGE_SIZE * (HEAD_DIM * V_BITS // 8 + (4 if V_BITS < 16 else 0))
    head = tl.program_id(1)
    page = pages + (slot // PAGE_SIZE) * page_stride_16 * 16 + head * (K_SPAN + V_SPAN)
    offset = (slot % PAGE_SIZE).to(tl.int32)
    token = token.to(tl.int64)
    is_counted = (slot.to(tl.uint32) * SAMPLE_HASH) < SAMPLED_BELOW  # sawkv.format.counters.is_sampled
    if tl.program_id(2) == 0:
        if positions is not None:
            position = tl.load(positions + token, mask=is_kept, other=0)
            center = k_center + (bucket_of(position, num_buckets) * tl.num_programs(1) * HEAD_DIM)[:, None]
        else:
            center = k_center
        _append_rows(
            k + token * k_token_stride + head.to(tl.int64) * k_head_stride,
            center,
            k_gain,
            k_weights,
            k_step,
            head,
            page,
            offset,
            is_kept,
            counters,
            is_counted,
            HEAD_DIM,
            WIDTH,
            K_BITS,
            STORED,
            PAGE_SIZE,
            K_ORDER,
            0,
            1,
        )
    else:
        _append_rows(
            v + token * v_token_stride + head.to(tl.int64) * v_head_stride,
            v_center,
            v_gain,
            v_weights,
            v_step,
            head,
            page + K_SPAN,
            offset,
            is_kept,
            counters + COUNTER_COLUMNS if counters is not None else None,
            is_counted,
            HEAD_DIM,
            WIDTH,
            V_BITS,
            STORED,
            PAGE_SIZE,
            V_ORDER,
            SWIZZLE_MULTIPLIER,
            SWIZZLE_PERIOD,
        )


@triton.jit
def _append_rows(
    row,
    center,
    gain,
    weights,
    step,
    head,
    plane,
    offset,
    is_kept,
    counters,
    is_counted,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    STORED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    SWIZZLE_MULTIPLIER: tl.constexpr,
    SWIZZLE_PERIOD: tl.constexpr,
):
    channel = tl.arange(0, WIDTH)[None, :]
    is_channel = channel < HEAD_DIM
    y = tl.load(row[:, None] + channel, mask=is_kept[:, None] & is_channel, other=0).to(tl.float32)
    if center is not None:
        y = y - tl.load(center + head * HEAD_DIM + channel, mask=is_channel, other=0)
    if gain is not None:
        y = y * tl.load(gain + head * HEAD_DIM + channel, mask=is_channel, other=0)
    y = rotate(y, ORDER)
    if BITS == 16:
        to = (
            plane[:, None]
            + swizzled(channel, offset[:, None], 8, SWIZZLE_MULTIPLIER, SWIZZLE_PERIOD) * 2
            + offset[:, None] * (2 * HEAD_DIM)
        )
        stored = round_to(y, STORED)
        tl.store(to.to(tl.pointer_type(STORED)), stored, mask=is_kept[:, None] & is_channel)
        if counters is not None:
            decoded = widen(stored)
            is_finite = tl.max(tl.where(tl.abs(decoded) < float("inf"), 0, 1), 1) == 0
            error = decoded - y
            _count(
                counters, tl.sum(error * error, 1), tl.sum(y * y, 1), is_kept, is_counted, is_finite, is_finite & False
            )
    else:
        MAX_CODE: tl.constexpr = (1 << BITS) - 1
        if weights is None and BITS >= 4:
            inverse, zero_point, meta, is_finite, is_saturated = _quantizer(y, is_channel, MAX_CODE, 0.0)
        else:  # the cells of the codes cover the range
            inverse, zero_point, meta, is_finite, is_saturated = _quantizer(y, is_channel, MAX_CODE + 1, -0.5)
        if counters is not None:
            squared_norm = tl.sum(y * y, 1)  # here, so that feedback below does not keep y in registers
        shifted = tl.fma(y, tl.broadcast_to(inverse[:, None], y.shape), tl.broadcast_to(zero_point[:, None], y.shape))
        moved = shifted
        if weights is not None:
            moved = _with_feedback(
                shifted, weights + head * (HEAD_DIM * HEAD_DIM), tl.load(step + head), HEAD_DIM, MAX_CODE
            )
            moved = tl.where(is_saturated[:, None], shifted, moved)
        codes = _round_clamped(moved, 0.0, MAX_CODE * 1.0)
        codes = tl.where(is_finite[:, None], codes, 0)
        if counters is not None:
            error, scale = tl.where(is_channel, codes.to(tl.float32) - shifted, 0.0), low_half(meta)  # in codes
            squared_error = tl.sum(error * error, 1) * (scale * scale)
            _count(counters, squared_error, squared_norm, is_kept, is_counted, is_finite, (meta & 0xFFFF) == 0x7BFF)
        ROW_BYTES: tl.constexpr = HEAD_DIM * BITS // 8
        if BITS == 3:
            for i in tl.static_range(3):
                word = tl.arange(0, WIDTH // 32)[None, :] * 3 + i
                place = swizzled(word, offset[:, None], 4, SWIZZLE_MULTIPLIER, SWIZZLE_PERIOD) * 4
                to = (plane + offset * ROW_BYTES)[:, None] + place
                is_stored = is_kept[:, None] & (word * 4 < ROW_BYTES)
                tl.store(to.to(tl.pointer_type(tl.int32)), _pack_3(codes, i), mask=is_stored)
        else:
            if BITS == 4:
                codes = _pack_pairs(codes, 4)
            if BITS == 2:
                codes = _pack_pairs(_pack_pairs(codes, 2), 4)
            byte = tl.arange(0, WIDTH * BITS // 8)[None, :]
            place = (
                swizzled(byte, offset[:, None], 16, SWIZZLE_MULTIPLIER, SWIZZLE_PERIOD) + offset[:, None] * ROW_BYTES
            )
            tl.store(plane[:, None] + place, codes.to(tl.uint8), mask=is_kept[:, None] & (byte < ROW_BYTES))
        tl.store((plane + PAGE_SIZE * ROW_BYTES + offset * 4).to(tl.pointer_type(tl.int32)), meta, mask=is_kept)


@triton.jit
def _pack_pairs(codes, BITS: tl.constexpr):
    """Two neighbouring codes in one number, the first in its low BITS bits."""
    even, odd = tl.split(tl.reshape(codes, (codes.shape[0], codes.shape[1] // 2, 2)))
    return even | (odd << BITS)


@triton.jit
def _pack_3(codes, WORD: tl.constexpr):
    """Word `WORD` of the three that hold 32 codes of 3 bits, [R, WIDTH / 32] int32: docs/format.md, Three bits."""
    GROUPS: tl.constexpr = codes.shape[1] // 32
    channel = tl.arange(0, 32)[None, None, :]
    codes = tl.reshape(codes, (codes.shape[0], GROUPS, 32))
    i = channel % 16
    top = ((codes >> WORD) & 1) << 15
    bits = tl.where(i == 15, top, tl.where(i // 5 == WORD, codes << (i % 5 * 3), 0))
    return tl.sum(bits << (channel // 16 * 16), 2)


@triton.jit
def _round_clamped(x, low, high):
    """Clamp, and round to int32, half to even. Adding 1.5 * 2^23 moves the integer to the low bits."""
    return (tl.minimum(tl.maximum(x, low), high) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _with_feedback(t, weights, step, HEAD_DIM: tl.constexpr, MAX_CODE: tl.constexpr):
    """Unrounded codes [R, WIDTH] fp32, each moved by the errors of earlier blocks of channels: docs/format.md, step 5.

    When a block is coded, the sums of errors that move it are complete, because it has no weights for its own or later
    blocks. Errors pass block by block to the rest of their group of 32 channels, and then all at once to the groups
    after it.
    """
    R: tl.constexpr = t.shape[0]
    WIDTH: tl.constexpr = t.shape[1]
    SPANS: tl.constexpr = WIDTH // 32  # groups of 32 channels, with eight blocks each
    target = tl.arange(0, WIDTH)[None, :]
    source = tl.arange(0, 32)
    sums = tl.zeros([R, WIDTH], tl.int32)
    for span in range((HEAD_DIM + 31) // 32):
        is_span = (tl.arange(0, SPANS) == span)[None, :, None]
        channel = span * 32 + source[:, None]
        passed = tl.load(
            weights + target * HEAD_DIM + channel, mask=(target < HEAD_DIM) & (channel < HEAD_DIM), other=0
        )
        is_here = (channel < HEAD_DIM) & (span * 32 + source[None, :] < HEAD_DIM)
        passed_here = tl.load(weights + (span * 32 + source[None, :]) * HEAD_DIM + channel, mask=is_here, other=0)
        t_here = tl.sum(tl.where(is_span, tl.reshape(t, (R, SPANS, 32)), 0.0), 1)
        sums_here = tl.sum(tl.where(is_span, tl.reshape(sums, (R, SPANS, 32)), 0), 1)
        errors = tl.zeros([R, 32], tl.int32)
        for block in tl.static_range(8):
            moved = tl.fma(sums_here.to(tl.float32), tl.broadcast_to(step, t_here.shape), t_here)
            code = _round_clamped(moved, 0.0, MAX_CODE * 1.0).to(tl.float32)
            error = tl.where(
                (source % 8 == block)[None, :], _round_clamped((moved - code) * ERROR_STEPS, -MAX_WEIGHT, MAX_WEIGHT), 0
            )
            errors += error
            if block < 7:
                # Triton 3.6 does not infer it.
                sums_here = tl.dot(error.to(tl.int8), passed_here, sums_here, out_dtype=tl.int32)
        sums = tl.dot(errors.to(tl.int8), passed, sums, out_dtype=tl.int32)
    return tl.fma(sums.to(tl.float32), tl.broadcast_to(step, t.shape), t)


@triton.jit
def _quantizer(y, is_channel, INTERVALS: tl.constexpr, FIRST: tl.constexpr):
    """1 / scale, zero point, both packed as meta, whether the row is finite, and whether its scale saturates: each [R].

    The row's range is INTERVALS scales wide, and its minimum has the unrounded code FIRST (docs/format.md, steps 3 and
    4).
    """
    is_finite = tl.max(tl.where(tl.abs(y) < float("inf"), 0, 1), 1) == 0
    y = tl.where(is_finite[:, None], y, 0.0)  # results of a row that is not finite are unused
    low = tl.min(tl.where(is_channel, y, float("inf")), 1)
    high = tl.max(tl.where(is_channel, y, -float("inf")), 1)
    by_range, by_offset = (high - low) * (1 / INTERVALS), tl.maximum(tl.abs(low), tl.abs(high)) * (1 / MAX_ZERO_POINT)
    wanted = tl.maximum(tl.maximum(by_range, by_offset), MIN_SCALE)
    bound = tl.minimum(wanted, MAX_SCALE)
    nearest = bound.to(tl.float16)
    # The next fp16 up.
    scale_bits = nearest.to(tl.int16, bitcast=True).to(tl.int32) + tl.where(nearest.to(tl.float32) < bound, 1, 0)
    scale = scale_bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    inverse = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    zero_point = tl.minimum(tl.maximum(FIRST - low * inverse, -MAX_ZERO_POINT), MAX_ZERO_POINT).to(tl.float16)
    zero_bits = zero_point.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    packed = tl.where(is_finite, scale_bits | (zero_bits << 16), NAN_SCALE_BITS)
    return inverse, zero_point.to(tl.float32), packed, is_finite, wanted > MAX_SCALE


@triton.jit
def _count(counters, squared_error, squared_norm, is_kept, is_counted, is_finite, is_saturated):
    """Add rows to one line of the counters. All arguments but `counters` are [R]. See `sawkv.format.counters`."""
    is_used = is_kept & is_counted & is_finite & ~is_saturated
    tl.atomic_add(counters, tl.sum(is_kept.to(tl.float64)))
    tl.atomic_add(counters + 1, tl.sum((is_kept & ~is_finite).to(tl.float64)))
    tl.atomic_add(counters + 2, tl.sum((is_kept & is_saturated).to(tl.float64)))
    tl.atomic_add(counters + 3, tl.sum(tl.where(is_used, squared_error, 0.0)).to(tl.float64))
    tl.atomic_add(counters + 4, tl.sum(tl.where(is_used, squared_norm, 0.0)).to(tl.float64))
    tl.atomic_add(counters + 5, tl.sum(is_used.to(tl.float64)))
