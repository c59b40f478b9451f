"""Two controls that separate plumbing errors from quantization noise, and one that must fail.

Prefix-cache hits, chunked prefill and preemption all happen in these runs, and are asserted to.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.vllm.engine import run_engine

pytestmark = pytest.mark.vllm

TOKENS = 256


def prompts() -> list[list[list[int]]]:
    """Two waves of 8 prompts that share prefixes; the second wave repeats prompts of the first, and so hits the prefix
    cache.
    """
    draw = random.Random(0)
    shared = [draw.randrange(300, 2000) for _ in range(300)]
    first = [
        shared[: draw.randrange(140, 300)] + [draw.randrange(300, 2000) for _ in range(draw.randrange(1, 200))]
        for _ in range(8)
    ]
    return [first, [prompt + [draw.randrange(300, 2000) for _ in range(5)] for prompt in first]]


def engine(**options: Any) -> dict[str, Any]:
    # 75 pages of 32 tokens hold neither all eight requests (preemption) nor one prompt in one chunk of 128 tokens.
    limits: dict[str, Any] = {
        "dtype": "float32",
        "block_size": 32,
        "num_gpu_blocks_override": 75,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 8,
    }
    result = run_engine(waves=prompts(), max_tokens=TOKENS, **(limits | options))
    assert "error" not in result, result["error"]
    assert result["metrics"]["num_preemptions"] > 0
    assert result["metrics"]["prefix_cache_hits"] > 0
    assert max(len(prompt) for wave in prompts() for prompt in wave) > limits["max_num_batched_tokens"]
    return result


@pytest.fixture(scope="module")
def packed() -> dict[str, Any]:
    result = engine(kv_cache_dtype="int4_per_token_head")
    assert result["implementation"] == ["SawAttentionImpl"]
    return result


def fp32_format(name: str) -> dict[str, Any]:
    return {"additional_config": {"sawkv": {"format": name}}}


def test_packed_pages_equal_the_simulated_format_bit_for_bit(packed: dict[str, Any]) -> None:
    simulated = engine(mutate="simulate_int4", **fp32_format("fp32-k128-v128"))
    assert simulated["implementation"] == ["SawAttentionImpl"]
    assert simulated["tokens"] == packed["tokens"]
    assert simulated["logprobs"] == packed["logprobs"]


@pytest.mark.newest
def test_swapped_nibbles_are_noticed(packed: dict[str, Any]) -> None:
    assert engine(mutate="swap_nibbles", kv_cache_dtype="int4_per_token_head")["tokens"] != packed["tokens"]


def test_rotated_but_unquantized_equals_vllms_own_backend() -> None:
    small = {"block_size": 16, "num_gpu_blocks_override": 150}  # vLLM's own takes no such blocks on a CPU
    stock, rotated = engine(), engine(**fp32_format("fp32-k128-v128"), **small)
    assert stock["implementation"] == ["CPUAttentionBackendImpl"], "vLLM's own"
    assert rotated["implementation"] == ["SawAttentionImpl"]
    compared, same = 0, 0
    for wave in range(2):
        for i in range(8):
            a, b = stock["tokens"][wave][i], rotated["tokens"][wave][i]
            agreed = next((t for t in range(TOKENS) if a[t] != b[t]), TOKENS)
            same += agreed == TOKENS
            for t in range(agreed):
                assert abs(stock["logprobs"][wave][i][t] - rotated["logprobs"][wave][i][t]) < 2e-3
                compared += 1
    assert same >= 14, "at most two near-ties of the two best tokens may fall the other way"
    assert compared > 0.9 * 16 * TOKENS
