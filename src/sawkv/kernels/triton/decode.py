"""Decode attention: `schedule_kernel` once per step; `prepare_kernel`, `decode_kernel` and `merge_kernel` per layer.

Keys are split into chunks of whole tiles, enough to fill the GPU. A program attends to one chunk with the query
rows of one KV head, and `merge_kernel` adds the chunks of a sequence. Codes are neither converted nor scaled one by one
(`common.codes_in`):

    score = k_scale * (q . n - k_zero * sum(q));    out = sum(p * v_scale * n) - sum(p * v_scale * v_zero).

A row of codes is read as 16-bit words. A plane is a place in these words (`common.planes_of`): plane i holds the i-th
code of every word. Queries have the order of K's planes, partial results that of V's (`common.place_of`). Tokens are
the rows of products, because there may be only 8 query rows. Over 400 lines: four kernels that share these conventions.

A head of 512 channels is stored as PARTS = 2 rows, each with its own scale and zero point. Scores are summed over the
parts, and each part has results of its own.
"""

# ruff: noqa: RUF005  (Triton does not unpack tuples)
from __future__ import annotations

import triton
import triton.language as tl

from sawkv.kernels.triton.common import (
    INTERPRETED,
    LN_2,
    LOG2_E,
    NO_SCORE,
    bucket_of,
    codes_in,
    columns_of,
    exponent_of,
    high_half,
    low_half,
    multiply,
    place_of,
    planes_of,
    rotate,
    round_to,
    swizzled,
    widen,
)

V_SHIFT = tl.constexpr(60)
"""Weights are stored in bf16 times 2^V_SHIFT, which keeps them in range for every fp16 scale."""


@triton.jit
def _visible_tiles(seq_len, query_len, window, TILE: tl.constexpr):
    """First tile that any query sees, and the number of tiles from there."""
    first_token = tl.where(window > 0, tl.maximum(seq_len - query_len - window + 1, 0), 0)
    first = first_token // TILE
    return first, tl.where(query_len > 0, (seq_len + TILE - 1) // TILE - first, 0)


@triton.jit
def _pieces(tiles, tiles_per_chunk, MAX_PIECES: tl.constexpr):
    return tl.minimum((tiles + tiles_per_chunk - 1) // tiles_per_chunk, MAX_PIECES)


@triton.jit(do_not_specialize=["num_seqs"])  # which differs from step to step
def schedule_kernel(
    seq_lens,
    query_start_loc,
    num_chunks,
    chunks,
    splits,
    num_seqs,
    window,
    target_chunks,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [num_seqs]. Every program sums all lengths, and writes the chunks of its own sequence.

    chunks: [max_chunks, 4] int32: sequence, first tile, tiles, 0.
    splits: [max_num_seqs, 2] int32: first chunk, number of chunks.
    """
    seq = tl.program_id(0)
    total = 0
    for start in range(0, num_seqs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        query_len = tl.load(query_start_loc + i + 1, mask=i < num_seqs, other=0) - tl.load(
            query_start_loc + i, mask=i < num_seqs, other=0
        )
        _, tiles = _visible_tiles(tl.load(seq_lens + i, mask=i < num_seqs, other=0), query_len, window, TILE)
        total += tl.sum(tiles)
    tiles_per_chunk = tl.maximum((total + target_chunks - 1) // target_chunks, MIN_TILES)
    before = 0
    for start in range(0, seq, BLOCK):
        i = start + tl.arange(0, BLOCK)
        query_len = tl.load(query_start_loc + i + 1, mask=i < seq, other=0) - tl.load(
            query_start_loc + i, mask=i < seq, other=0
        )
        _, tiles = _visible_tiles(tl.load(seq_lens + i, mask=i < seq, other=0), query_len, window, TILE)
        before += tl.sum(_pieces(tiles, tiles_per_chunk, MAX_PIECES))
    query_len = tl.load(query_start_loc + seq + 1) - tl.load(query_start_loc + seq)
    first, tiles = _visible_tiles(tl.load(seq_lens + seq), query_len, window, TILE)
    pieces = _pieces(tiles, tiles_per_chunk, MAX_PIECES)
    tl.store(splits + 2 * seq, before)
    tl.store(splits + 2 * seq + 1, pieces)
    if seq == num_seqs - 1:
        tl.store(num_chunks, before + pieces)
    for start in range(0, pieces, BLOCK):
        piece = start + tl.arange(0, BLOCK)
        begin, end = piece * tiles // pieces, (piece + 1) * tiles // pieces
        chunk = chunks + 4 * (before + piece)
        tl.store(chunk, tl.zeros_like(piece) + seq, mask=piece < pieces)
        tl.store(chunk + 1, first + begin, mask=piece < pieces)
        tl.store(chunk + 2, end - begin, mask=piece < pieces)


@triton.jit
def _plane_of(channel, BITS: tl.constexpr):
    if BITS == 3:
        return tl.where(channel % 16 < 15, channel % 16 % 5, 5)
    else:
        return channel % planes_of(BITS)


@triton.jit(do_not_specialize=["num_rows"])  # which differs from step to step
def prepare_kernel(
    q,
    k_gain_inverse,
    k_center,
    queries,
    query_stats,
    query_offsets,
    num_rows,
    num_q_heads,
    num_buckets,
    group,
    q_token_stride,
    q_head_stride,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Divide query rows by K's gains, rotate them, and round them to 16 bits in the order of parts and planes: queries
    [num_rows, PARTS * planes * columns], by (token, query head). Padding of columns is left as it is.

    query_stats: [num_rows, PARTS + 1] fp32: sums of the row's parts in units of codes, and the factor of its scores,
    log2(e) included.
    query_offsets: [num_rows, num_buckets] fp32 or None: the terms q.k_center of the row's scores, in the same unit.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)[None, :]
    token, head = row // num_q_heads, row % num_q_heads
    at = token.to(tl.int64) * q_token_stride + head * q_head_stride
    is_there = (row < num_rows)[:, None] & (channel < HEAD_DIM)
    y = tl.load(q + at[:, None] + channel, mask=is_there, other=0).to(tl.float32)
    of_head = (head // group)[:, None] * HEAD_DIM + channel
    if query_offsets is not None:
        for bucket in range(num_buckets):
            center = tl.load(k_center + bucket * (num_q_heads // group * HEAD_DIM) + of_head, mask=is_there, other=0)
            offset = tl.sum(y * center, 1) * scale_log2
            tl.store(query_offsets + row.to(tl.int64) * num_buckets + bucket, offset, mask=row < num_rows)
    if k_gain_inverse is not None:
        y = y * tl.load(k_gain_inverse + of_head, mask=is_there, other=0)
    y = rotate(y, ORDER)
    # Scale by a power of two to the top of fp16's range. NaN and infinities are unchanged.
    largest = tl.max(tl.abs(y), 1)
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127, -100), 100)
    y = y * ((13 - exponent + 127) << 23).to(tl.float32, bitcast=True)[:, None]
    element = queries.dtype.element_ty
    PART: tl.constexpr = WIDTH // PARTS
    totals = tl.sum(tl.reshape(round_to(y, element).to(tl.float32), (ROWS, PARTS, PART)), 2)
    ROW: tl.constexpr = PARTS * planes_of(K_BITS) * columns_of(PART, K_BITS)
    if K_BITS == 4:
        y = tl.where(channel % 2 == 1, y / 16.0, y)
    elif K_BITS < 4:
        for plane in tl.static_range(planes_of(K_BITS)):
            y = tl.where(_plane_of(channel, K_BITS) == plane, y * 2.0 ** -exponent_of(plane, K_BITS), y)
    place = place_of(channel, PART, K_BITS)
    to = queries + row[:, None].to(tl.int64) * ROW + place
    tl.store(to, round_to(y, element), mask=(row < num_rows)[:, None])
    if K_BITS == 3:
        has_more = (row < num_rows)[:, None] & (channel % 16 == 15)
        tl.store(to + 2, round_to(y * 2, element), mask=has_more)
        tl.store(to + 4, round_to(y * 4, element), mask=has_more)
    CODE_EXPONENT: tl.constexpr = 24 if K_BITS < 16 else 0  # codes are n * 2^-24
    factor = scale_log2 * ((exponent - 13 + CODE_EXPONENT + 127) << 23).to(tl.float32, bitcast=True)
    stats = query_stats + (PARTS + 1) * row
    part = tl.arange(0, PARTS)[None, :]
    tl.store(stats[:, None] + part, totals * 2.0**-CODE_EXPONENT, mask=(row < num_rows)[:, None])
    tl.store(stats + PARTS, factor, mask=row < num_rows)


@triton.jit
def _score_part(
    k_plane,
    offset,
    is_there,
    queries,
    query_sum,
    query_factor,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    K_TYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Scores of a tile's tokens by one part of their rows, [TILE, BLOCK_ROWS]. `queries`: the part's planes."""
    column = tl.arange(0, COLUMNS)
    k_place = offset[:, None] * WORDS + column[None, :]
    words = tl.load(k_plane[:, None] + k_place, mask=is_there[:, None] & (column < WORDS)[None, :], other=0)
    scores = tl.zeros([offset.shape[0], queries[0].shape[1]], tl.float32)
    for plane in tl.static_range(planes_of(BITS)):
        scores = multiply(codes_in(words, plane, BITS, K_TYPE), queries[plane], scores)
    if BITS < 16:
        k_meta = tl.load(
            (k_plane + PAGE_SIZE * WORDS + offset * 2).to(tl.pointer_type(tl.int32)), mask=is_there, other=0
        )
        scores = (scores - high_half(k_meta)[:, None] * query_sum[None, :]) * (
            low_half(k_meta)[:, None] * query_factor[None, :]
        )
    else:
        scores *= query_factor[None, :]
    return scores


@triton.jit
def _add_values(
    v_plane,
    offset,
    is_there,
    is_visible,
    weights,
    shrink,
    zero,
    outs,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    V_TYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SWIZZLE_MULTIPLIER: tl.constexpr,
    SWIZZLE_PERIOD: tl.constexpr,
):
    """The sum of zero points to subtract, and planes of one part of the output, each [COLUMNS, BLOCK_ROWS], with a
    tile's tokens added.
    """
    if BITS < 16:
        v_meta = tl.load(
            (v_plane + PAGE_SIZE * WORDS + offset * 2).to(tl.pointer_type(tl.int32)), mask=is_there, other=0
        )
        weights *= (low_half(v_meta) * 2.0**V_SHIFT)[:, None]
        if is_visible is not None:
            weights = tl.where(is_visible, weights, 0)  # a hidden token's scale may be NaN
    rounded = round_to(weights, V_TYPE)
    if BITS < 16:  # from the rounded weights: their error then multiplies n - zero, not n and zero separately
        zero = zero * shrink + tl.sum(widen(rounded) * high_half(v_meta)[:, None], 0)
    column = tl.arange(0, COLUMNS)
    v_place = (
        swizzled(column[:, None], offset[None, :], 8, SWIZZLE_MULTIPLIER, SWIZZLE_PERIOD) + offset[None, :] * WORDS
    )
    if not INTERPRETED and SWIZZLE_PERIOD > 1:  # rows consist of whole segments
        v_place = tl.max_contiguous(tl.multiple_of(v_place, (8, 1)), (8, 1))
    words = tl.load(v_plane[None, :] + v_place, mask=is_there[None, :] & (column < WORDS)[:, None], other=0)
    added = ()
    for plane in tl.static_range(planes_of(BITS)):
        out = multiply(codes_in(words, plane, BITS, V_TYPE), rounded, outs[plane] * shrink[None, :])
        added = added + (out,)
    return zero, added


@triton.jit
def _store_part(to, is_row, zero, outs, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """One part of a chunk's output, converted to the unit of values."""
    for plane in tl.static_range(planes_of(BITS)):
        out = outs[plane]
        if BITS < 16:
            offset = (zero * 2.0**-V_SHIFT)[None, :]
            if BITS == 3 and plane == 5:  # three words hold a code, which has one offset
                offset = tl.where((tl.arange(0, COLUMNS) % 6 < 2)[:, None], offset, 0.0)
            out = out * 2.0 ** (133 - V_SHIFT - exponent_of(plane, BITS)) - offset  # codes are n * 2^-133
        tl.store(to + plane * COLUMNS, out, mask=is_row[None, :])


@triton.jit(do_not_specialize=["table_stride"])  # which engines may cut to the longest request of a step
def decode_kernel(
    queries,
    query_stats,
    query_offsets,
    pages,
    block_table,
    seq_lens,
    query_start_loc,
    num_chunks,
    chunks,
    partials,
    partial_stats,
    page_stride_16,
    table_stride,
    softcap_log2,
    window,
    num_buckets,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    STORED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SWIZZLE_MULTIPLIER: tl.constexpr,
    SWIZZLE_PERIOD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    MAX_QUERY_LEN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BY_BUCKET: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid [max_chunks * NUM_KV_HEADS * ROW_GROUPS]: each program takes one chunk, KV head and row group.

    query_offsets: as `prepare_kernel` writes them if each score needs one, else None. BY_BUCKET: several per row.
    partials: [max_chunks, NUM_KV_HEADS * ROW_GROUPS, ROWS, PARTS * planes * columns] fp32 in the order of parts and
    planes, not divided by the sum of the weights.
    partial_stats: [max_chunks, NUM_KV_HEADS * ROW_GROUPS, ROWS, 2] fp32: maximum of the scores in log2, and sum of
    weights.
    """
    UNITS: tl.constexpr = NUM_KV_HEADS * ROW_GROUPS
    PART: tl.constexpr = WIDTH // PARTS
    K_PLANES: tl.constexpr = planes_of(K_BITS)
    V_PLANES: tl.constexpr = planes_of(V_BITS)
    K_COLUMNS: tl.constexpr = columns_of(PART, K_BITS)
    V_COLUMNS: tl.constexpr = columns_of(PART, V_BITS)
    K_WORDS: tl.constexpr = HEAD_DIM // PARTS * K_BITS // 16  # words per row; the rest is padding
    V_WORDS: tl.constexpr = HEAD_DIM // PARTS * V_BITS // 16
    IS_CODED: tl.constexpr = K_BITS < 16
    K_SPAN: tl.constexpr = PAGE_SIZE * (K_WORDS + (2 if IS_CODED else 0))  # in 16-bit words
    V_SPAN: tl.constexpr = PAGE_SIZE * (V_WORDS + (2 if IS_CODED else 0))
    K_TYPE: tl.constexpr = tl.float16 if IS_CODED else STORED
    V_TYPE: tl.constexpr = tl.bfloat16 if IS_CODED else STORED

    chunk, unit = tl.program_id(0) // UNITS, tl.program_id(0) % UNITS
    if chunk >= tl.load(num_chunks):
        return
    seq, first_tile, num_tiles = (
        tl.load(chunks + 4 * chunk),
        tl.load(chunks + 4 * chunk + 1),
        tl.load(chunks + 4 * chunk + 2),
    )
    length, query_start = tl.load(seq_lens + seq), tl.load(query_start_loc + seq)
    query_len = tl.load(query_start_loc + seq + 1) - query_start
    kv_head = unit // ROW_GROUPS

    block_row = tl.arange(0, BLOCK_ROWS)
    row = unit % ROW_GROUPS * ROWS + block_row
    query_token = row // GROUP
    is_row = (block_row < ROWS) & (query_token < query_len)
    last = tl.minimum(length - query_len + query_token, length - 1)  # last token that the row sees
    query = (query_start + query_token).to(tl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
    column = tl.arange(0, K_COLUMNS)
    place = queries + query[None, :] * (PARTS * K_PLANES * K_COLUMNS) + column[:, None]
    is_query = is_row[None, :]
    if K_PLANES * K_COLUMNS > PART:
        is_query = is_query & (column < K_WORDS)[:, None]
    stats = query_stats + (PARTS + 1) * query
    query_planes = ()
    query_sums = ()
    for i in tl.static_range(PARTS * K_PLANES):
        query_planes = query_planes + (tl.load(place + i * K_COLUMNS, mask=is_query, other=0),)
    for part in tl.static_range(PARTS):
        query_sums = query_sums + (tl.load(stats + part, mask=is_row, other=0),)
    query_factor = tl.load(stats + PARTS, mask=is_row, other=0)
    if query_offsets is not None:
        query_offsets += query * num_buckets
        query_offset = tl.load(query_offsets, mask=is_row, other=0)

    maximum = tl.full([BLOCK_ROWS], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    zeros = ()  # of each part: sum of weight * v_scale * v_zero
    outs = ()
    for _ in tl.static_range(PARTS):
        zeros = zeros + (tl.zeros([BLOCK_ROWS], tl.float32),)
    for _ in tl.static_range(PARTS * V_PLANES):
        outs = outs + (tl.zeros([V_COLUMNS, BLOCK_ROWS], tl.float32),)

    table = block_table + seq.to(tl.int64) * table_stride
    head = pages.to(tl.pointer_type(tl.uint16)) + kv_head * (PARTS * (K_SPAN + V_SPAN))
    for tile in tl.range(first_tile, first_tile + num_tiles, num_stages=STAGES):
        token = tile * TILE + tl.arange(0, TILE)
        is_there = token < length
        if HAS_WINDOW:
            is_there &= token > length - query_len - window
        page = tl.load(table + token // PAGE_SIZE, mask=is_there, other=0)
        k_plane = head + page.to(tl.int64) * page_stride_16 * 8
        offset = token % PAGE_SIZE

        # Scores, [TILE, BLOCK_ROWS]
        scores = _score_part(
            k_plane,
            offset,
            is_there,
            query_planes,
            query_sums[0],
            query_factor,
            K_WORDS,
            K_COLUMNS,
            K_BITS,
            K_TYPE,
            PAGE_SIZE,
        )
        if PARTS > 1:
            scores += _score_part(
                k_plane + (K_SPAN + V_SPAN),
                offset,
                is_there,
                query_planes[K_PLANES:],
                query_sums[1],
                query_factor,
                K_WORDS,
                K_COLUMNS,
                K_BITS,
                K_TYPE,
                PAGE_SIZE,
            )
        if BY_BUCKET:  # a tile lies in one bucket
            query_offset = tl.load(query_offsets + bucket_of(tile * TILE, num_buckets), mask=is_row, other=0)
        if query_offsets is not None:
            scores += query_offset[None, :]
        if HAS_SOFTCAP:  # cap * tanh(x / cap), from scores of 2 x / cap in log2
            scores = softcap_log2 * (1 - 2 / (1 + tl.exp2(scores)))
        scores += tl.where(is_there, 0.0, -float("inf"))[:, None]
        is_visible = None
        if MAX_QUERY_LEN > 1:
            is_visible = token[:, None] <= last[None, :]
            if HAS_WINDOW:
                is_visible &= token[:, None] > (last - window)[None, :]
            scores = tl.where(is_visible, scores, -float("inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        shrink = tl.exp2(maximum - new_maximum)
        maximum = new_maximum
        weights = tl.exp2(scores - maximum[None, :])
        total = total * shrink + tl.sum(weights, 0)

        # Output, [V_COLUMNS, BLOCK_ROWS]
        new_zeros = ()
        new_outs = ()
        for part in tl.static_range(PARTS):
            zero, added = _add_values(
                k_plane + (part * (K_SPAN + V_SPAN) + K_SPAN),
                offset,
                is_there,
                is_visible,
                weights,
                shrink,
                zeros[part],
                outs[part * V_PLANES : (part + 1) * V_PLANES],
                V_WORDS,
                V_COLUMNS,
                V_BITS,
                V_TYPE,
                PAGE_SIZE,
                SWIZZLE_MULTIPLIER,
                SWIZZLE_PERIOD,
            )
            new_zeros = new_zeros + (zero,)
            new_outs = new_outs + added
        zeros = new_zeros
        outs = new_outs

    partial = tl.program_id(0).to(tl.int64) * ROWS + block_row
    tl.store(partial_stats + 2 * partial, maximum, mask=is_row)
    tl.store(partial_stats + 2 * partial + 1, total, mask=is_row)
    row_of_planes = partials + partial[None, :] * (PARTS * V_PLANES * V_COLUMNS)
    for part in tl.static_range(PARTS):
        to = row_of_planes + part * (V_PLANES * V_COLUMNS) + tl.arange(0, V_COLUMNS)[:, None]
        _store_part(to, is_row, zeros[part], outs[part * V_PLANES : (part + 1) * V_PLANES], V_COLUMNS, V_BITS)


@triton.jit
def merge_kernel(
    partials,
    partial_stats,
    splits,
    query_start_loc,
    query_offsets,
    v_gain_inverse,
    v_center,
    sinks,
    out,
    lse,
    out_token_stride,
    out_head_stride,
    lse_token_stride,
    lse_head_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    ORDER: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Grid [num_seqs, NUM_KV_HEADS * ROW_GROUPS, ROWS]. Add the chunks of one row, PIECES at a time, rotate the sum
    back, and write it.
    """
    seq, unit = tl.program_id(0), tl.program_id(1)
    row = unit % ROW_GROUPS * ROWS + tl.program_id(2)
    query_start = tl.load(query_start_loc + seq)
    query_token, kv_head = row // GROUP, unit // ROW_GROUPS
    if query_token >= tl.load(query_start_loc + seq + 1) - query_start:
        return
    first, count = tl.load(splits + 2 * seq), tl.load(splits + 2 * seq + 1)
    PART: tl.constexpr = WIDTH // PARTS
    PLANES: tl.constexpr = planes_of(V_BITS)
    COLUMNS: tl.constexpr = columns_of(PART, V_BITS)
    ROW: tl.constexpr = PARTS * PLANES * COLUMNS
    IS_PERMUTED: tl.constexpr = ROW > WIDTH  # when it is loaded; else below
    channel = tl.arange(0, WIDTH)
    place = channel
    if IS_PERMUTED:
        place = place_of(channel, PART, V_BITS)
    maximum = NO_SCORE
    total = 0.0
    y = tl.zeros([WIDTH], tl.float32)
    for start in range(0, count, PIECES):
        piece = start + tl.arange(0, PIECES)
        is_there = piece < count
        partial = ((first + piece).to(tl.int64) * tl.num_programs(1) + unit) * ROWS + tl.program_id(2)
        maxima = tl.load(partial_stats + 2 * partial, mask=is_there, other=NO_SCORE)
        sums = tl.load(partial_stats + 2 * partial + 1, mask=is_there, other=0)
        from_ = partials + partial[:, None] * ROW + place[None, :]
        outs = tl.load(from_, mask=is_there[:, None], other=0)
        if V_BITS == 3:
            has_more = is_there[:, None] & (channel % 16 == 15)[None, :]
            for i in tl.static_range(1, 3):
                outs += tl.load(from_ + 2 * i, mask=has_more, other=0) * 2**i
        new_maximum = tl.maximum(maximum, tl.max(maxima, 0))
        shrink, factor = tl.exp2(maximum - new_maximum), tl.exp2(maxima - new_maximum)
        maximum = new_maximum
        total = total * shrink + tl.sum(sums * factor, 0)
        y = y * shrink + tl.sum(outs * factor[:, None], 0)

    q_head = kv_head * GROUP + row % GROUP
    token = (query_start + query_token).to(tl.int64)
    offset = 0.0  # q.k_center, which all scores lack; only a sink and the log-sum-exp need it
    if query_offsets is not None:
        offset = tl.load(query_offsets + token * (tl.num_programs(1) // ROW_GROUPS * GROUP) + q_head)
    with_sink = total
    if sinks is not None:
        sink = tl.load(sinks + q_head).to(tl.float32) * LOG2_E - offset
        new_maximum = tl.maximum(maximum, sink)
        shrink = tl.exp2(maximum - new_maximum)
        y, total = y * shrink, total * shrink
        with_sink = total + tl.exp2(sink - new_maximum)
        maximum = new_maximum
    is_seen = with_sink != 0
    inverse = 1 / tl.where(is_seen, with_sink, 1.0)
    y *= inverse
    if not IS_PERMUTED:  # to the order of channels
        y = tl.permute(tl.reshape(y, (PARTS, PLANES, COLUMNS)), (0, 2, 1))
    y = tl.reshape(rotate(tl.reshape(y, (1, WIDTH)), ORDER), (WIDTH,))
    if v_gain_inverse is not None:
        y *= tl.load(v_gain_inverse + kv_head * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0)
    if v_center is not None:
        y += tl.load(v_center + kv_head * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0) * (total * inverse)
    to = out + token * out_token_stride + q_head * out_head_stride
    tl.store(to + channel, round_to(y, out.dtype.element_ty), mask=channel < HEAD_DIM)
    if lse is not None:
        log2_sum = tl.where(is_seen, maximum + tl.log2(tl.where(is_seen, with_sink, 1.0)) + offset, -float("inf"))
        tl.store(lse + token * lse_token_stride + q_head * lse_head_stride, log2_sum * LN_2)
