"""Attention to the newest tokens of each request, which an engine keeps in blocks of 16 bits, for steps of few new
tokens. It is joined with the attention to all older ones. A program takes one query token and KV head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sawkv.kernels.triton.common import INTERPRETED, LOG2_E, NO_SCORE, multiply, round_to, widen

TILE_BYTES = 1 << 15
"""Most bytes of K, and of V, that a program loads at once: 128 tokens of head_dim 128. Wider windows take several
rounds.
"""
WARP_BYTES = 1 << 12
"""Bytes of K, and of V, that each warp of it loads: 32 registers of a thread."""
MAX_ROWS = 16
"""Most query heads of a program."""


def attend_newest(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    window: int,
    softmax_scale: float,
    logit_softcap: float,
    sinks: torch.Tensor | None,
) -> None:
    """Add attention to the last `window` tokens of each query, its own included.

    Enqueues one launch, which does not depend on lengths. What lies before a window is not read: neither its tokens
    nor its entries of the table. Channels are contiguous everywhere, and so are the tokens of `lse`.

    Args:
        q: [num_tokens, num_q_heads, head_dim] bf16, fp16 or fp32.
        k, v: [num_blocks, block_size, num_kv_heads, head_dim] of the same dtype, with equal strides.
        block_table: [num_seqs, max_blocks] int32.
        seq_lens: [num_seqs] int32, new tokens included.
        query_start_loc: [num_seqs + 1] int32, where each sequence starts in the rows of q. One without rows is left
            out.
        max_query_len: upper bound of the new tokens of a sequence.
        out: like q, attention to all tokens before the window. Becomes that to all tokens.
        lse: [num_q_heads, num_tokens] fp32, its log-sum-exp; infinite where there are no such tokens.
        window: of tokens.
        softmax_scale, logit_softcap, sinks: as in `ops.Attention`.
    """
    _, num_q_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k.shape
    group, width = num_q_heads // num_kv_heads, triton.next_power_of_2(head_dim)
    row_bytes = width * q.element_size()
    tile = min(triton.next_power_of_2(window), TILE_BYTES // row_bytes)
    scale = 2 * softmax_scale / logit_softcap if logit_softcap else softmax_scale
    rows = min(max(8, triton.next_power_of_2(group)), MAX_ROWS)
    row_groups = -(-group // rows)
    newest_kernel[(num_kv_heads * row_groups, len(seq_lens), max_query_len)](
        q,
        k,
        v,
        block_table,
        seq_lens,
        query_start_loc,
        sinks,
        out,
        lse,
        *k.stride()[:3],
        block_table.stride(0),
        *q.stride()[:2],
        *out.stride()[:2],
        lse.stride(0),
        scale * LOG2_E.value,
        logit_softcap * LOG2_E.value,
        HEAD_DIM=head_dim,
        WIDTH=width,
        BLOCK_SIZE=block_size,
        GROUP=group,
        ROWS=rows,
        ROW_GROUPS=row_groups,
        WINDOW=window,
        TILE=tile,
        HAS_SOFTCAP=logit_softcap > 0,
        num_warps=max(1, tile * row_bytes // WARP_BYTES),
        num_stages=1,
        enable_fp_fusion=True,
    )


@triton.jit
def _hold(x):
    """x itself, on which nothing before this place depends. Triton else stores what it loads as soon as it can."""
    if INTERPRETED:
        return x
    else:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK)


@triton.jit(do_not_specialize=["table_stride", "lse_head_stride"])  # which differ from step to step
def newest_kernel(
    q,
    k,
    v,
    block_table,
    seq_lens,
    query_start_loc,
    sinks,
    out,
    lse,
    block_stride,
    token_stride,
    head_stride,
    table_stride,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    lse_head_stride,
    scale_log2,
    softcap_log2,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Grid [num_kv_heads * ROW_GROUPS, num_seqs, max_query_len]. Tokens are the rows of products, as in
    `decode_kernel`. A program lives for three rounds of loads: lengths, the table, and all else.
    """
    seq, query = tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start_loc + seq)
    query_len = tl.load(query_start_loc + seq + 1) - start
    seq_len = tl.load(seq_lens + seq)
    if query >= query_len:
        return
    end = seq_len - query_len + query + 1  # of the tokens that the query sees
    row = (start + query).to(tl.int64)
    head, of_group = tl.program_id(0) // ROW_GROUPS, tl.program_id(0) % ROW_GROUPS * ROWS + tl.arange(0, ROWS)
    q_head, is_row = head * GROUP + of_group, of_group < GROUP
    channel = tl.arange(0, WIDTH)
    is_channel = channel < HEAD_DIM
    is_there = is_channel[:, None] & is_row[None, :]
    to = out + row * out_token_stride + q_head[None, :] * out_head_stride + channel[:, None]
    older = tl.load(to, mask=is_there, other=0)
    older_lse = tl.load(lse + q_head * lse_head_stride + row, mask=is_row, other=-float("inf"))

    maximum = tl.full([ROWS], NO_SCORE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([WIDTH, ROWS], tl.float32)
    table = block_table + seq.to(tl.int64) * table_stride
    for begin in range(0, WINDOW, TILE):
        token = tl.maximum(end - WINDOW, 0) + begin + tl.arange(0, TILE)
        is_seen = token < end
        block = tl.load(table + token // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        place = block * block_stride + token % BLOCK_SIZE * token_stride + head * head_stride
        keys = tl.load(k + place[:, None] + channel[None, :], mask=is_seen[:, None] & is_channel[None, :], other=0)
        values = tl.load(v + place[None, :] + channel[:, None], mask=is_seen[None, :] & is_channel[:, None], other=0)
        queries = tl.load(
            q + row * q_token_stride + q_head[None, :] * q_head_stride + channel[:, None], mask=is_there, other=0
        )
        tl.debug_barrier()  # all loads are under way before one is waited for
        keys, values, queries = _hold(keys), _hold(values), _hold(queries)
        scores = multiply(keys, queries, tl.zeros([TILE, ROWS], tl.float32)) * scale_log2
        if HAS_SOFTCAP:  # cap * tanh(x / cap), from scores of 2 x / cap in log2
            scores = softcap_log2 * (1 - 2 / (1 + tl.exp2(scores)))
        scores = tl.where(is_seen[:, None], scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        shrink = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum[None, :])
        total = total * shrink + tl.sum(weights, 0)
        sums = multiply(values, round_to(weights, values.dtype), sums * shrink[None, :])
        maximum = new_maximum

    # The older tokens are one value, whose score is their log-sum-exp.
    is_older = tl.abs(older_lse) != float("inf")
    score = tl.where(is_older, older_lse * LOG2_E, NO_SCORE)
    new_maximum = tl.maximum(maximum, score)
    shrink, weight = tl.exp2(maximum - new_maximum), tl.where(is_older, tl.exp2(score - new_maximum), 0.0)
    total = total * shrink + weight
    if sinks is not None:
        total += tl.exp2(tl.load(sinks + q_head, mask=is_row, other=0).to(tl.float32) * LOG2_E - new_maximum)
    inverse = 1 / tl.where(total != 0, total, 1.0)
    older = tl.where(is_older[None, :], widen(older), 0.0)
    sums = sums * (shrink * inverse)[None, :] + older * (weight * inverse)[None, :]
    tl.store(to, round_to(sums, out.dtype.element_ty), mask=is_there)
