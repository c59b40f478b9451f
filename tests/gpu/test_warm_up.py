"""Nothing is compiled after the warm-up: `pytest -m gpu tests/gpu/test_warm_up.py`. Needs FlashAttention 4."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from sawkv import CacheFormat, PageLayout, ops
from sawkv.kernels import cuda
from tests.vllm.test_warm_up import make_builder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.filterwarnings("ignore")  # CUTLASS warns of its own code while it compiles
@pytest.mark.parametrize("most_seqs", [64, 1024])
def test_flash_attention_4_compiles_nothing_later(most_seqs: int) -> None:
    """Prompts of all lengths over contexts of all lengths, alone and with others; the shape is Gemma 4's."""
    interface = pytest.importorskip("vllm.vllm_flash_attn.cute.interface")
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    from sawkv.integrations.vllm.prefill import FlashPrefill

    caches = [found for each in vars(interface).values() if (found := getattr(each, "compile_cache", None)) is not None]
    for cache in caches:
        cache.clear()

    def count() -> int:
        return sum(len(cache.cache) for cache in caches)

    heads, kv_heads, head_dim = 16, 2, 512
    prefill: Any = object.__new__(FlashPrefill)
    prefill.capacity, prefill.dtype, prefill._sinks = 40_000, torch.bfloat16, None
    prefill.shape, prefill._flash_attention = (prefill.capacity, kv_heads, head_dim), flash_attn_varlen_func
    prefill._options = {"softmax_scale": 1.0, "causal": True, "window_size": [-1, -1], "softcap": 0.0, "fa_version": 4}
    rows = torch.randn(2, prefill.capacity, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda")
    prefill.workspace = rows.unbind
    started = time.monotonic()
    prefill.warm_up(heads, most_seqs)
    torch.cuda.synchronize()
    compiled = count()
    print(f"{compiled} kernels in {time.monotonic() - started:.1f} s")
    assert compiled >= 3
    for query_len in (1, 8, 9, 16, 17, 32, 33, 100, 700):
        for num_seqs in sorted({1, 2, 40, 257, most_seqs}):
            for context in (query_len, query_len + 5000, 30_000):
                if num_seqs > most_seqs or max(query_len, context) * num_seqs > prefill.capacity:
                    continue
                q = torch.randn(num_seqs * query_len, heads, head_dim, dtype=torch.bfloat16, device="cuda")
                starts, ends = (
                    torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda") * n for n in (query_len, context)
                )
                k, v = rows[:, : num_seqs * context]
                prefill._attend(q, k, v, torch.empty_like(q), starts, ends, query_len, context)
                assert count() == compiled, (query_len, num_seqs, context)
    torch.cuda.synchronize()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="turns on Hopper"
)
@pytest.mark.parametrize("window", [0, 1024])
def test_a_layer_compiles_nothing_later(window: int) -> None:
    """Decodes, turns of both kinds, prompts, many and few tokens. The warm-up leaves the pages as they are."""
    layout = PageLayout(CacheFormat("int4"), 8, 128, 64)
    builder, layer = make_builder(layout, window, "cuda:0")
    builder.warm_up()
    torch.cuda.synchronize()
    assert not layer.kv_cache.any()
    misses = cuda.runtime._load.cache_info().misses
    attention, alike = layer.impl._attention, layer.impl.alike

    def whole(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    for tokens in (1, 200):
        k = torch.randn(tokens, 8, 128, dtype=torch.bfloat16, device="cuda")
        slots = torch.arange(tokens, device="cuda")
        attention.append(k, k, slots, slots)
    for limit, tokens in ((1, 1), (16, 9), (128, 100)):
        step = builder._schedule(alike, limit).update(whole(0, 1, 2, 3)[None], whole(200), whole(0, tokens))
        out = attention(torch.randn(tokens, 32, 128, dtype=torch.bfloat16, device="cuda"), step)
        assert out.isfinite().all()
        assert out.any()
    k, v = torch.empty(2, 200, 8, 128, dtype=torch.bfloat16, device="cuda")
    first = whole(0) if window else None
    attention.gather(ops.prefixes(whole(0, 1, 2, 3)[None], whole(200), whole(0, 200), first), k, v, rotated=False)
    torch.cuda.synchronize()
    assert cuda.runtime._load.cache_info().misses == misses
