"""Decode attention: `schedule_kernel` once per step; `prepare_kernel`, `decode_kernel` and `merge_kernel` per layer.

Keys are split into chunks of whole tiles, enough to fill the GPU. A program attends to one chunk with the query
rows of one KV head, and `merge_kernel` adds the chunks of a sequence. Codes are neither converted nor scaled one by one
(`common.codes_in`):

    score = k_scale * (q . n - k_zero * sum(q));    out = sum(p * v_scale * n) - sum(p * v_scale * v_zero).

A row of codes is read as 16-bit words of PLANES codes each. Plane i, the i-th code of every word, holds channels c with
c % PLANES == i. Queries and partial results have the order of planes. Tokens are the rows of products, because there
may be only 8 query rows. Over 400 lines: four kernels that share these conventions.

A head of 512 channels is stored as PARTS = 2 rows, each with its own scale and zero point. Scores are summed over the
parts, and each part has results of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sawkv.kernels.triton.common import (
    INTERPRETED,
    LN_2,
    LOG2_E,
    bucket_of,
    codes_in,
    high_half,
    low_half,
    multiply,
    rotate,
    round_to,
    swizzled,
    widen,
)

ODD_NIBBLE = tl.constexpr(16.0)
"""Factor of odd nibbles, which are not shifted."""
V_SHIFT = tl.constexpr(60)
"""Weights are stored in bf16 times 2^V_SHIFT, which keeps them in range for every fp16 scale."""
NO_SCORE = tl.constexpr(-1e30)


@triton.jit
def _visible_tiles(seq_len, query_len, window, TILE: tl.constexpr):
    """First tile that any query sees, and the number of tiles from there."""
    first_token = tl.where(window > 0, tl.maximum(seq_len - query_len - window + 1, 0), 0)
    first = first_token // TILE
    return first, tl.where(query_len > 0, (seq_len + TILE - 1) // TILE - first, 0)


@triton.jit
def _pieces(tiles, tiles_per_chunk, MAX_PIECES: tl.constexpr):
    return tl.minimum((tiles + tiles_per_chunk - 1) // tiles_per_chunk, MAX_PIECES)


@triton.jit
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
    BITS: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Divide query rows by K's gains, rotate them, and round them to 16 bits in the order of parts and planes: queries
    [num_rows, WIDTH], by (token, query head).

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
    PLANES: tl.constexpr = 16 // BITS
    if BITS == 4:
        y = tl.where(channel % 2 == 1, y / ODD_NIBBLE, y)
    place = channel // PART * PART + channel % PLANES * (PART // PLANES) + channel % PART // PLANES
    tl.store(queries + row[:, None].to(tl.int64) * WIDTH + place, round_to(y, element), mask=(row < num_rows)[:, None])
    CODE_EXPONENT: tl.constexpr = 24 if BITS < 16 else 0  # codes are n * 2^-24
    factor = scale_log2 * ((exponent - 13 + CODE_EXPONENT + 127) << 23).to(tl.float32, bitcast=True)
    stats = query_stats + (PARTS + 1) * row
    part = tl.arange(0, PARTS)[None, :]
    tl.store(stats[:, None] + part, totals * 2.0**-CODE_EXPONENT, mask=(row < num_rows)[:, None])
    tl.store(stats + PARTS, factor, mask=row < num_rows)


@triton.jit
def _load_query_planes(place, is_row, COLUMNS: tl.constexpr, PLANES: tl.constexpr):
    """Planes of a part of the query rows, each [COLUMNS, BLOCK_ROWS]. Planes that do not exist repeat the first."""
    q0 = tl.load(place, mask=is_row[None, :], other=0)
    q1 = q0
    q2 = q0
    q3 = q0
    if PLANES > 1:
        q1 = tl.load(place + COLUMNS, mask=is_row[None, :], other=0)
    if PLANES > 2:
        q2 = tl.load(place + 2 * COLUMNS, mask=is_row[None, :], other=0)
        q3 = tl.load(place + 3 * COLUMNS, mask=is_row[None, :], other=0)
    return q0, q1, q2, q3


@triton.jit
def _score_part(
    k_plane,
    offset,
    is_there,
    q0,
    q1,
    q2,
    q3,
    query_sum,
    query_factor,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    K_TYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Scores of a tile's tokens by one part of their rows, [TILE, BLOCK_ROWS]."""
    PLANES: tl.constexpr = 16 // BITS
    column = tl.arange(0, COLUMNS)
    k_place = offset[:, None] * WORDS + column[None, :]
    words = tl.load(k_plane[:, None] + k_place, mask=is_there[:, None] & (column < WORDS)[None, :], other=0)
    scores = tl.zeros([offset.shape[0], q0.shape[1]], tl.float32)
    scores = multiply(codes_in(words, 0, BITS, K_TYPE), q0, scores)
    if PLANES > 1:
        scores = multiply(codes_in(words, 1, BITS, K_TYPE), q1, scores)
    if PLANES > 2:
        scores = multiply(codes_in(words, 2, BITS, K_TYPE), q2, scores)
        scores = multiply(codes_in(words, 3, BITS, K_TYPE), q3, scores)
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
    out0,
    out1,
    out2,
    out3,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    V_TYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SWIZZLE_MULTIPLIER: tl.constexpr,
    SWIZZLE_PERIOD: tl.constexpr,
):
    """Planes of one part of the output, each [COLUMNS, BLOCK_ROWS], with a tile's tokens added, and the sum of zero
    points to subtract.
    """
    PLANES: tl.constexpr = 16 // BITS
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
    out0 = multiply(codes_in(words, 0, BITS, V_TYPE), rounded, out0 * shrink[None, :])
    if PLANES > 1:
        out1 = multiply(codes_in(words, 1, BITS, V_TYPE), rounded, out1 * shrink[None, :])
    if PLANES > 2:
        out2 = multiply(codes_in(words, 2, BITS, V_TYPE), rounded, out2 * shrink[None, :])
        out3 = multiply(codes_in(words, 3, BITS, V_TYPE), rounded, out3 * shrink[None, :])
    return zero, out0, out1, out2, out3


@triton.jit
def _store_part(to, is_row, zero, out0, out1, out2, out3, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """One part of a chunk's output, converted to the unit of values."""
    if BITS < 16:
        offset = (zero * 2.0**-V_SHIFT)[None, :]
        EVEN: tl.constexpr = 2.0 ** (133 - V_SHIFT)  # codes are n * 2^-133
        ODD: tl.constexpr = EVEN / ODD_NIBBLE if BITS == 4 else EVEN
        tl.store(to, out0 * EVEN - offset, mask=is_row[None, :])
        tl.store(to + COLUMNS, out1 * ODD - offset, mask=is_row[None, :])
        if BITS == 4:
            tl.store(to + 2 * COLUMNS, out2 * EVEN - offset, mask=is_row[None, :])
            tl.store(to + 3 * COLUMNS, out3 * ODD - offset, mask=is_row[None, :])
    else:
        tl.store(to, out0, mask=is_row[None, :])


@triton.jit
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
    BITS: tl.constexpr,
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
    partials: [max_chunks, NUM_KV_HEADS * ROW_GROUPS, ROWS, WIDTH] fp32 in the order of parts and planes, not divided by
    the sum of the weights.
    partial_stats: [max_chunks, NUM_KV_HEADS * ROW_GROUPS, ROWS, 2] fp32: maximum of the scores in log2, and sum of
    weights.
    """
    UNITS: tl.constexpr = NUM_KV_HEADS * ROW_GROUPS
    PLANES: tl.constexpr = 16 // BITS
    PART: tl.constexpr = WIDTH // PARTS
    COLUMNS: tl.constexpr = PART // PLANES
    WORDS: tl.constexpr = HEAD_DIM // PARTS // PLANES  # words per row; the rest is padding
    IS_CODED: tl.constexpr = BITS < 16
    HALF_SPAN: tl.constexpr = PAGE_SIZE * (WORDS + (2 if IS_CODED else 0))  # in 16-bit words
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
    column = tl.arange(0, COLUMNS)
    place = queries + query[None, :] * WIDTH + column[:, None]
    q0, q1, q2, q3 = _load_query_planes(place, is_row, COLUMNS, PLANES)
    stats = query_stats + (PARTS + 1) * query
    query_sum = tl.load(stats, mask=is_row, other=0)
    query_factor = tl.load(stats + PARTS, mask=is_row, other=0)
    if PARTS > 1:
        q4, q5, q6, q7 = _load_query_planes(place + PART, is_row, COLUMNS, PLANES)
        second_query_sum = tl.load(stats + 1, mask=is_row, other=0)
    if query_offsets is not None:
        query_offsets += query * num_buckets
        query_offset = tl.load(query_offsets, mask=is_row, other=0)

    maximum = tl.full([BLOCK_ROWS], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    zero = tl.zeros([BLOCK_ROWS], tl.float32)  # sum of weight * v_scale * v_zero
    out0 = tl.zeros([COLUMNS, BLOCK_ROWS], tl.float32)
    out1 = out0
    out2 = out0
    out3 = out0
    if PARTS > 1:
        second_zero = zero
        out4 = out0
        out5 = out0
        out6 = out0
        out7 = out0

    table = block_table + seq.to(tl.int64) * table_stride
    head = pages.to(tl.pointer_type(tl.uint16)) + kv_head * (PARTS * 2 * HALF_SPAN)
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
            k_plane, offset, is_there, q0, q1, q2, q3, query_sum, query_factor, WORDS, COLUMNS, BITS, K_TYPE, PAGE_SIZE
        )
        if PARTS > 1:
            scores += _score_part(
                k_plane + 2 * HALF_SPAN,
                offset,
                is_there,
                q4,
                q5,
                q6,
                q7,
                second_query_sum,
                query_factor,
                WORDS,
                COLUMNS,
                BITS,
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

        # Output, [COLUMNS, BLOCK_ROWS]
        v_plane = k_plane + HALF_SPAN
        zero, out0, out1, out2, out3 = _add_values(
            v_plane,
            offset,
            is_there,
            is_visible,
            weights,
            shrink,
            zero,
            out0,
            out1,
            out2,
            out3,
            WORDS,
            COLUMNS,
            BITS,
            V_TYPE,
            PAGE_SIZE,
            SWIZZLE_MULTIPLIER,
            SWIZZLE_PERIOD,
        )
        if PARTS > 1:
            second_zero, out4, out5, out6, out7 = _add_values(
                v_plane + 2 * HALF_SPAN,
                offset,
                is_there,
                is_visible,
                weights,
                shrink,
                second_zero,
                out4,
                out5,
                out6,
                out7,
                WORDS,
                COLUMNS,
                BITS,
                V_TYPE,
                PAGE_SIZE,
                SWIZZLE_MULTIPLIER,
                SWIZZLE_PERIOD,
            )

    partial = tl.program_id(0).to(tl.int64) * ROWS + block_row
    tl.store(partial_stats + 2 * partial, maximum, mask=is_row)
    tl.store(partial_stats + 2 * partial + 1, total, mask=is_row)
    to = partials + partial[None, :] * WIDTH + column[:, None]
    _store_part(to, is_row, zero, out0, out1, out2, out3, COLUMNS, BITS)
    if PARTS > 1:
        _store_part(to + PART, is_row, second_zero, out4, out5, out6, out7, COLUMNS, BITS)


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
    BITS: tl.constexpr,
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
    PLANES: tl.constexpr = 16 // BITS
    channel = tl.arange(0, WIDTH)
    maximum = NO_SCORE
    total = 0.0
    y = tl.zeros([WIDTH], tl.float32)
    for start in range(0, count, PIECES):
        piece = start + tl.arange(0, PIECES)
        is_there = piece < count
        partial = ((first + piece).to(tl.int64) * tl.num_programs(1) + unit) * ROWS + tl.program_id(2)
        maxima = tl.load(partial_stats + 2 * partial, mask=is_there, other=NO_SCORE)
        sums = tl.load(partial_stats + 2 * partial + 1, mask=is_there, other=0)
        outs = tl.load(partials + partial[:, None] * WIDTH + channel[None, :], mask=is_there[:, None], other=0)
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
    y = tl.reshape(y * inverse, (PARTS, PLANES, WIDTH // PARTS // PLANES))
    y = tl.permute(y, (0, 2, 1))  # to the order of channels
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
