"""The kernels on plain tensors: check the arguments, choose a backend, run it.

Data flow: K and V of new tokens -> `append` -> pages; Q and pages -> `decode_attention` -> output; pages -> `gather` -> 16-bit K and V.
Only `append` mutates the cache. On a GPU no function synchronizes, allocates or depends on lengths on the host (CUDA-graph safe).
"""

from __future__ import annotations

import torch

from sawkv.cache import PagedKVCache
from sawkv.errors import LayoutError
from sawkv.format.layout import PageLayout
from sawkv.kernels import Backend, DecodePlan, select_backend

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedKVCache,
    slot_mapping: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Center, multiply by gains, rotate, quantize, pack and write new tokens' K and V into their slots.

    y = H ((x - center) * gain);  code = clamp(round(y / scale + zero_point), 0, 15);  y ~ (code - zero_point) * scale.
    Scale and zero point are those of a (token, KV head), centers and gains of a KV head.
    Source: SAW-INT4, arXiv 2604.19157. Bytes and departures: docs/format.md.

    Args:
        k, v: [num_tokens, num_kv_heads, head_dim] bf16, fp16 or fp32, K after RoPE; any strides with contiguous channels.
        cache: mutated.
        slot_mapping: [num_slots <= num_tokens] int64, `page * page_size + offset`; rows of k and v beyond it are padding.
            Negative and out-of-range slots are skipped. Slots must not repeat.
        backend: a name from `sawkv doctor`; None chooses by device and format.

    Raises:
        LayoutError: shape, dtype or device mismatch.
        UnsupportedError: no backend, or not the named one, can run this.

    Reference: kernels.reference.append.
    """
    layout = cache.layout
    for name, x in (("k", k), ("v", v)):
        _check(name, x, (None, layout.num_kv_heads, layout.head_dim), FLOAT_DTYPES, cache)
    if k.shape != v.shape or k.dtype != v.dtype:
        raise LayoutError(f"k and v: expected equal shapes and dtypes, got {_show(k)} and {_show(v)}")
    _check("slot_mapping", slot_mapping, (None,), (torch.int64,), cache)
    if slot_mapping.shape[0] > k.shape[0]:
        raise LayoutError(f"slot_mapping: expected at most {k.shape[0]} slots, one for each token, got {slot_mapping.shape[0]}")
    _backend(cache, backend).append(k, v, cache, slot_mapping)


def decode_attention(
    q: torch.Tensor,
    cache: PagedKVCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    softmax_scale: float,
    max_query_len: int,
    sliding_window: int = 0,
    logit_softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    plan: DecodePlan | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's last tokens over its pages, read as they are stored.

    score = softmax_scale * ((H (q / k_gain)).y_k + q.k_center), soft-capped as `cap * tanh(score / cap)`; weights are the softmax over
    the visible keys (and the sink); out = (H sum(weight * y_v)) / v_gain + v_center, with y_k and y_v the rows as they are stored. All that
    is done to Q and to the output happens here. q.k_center is computed only for a soft-cap, sinks or lse: else it changes nothing.

    Args:
        q: [num_tokens, num_q_heads, head_dim] bf16, fp16 or fp32, after RoPE, not rotated; contiguous channels. The query tokens of
            sequence i are rows query_start_loc[i] to query_start_loc[i + 1], and are its last tokens: append comes first.
        cache: read only.
        block_table: [num_seqs, max_pages] int32, page of each `page_size` tokens. Entries past a sequence's length may hold anything.
        seq_lens: [num_seqs] int32, tokens in the cache, query tokens included. 0 is allowed.
        query_start_loc: [num_seqs + 1] int32, non-decreasing from 0.
        softmax_scale: usually head_dim ** -0.5.
        max_query_len: the most query tokens any sequence has. GPU backends take 1 to 8; CPU backends any number.
        sliding_window: a query sees this many tokens, itself included; 0 is no limit.
        logit_softcap: 0 is none.
        sinks: [num_q_heads], a logit per head that takes part in the softmax and carries no value.
        out: [num_tokens, num_q_heads, head_dim] of q's dtype; allocated if None. Rows of no sequence are left as they are.
        lse: [num_tokens, num_q_heads] fp32, filled with the natural log-sum-exp of the scores as above (sink included).
        plan: from `make_decode_plan`, updated with these lengths. Without one the schedule is made in this call.
        backend: a name from `sawkv doctor`; None chooses by device and format.

    Returns:
        `out`. A query that sees no key gives zeros.

    Raises:
        LayoutError: shape, dtype or device mismatch.
        UnsupportedError: no backend, or not the named one, can run this.

    Reference: kernels.reference.decode_attention.
    """
    layout = cache.layout
    _check("q", q, (None, None, layout.head_dim), FLOAT_DTYPES, cache)
    num_tokens, num_q_heads = q.shape[:2]
    if num_q_heads == 0 or num_q_heads % layout.num_kv_heads:
        raise LayoutError(f"q: expected a multiple of num_kv_heads {layout.num_kv_heads} heads, got {num_q_heads}")
    _check("seq_lens", seq_lens, (None,), (torch.int32,), cache)
    num_seqs = seq_lens.shape[0]
    _check("block_table", block_table, (num_seqs, None), (torch.int32,), cache)
    _check("query_start_loc", query_start_loc, (num_seqs + 1,), (torch.int32,), cache)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _check("out", out, (num_tokens, num_q_heads, layout.head_dim), (q.dtype,), cache)
    if sinks is not None:
        _check("sinks", sinks, (num_q_heads,), FLOAT_DTYPES, cache)
    if lse is not None:
        _check("lse", lse, (num_tokens, num_q_heads), (torch.float32,), cache, any_strides=True)
    if max_query_len < 1 or sliding_window < 0 or logit_softcap < 0:
        raise LayoutError(
            "expected max_query_len >= 1, sliding_window >= 0 and logit_softcap >= 0, "
            f"got {max_query_len}, {sliding_window} and {logit_softcap}"
        )
    _backend(cache, backend).decode_attention(
        q,
        cache,
        block_table,
        seq_lens,
        query_start_loc,
        out,
        lse,
        softmax_scale=softmax_scale,
        max_query_len=max_query_len,
        sliding_window=sliding_window,
        logit_softcap=logit_softcap,
        sinks=sinks,
        plan=plan,
    )
    return out


def make_decode_plan(
    layout: PageLayout,
    device: torch.device,
    *,
    num_q_heads: int,
    max_num_seqs: int,
    max_query_len: int,
    sliding_window: int = 0,
    backend: str | None = None,
) -> DecodePlan:
    """A schedule that the layers of one step share: call its `update` once a step, and give it to each layer's `decode_attention`.

    The plan has its buffers for good, so that a CUDA graph may hold `decode_attention` while `update` runs before each replay, or is
    captured with it. It serves one stream at a time.

    Args:
        layout: of the layers' pages.
        device: of the pages.
        num_q_heads, max_query_len, sliding_window: as `decode_attention` will get them.
        max_num_seqs: sequences in the largest batch.
        backend: as in `decode_attention`.

    Raises:
        UnsupportedError: no backend, or not the named one, can run this.
    """
    return select_backend(device, layout, backend).make_plan(layout, device, num_q_heads, max_num_seqs, max_query_len, sliding_window)


def gather(
    cache: PagedKVCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    *,
    rotated: bool = True,
    backend: str | None = None,
) -> None:
    """Decode the pages of many sequences into contiguous K and V, for an engine's own prefill attention.

    Rows that stay as they are stored need Q divided by K's gains and rotated by K's order before the attention, and its output rotated by
    V's order and divided by V's gains after it (`rotation.rotate` is its own inverse), before V's center is added. Scores of such rows lack
    softmax_scale * q.k_center: whoever has a soft-cap adds it to every score before the cap; whoever has sinks and none subtracts it
    from the query's sink.

    Args:
        cache: read only.
        block_table: [num_seqs, max_pages] int32.
        seq_lens: [num_seqs] int32, tokens to read of each sequence.
        cu_seq_lens: [num_seqs + 1] int32, where each sequence starts in the outputs; cu_seq_lens[i + 1] >= cu_seq_lens[i] + seq_lens[i].
        k_out, v_out: [max_tokens, num_kv_heads, head_dim] bf16, fp16 or fp32, contiguous. Filled up to what is gathered; tokens that would
            fall past max_tokens are dropped.
        rotated: leave the rows as they are stored: centered, multiplied by gains and rotated; otherwise give K and V as `append` got them,
            quantized.
        backend: a name from `sawkv doctor`; None chooses by device and format.

    Raises:
        LayoutError: shape, dtype or device mismatch.
        UnsupportedError: no backend, or not the named one, can run this.

    Reference: kernels.reference.gather.
    """
    layout = cache.layout
    _check("seq_lens", seq_lens, (None,), (torch.int32,), cache)
    _check("block_table", block_table, (seq_lens.shape[0], None), (torch.int32,), cache)
    _check("cu_seq_lens", cu_seq_lens, (seq_lens.shape[0] + 1,), (torch.int32,), cache)
    for name, x in (("k_out", k_out), ("v_out", v_out)):
        _check(name, x, (None, layout.num_kv_heads, layout.head_dim), FLOAT_DTYPES, cache)
        if not x.is_contiguous():
            raise LayoutError(f"{name}: expected a contiguous tensor, got strides {list(x.stride())}")
    if k_out.shape != v_out.shape or k_out.dtype != v_out.dtype:
        raise LayoutError(f"k_out and v_out: expected equal shapes and dtypes, got {_show(k_out)} and {_show(v_out)}")
    _backend(cache, backend).gather(cache, block_table, seq_lens, cu_seq_lens, k_out, v_out, rotated=rotated)


def _backend(cache: PagedKVCache, name: str | None) -> Backend:
    return select_backend(cache.pages.device, cache.layout, name)


def _check(
    name: str,
    x: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    cache: PagedKVCache,
    any_strides: bool = False,
) -> None:
    if x.dtype in dtypes and x.device == cache.pages.device and _fits(x.shape, shape):
        if x.stride(-1) == 1 or any_strides or x.shape[-1] < 2 or not x.numel():
            return
        raise LayoutError(f"{name}: expected a contiguous last dimension, got strides {list(x.stride())}")
    if not _fits(x.shape, shape) or x.dtype not in dtypes:
        expected_shape = ", ".join("*" if size is None else str(size) for size in shape)
        expected_dtype = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise LayoutError(f"{name}: expected {expected_dtype} [{expected_shape}], got {_show(x)}")
    raise LayoutError(f"{name}: expected device {cache.pages.device}, that of the pages, got {x.device}")


def _fits(got: torch.Size, wanted: tuple[int | None, ...]) -> bool:
    if len(got) != len(wanted):
        return False
    for i, size in enumerate(wanted):  # noqa: SIM110  # a generator takes twice the time, and this runs for every layer
        if size is not None and size != got[i]:
            return False
    return True


def _show(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
