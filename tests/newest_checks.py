"""Attention to the newest tokens in 16 bits: what the kernel computes, and its check against that."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from tests.conftest import relative_error
from tests.kernel_checks import MAX_ERROR, starts_of


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
    """As `sawkv.kernels.triton.recent` has it, in fp32."""
    group, starts = q.shape[1] // k.shape[2], query_start_loc.tolist()
    for seq, (start, stop) in enumerate(itertools.pairwise(starts)):
        assert stop - start <= max_query_len
        for row in range(start, stop):
            end = int(seq_lens[seq]) - stop + row + 1
            token = torch.arange(max(end - window, 0), end)
            place = block_table[seq, token // k.shape[1]].long(), token % k.shape[1]
            keys, values = (x[place].float().repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("hd,khd->hk", q[row].float(), keys) * softmax_scale
            scores = logit_softcap * torch.tanh(scores / logit_softcap) if logit_softcap else scores
            others = [lse[:, row].masked_fill(lse[:, row].isinf(), -torch.inf)]
            others += [] if sinks is None else [sinks.float()]
            weights = torch.cat([scores, torch.stack(others, 1)], 1).softmax(1)
            older = out[row].float().masked_fill(others[0].isinf()[:, None], 0)
            near = torch.einsum("hk,khd->hd", weights[:, : len(token)], values)
            out[row] = near + weights[:, len(token), None] * older


def check_newest(
    device: str,
    *,
    window: int = 32,
    head_dim: int = 64,
    group: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    seq_lens: Sequence[int] = (1, 20, 0, 33, 300, 48),
    query_lens: Sequence[int] = (1, 1, 0, 1, 1, 1),
    softcap: float = 0.0,
    has_sinks: bool = False,
    wrong: dict[str, Any] | None = None,
) -> None:
    """Attention to the newest tokens, joined with that to older ones, equals fp32's. Blocks are permuted, and lie in
    memory as vLLM has them: K beside V, by head, in pages that are longer. All that no query sees is NaN.

    wrong: what the kernel is given in place of the right argument.
    """
    from sawkv.kernels.triton import recent

    size, kv_heads = 16, 2
    counts = [-(-length // size) for length in seq_lens]
    num_blocks, starts = sum(counts) + 2, starts_of(query_lens, "cpu")
    ids = torch.randperm(sum(counts)).add(1).int().split(counts)  # the first and the last are of nobody
    table = torch.full((len(seq_lens), max(counts) + 3), num_blocks - 1, dtype=torch.int32)
    raw = torch.full((num_blocks, kv_heads * size * 2 * head_dim + 64), math.nan, dtype=dtype)
    blocks = raw[:, :-64].view(num_blocks, kv_heads, size, 2 * head_dim).transpose(1, 2)
    for i, (length, new) in enumerate(zip(seq_lens, query_lens, strict=True)):
        token = torch.arange(max(length - new - window + 1, 0) if new else length, length)
        table[i, : counts[i]] = ids[i]
        blocks[table[i, token // size].long(), token % size] = torch.randn(len(token), kv_heads, 2 * head_dim).to(dtype)
        table[i, : (length - len(token)) // size] = 0
    heads, rows = kv_heads * group, int(starts[-1]) + 2  # two of padding
    fused = torch.randn(rows, 3, heads, head_dim).to(dtype)  # queries are strided, as engines give them
    older, lse = torch.randn(rows, heads, head_dim).to(dtype), 3 * torch.randn(heads, rows)
    lse[:, ::3], lse[::2, 1::3] = -math.inf, math.inf  # of nothing, as two FlashAttentions say it
    older[lse.t().isinf()] = math.nan
    given: dict[str, Any] = {
        "block_table": table,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "query_start_loc": starts,
        "max_query_len": max(query_lens),
        "lse": lse,
        "window": window,
        "softmax_scale": head_dim**-0.5,
        "logit_softcap": softcap,
        "sinks": torch.randn(heads) if has_sinks else None,
    }
    want, got = older.float(), older.to(device)
    attend_newest(fused[:, 1], *blocks.split(head_dim, -1), out=want, **given)
    blocks = raw.to(device)[:, :-64].view(num_blocks, kv_heads, size, 2 * head_dim).transpose(1, 2)
    given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in (given | (wrong or {})).items()}
    recent.attend_newest(fused.to(device)[:, 1], *blocks.split(head_dim, -1), out=got, **given)
    assert torch.equal(got[-2:].cpu().nan_to_num(), older[-2:].nan_to_num()), "padding"
    error = relative_error(got[:-2].cpu(), want[:-2])
    assert error <= (MAX_ERROR if dtype.itemsize == 2 else 1e-5), error
