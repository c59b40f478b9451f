"""Sliding windows in real engines: pages of INT4's size, and what `test_controls` checks of full attention.

Windows of 64 tokens in all layers (Mistral) or in every other one (Gemma 2: two groups of layers share one pool of
pages). Prefix-cache hits, chunked prefill, preemption and pages given back behind the window all happen in these runs.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.families import WINDOW, make_model
from sawkv import CacheFormat, PageLayout
from tests.vllm.engine import run_engine

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32
NUM_BLOCKS = {"mistral": 9, "gemma-2": 26}
LAYERS_IN_A_POOL = {"mistral": 4, "gemma-2": 2}
TOKENS = 40
INT4 = {"kv_cache_dtype": "int4_per_token_head"}


@pytest.fixture(scope="module", params=list(NUM_BLOCKS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_model(tmp_path_factory.mktemp(name), name))


def prompts() -> list[list[list[int]]]:
    """Two waves of 5 prompts that share prefixes; the second wave repeats prompts of the first, and so hits the prefix
    cache.
    """
    draw = random.Random(0)
    shared = [draw.randrange(5, 1000) for _ in range(200)]
    first = [
        shared[: draw.randrange(100, 200)] + [draw.randrange(5, 1000) for _ in range(draw.randrange(30, 90))]
        for _ in range(5)
    ]
    return [first, [prompt + [draw.randrange(5, 1000) for _ in range(5)] for prompt in first]]


def engine(name: str, model: Path, codec: str, **options: Any) -> dict[str, Any]:
    """An engine with just the memory of `NUM_BLOCKS` blocks, by our own reckoning."""
    config = json.loads((model / "config.json").read_text())
    layout = PageLayout(CacheFormat(codec, 128, 128), config["num_key_value_heads"], config["head_dim"], BLOCK_SIZE)
    return run_engine(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=64,
        max_num_seqs=5,
        kv_cache_memory_bytes=NUM_BLOCKS[name] * LAYERS_IN_A_POOL[name] * layout.num_kv_heads * layout.span_bytes,
        **options,
    )


def test_windowed_int4_pages_take_their_bytes_and_equal_the_simulated_format_bit_for_bit(
    name: str, model: Path
) -> None:
    packed = engine(name, model, "int4", waves=prompts(), max_tokens=TOKENS, **INT4)
    wide = {"additional_config": {"sawkv": {"format": "fp32-k128-v128"}}}
    simulated = engine(name, model, "fp32", mutate="simulate_int4", waves=prompts(), max_tokens=TOKENS, **wide)
    for result in (packed, simulated):
        assert result["implementation"] == ["SawAttentionImpl"], result
        assert result["kv_tokens"] == NUM_BLOCKS[name] * BLOCK_SIZE
        assert result["metrics"]["num_preemptions"] > 0
        assert result["metrics"]["prefix_cache_hits"] > 0
    assert min(len(prompt) for prompt in prompts()[0]) > 2 * WINDOW
    assert simulated["tokens"] == packed["tokens"]
    assert simulated["logprobs"] == packed["logprobs"]


@pytest.mark.parametrize("name", ["gemma-2"], scope="module")
def test_what_a_skipped_layer_costs_in_a_pool_that_groups_share_is_said(name: str, model: Path) -> None:
    options = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 512, "block_size": BLOCK_SIZE}
    whole, skipping = (
        run_engine(
            model=str(model), kv_cache_memory_bytes=64 << 20, **options, **INT4, kv_cache_dtype_skip_layers=skipped
        )
        for skipped in ([], ["0"])
    )
    assert not [line for line in whole["log"] if "pads our pages" in line]
    said = [line for line in skipping["log"] if "pads our pages" in line]
    assert any("they hold 0.50 times the tokens of a 16-bit cache and not 3.88 times" in line for line in said), (
        "as fp32 pages do"
    )
    assert skipping["kv_tokens"] < 0.3 * whole["kv_tokens"]


@pytest.mark.parametrize(
    "name", ["mistral"], scope="module"
)  # groups of layers with pages of unlike sizes are refused by vLLM itself
def test_pages_of_another_size_are_refused_at_start_up(name: str, model: Path) -> None:
    from sawkv.integrations.vllm.windows import VLLM_SIZES_WINDOWS

    if VLLM_SIZES_WINDOWS:
        pytest.skip("this vLLM sizes windows right")
    error = engine(name, model, "int4", mutate="leave_windows", **INT4)["error"]
    assert "expected pages of" in error
    assert "SlidingWindowSpec" in error
