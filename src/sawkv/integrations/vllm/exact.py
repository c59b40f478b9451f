"""Exact attention of a prompt to its own tokens, for layers that measure on a CPU."""

from __future__ import annotations

import torch

QUERY_BLOCK = 256
"""Queries per block of attention. Scores of a window of 2,048 tokens then take 2 MB per head."""


def attend_exactly(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    sliding_window: int = 0,
    logit_softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of one prompt to its own tokens in fp32, one block of queries at a time. Arguments as in
    `ops.decode_attention`.

    Args:
        q: [num_tokens, num_q_heads, head_dim].
        k, v: [num_tokens, num_kv_heads, head_dim].

    Returns:
        [num_tokens, num_q_heads, head_dim] fp32.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    # [kv heads, queries a head, tokens, head_dim]
    queries = q.float().view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    keys, values = (x.float().transpose(0, 1)[:, None] for x in (k, v))
    out = torch.empty(num_tokens, num_q_heads, head_dim, dtype=torch.float32, device=q.device)
    places = torch.arange(num_tokens, device=q.device)
    for first in range(0, num_tokens, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, num_tokens)
        start = max(0, first - sliding_window + 1) if sliding_window else 0
        scores = softmax_scale * queries[:, :, first:last] @ keys[:, :, start:last].mT
        if logit_softcap:
            scores = logit_softcap * torch.tanh(scores / logit_softcap)
        distance = places[first:last, None] - places[start:last]
        unseen = distance < 0 if not sliding_window else (distance < 0) | (distance >= sliding_window)
        scores = scores.masked_fill_(unseen, -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(num_kv_heads, -1, 1, 1).expand(-1, -1, last - first, 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1)[..., : last - start]
        out[first:last] = (weights @ values[:, :, start:last]).permute(2, 0, 1, 3).flatten(1, 2)
    return out
