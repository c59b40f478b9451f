"""gather: decode the pages of many sequences into contiguous rows. A program takes K or V of TOKENS output tokens of
one head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sawkv.kernels.triton.common import CLEARED_ROWS, bucket_of, high_half, low_half, rotate, round_to, swizzled


# What differs from step to step must not choose a variant: a request would wait for its compilation.
@triton.jit(
    do_not_specialize=["num_seqs", "search_steps", "max_tokens", "table_stride"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "cu_seq_lens"],
)
def gather_kernel(
    pages,
    block_table,
    seq_lens,
    cu_seq_lens,
    first_positions,
    k_gain_inverse,
    k_center,
    v_gain_inverse,
    v_center,
    k_out,
    v_out,
    num_seqs,
    search_steps,
    max_tokens,
    num_buckets,
    page_stride_16,
    table_stride,
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
    BY_BUCKET: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid [token blocks, num_kv_heads, 2]. Orders are 0 for rows that stay rotated. 2^search_steps is at least
    num_seqs. BY_BUCKET: `k_center` is [num_buckets, num_kv_heads, HEAD_DIM].
    first_positions: [num_seqs] int32, or None for 0.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    last = tl.load(cu_seq_lens + num_seqs)
    if tl.program_id(0) * TOKENS < last + CLEARED_ROWS:
        seq = tl.zeros_like(token)  # the last sequence that starts at or before the token
        end = seq + num_seqs
        for _ in range(search_steps):
            middle = (seq + end) // 2
            is_after = tl.load(cu_seq_lens + middle) <= token
            seq, end = tl.where(is_after, middle, seq), tl.where(is_after, end, middle)
        position = token - tl.load(cu_seq_lens + seq)
        is_there = (token < max_tokens) & (position >= 0) & (position < tl.load(seq_lens + seq))
        is_cleared = (token < max_tokens) & (token >= last) & (token < last + CLEARED_ROWS)
        page = tl.load(
            block_table + seq.to(tl.int64) * table_stride + position // PAGE_SIZE, mask=is_there, other=0
        ).to(tl.int64)
        K_SPAN: tl.constexpr = PAGE_SIZE * (HEAD_DIM * K_BITS // 8 + (4 if K_BITS < 16 else 0))
        V_SPAN: tl.constexpr = PAGE_SIZE * (HEAD_DIM * V_BITS // 8 + (4 if V_BITS < 16 else 0))
        head = tl.program_id(1)
        plane = pages + page * page_stride_16 * 16 + head * (K_SPAN + V_SPAN)
        offset = position % PAGE_SIZE
        to = (token.to(tl.int64) * tl.num_programs(1) + head) * HEAD_DIM
        if tl.program_id(2) == 0:
            if BY_BUCKET:
                if first_positions is not None:
                    position += tl.load(first_positions + seq)
                center = k_center + (bucket_of(position, num_buckets) * tl.num_programs(1) * HEAD_DIM)[:, None]
            else:
                center = k_center
            _gather_rows(
                plane,
                offset,
                is_there,
                is_cleared,
                k_gain_inverse,
                center,
                head,
                k_out + to,
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
            _gather_rows(
                plane + K_SPAN,
                offset,
                is_there,
                is_cleared,
                v_gain_inverse,
                v_center,
                head,
                v_out + to,
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
def _gather_rows(
    plane,
    offset,
    is_there,
    is_cleared,
    gain_inverse,
    center,
    head,
    to,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    STORED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    SWIZZLE_MULTIPLIER: tl.constexpr,
    SWIZZLE_PERIOD: tl.constexpr,
):
    ROW_BYTES: tl.constexpr = HEAD_DIM * BITS // 8
    channel = tl.arange(0, WIDTH)[None, :]
    is_channel = channel < HEAD_DIM
    if BITS == 16:
        from_ = (
            plane[:, None]
            + swizzled(channel, offset[:, None], 8, SWIZZLE_MULTIPLIER, SWIZZLE_PERIOD) * 2
            + offset[:, None] * ROW_BYTES
        )
        y = tl.load(from_.to(tl.pointer_type(STORED)), mask=is_there[:, None] & is_channel, other=0).to(tl.float32)
    else:
        if BITS == 3:
            row = (plane + offset * ROW_BYTES)[:, None]
            codes = _load_3(row, offset, is_there, ROW_BYTES, WIDTH, SWIZZLE_MULTIPLIER, SWIZZLE_PERIOD)
        else:
            byte = tl.arange(0, WIDTH * BITS // 8)[None, :]
            place = (
                swizzled(byte, offset[:, None], 16, SWIZZLE_MULTIPLIER, SWIZZLE_PERIOD) + offset[:, None] * ROW_BYTES
            )
            codes = tl.load(plane[:, None] + place, mask=is_there[:, None] & (byte < ROW_BYTES), other=0)
            if BITS <= 4:
                codes = tl.reshape(tl.join(codes & 15, codes >> 4), (codes.shape[0], WIDTH * BITS // 4))
            if BITS == 2:
                codes = tl.reshape(tl.join(codes & 3, codes >> 2), (codes.shape[0], WIDTH))
        meta = tl.load(
            (plane + PAGE_SIZE * ROW_BYTES + offset * 4).to(tl.pointer_type(tl.int32)), mask=is_there, other=0
        )
        y = (codes.to(tl.float32) - high_half(meta)[:, None]) * low_half(meta)[:, None]
        y = tl.where(is_channel, y, 0.0)  # padding must stay zero
    y = rotate(y, ORDER)
    here = head * HEAD_DIM + channel
    if gain_inverse is not None:
        y = y * tl.load(gain_inverse + here, mask=is_channel, other=0)
    if center is not None:
        y = y + tl.load(center + here, mask=is_there[:, None] & is_channel, other=0)
    is_written = (is_there | is_cleared)[:, None] & is_channel
    tl.store(to[:, None] + channel, round_to(y, to.dtype.element_ty), mask=is_written)


@triton.jit
def _load_3(
    row,
    offset,
    is_there,
    ROW_BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    SWIZZLE_MULTIPLIER: tl.constexpr,
    SWIZZLE_PERIOD: tl.constexpr,
):
    """Codes of 3 bits, [R, WIDTH] int32, from the rows at `row`: docs/format.md, Three bits."""
    R: tl.constexpr = offset.shape[0]
    channel = tl.arange(0, 32)[None, None, :]
    i = channel % 16
    codes = tl.zeros([R, WIDTH // 32, 32], tl.int32)
    for w in tl.static_range(3):
        word = tl.arange(0, WIDTH // 32)[None, :] * 3 + w
        place = swizzled(word, offset[:, None], 4, SWIZZLE_MULTIPLIER, SWIZZLE_PERIOD) * 4
        from_ = (row + place).to(tl.pointer_type(tl.int32))
        words = tl.load(from_, mask=is_there[:, None] & (word * 4 < ROW_BYTES), other=0)
        half = words[:, :, None] >> (channel // 16 * 16)
        of_five = tl.where(i // 5 == w, (half >> (i % 5 * 3)) & 7, 0)
        codes |= tl.where(i == 15, (half >> 15 & 1) << w, of_five)
    return tl.reshape(codes, (R, WIDTH))
