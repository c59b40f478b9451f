"""Formats that keep the newest tokens in 16 bits (`-r64`), in real engines: what `test_controls` checks of others, and
that the lab measures what engines serve.

Prefix-cache hits, chunked prefill, preemption and blocks given back behind the window all happen in these runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sawkv import CacheFormat
from sawkv.capacity.caches import KVCache
from sawkv.capacity.memory import GIB, Setting, cut_blocks
from sawkv.capacity.model import read_shape
from sawkv.format.layout import RECENT_PAGE_SIZE
from sawkv.lab.evaluate import collect_samples
from sawkv.lab.methods import find_method, fit
from sawkv.prepare.calibration import Calibration
from sawkv.prepare.model import EvalModel
from tests.vllm.engine import MODEL, run_engine
from tests.vllm.test_controls import fp32_format, prompts

pytestmark = [pytest.mark.vllm, pytest.mark.newest]

TOKENS = 64
INT4: dict[str, Any] = {"kv_cache_dtype": "int4_per_token_head"}
LIMITS: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 128, "max_num_seqs": 8}
POOL: dict[str, Any] = {
    "block_size": 128,
    "num_gpu_blocks_override": 60,
}  # in fp32, 16 of the newest tokens take 121 tokens of INT4


def named(name: str) -> dict[str, Any]:
    return INT4 | {"additional_config": {"sawkv": {"format": name}}}


def engine(**options: Any) -> dict[str, Any]:
    result = run_engine(waves=prompts(), max_tokens=TOKENS, **LIMITS, **(POOL | options))
    assert "error" not in result, result["error"]
    assert result["metrics"]["num_preemptions"] > 0
    assert result["metrics"]["prefix_cache_hits"] > 0
    return result


def test_packed_pages_equal_the_simulated_format_bit_for_bit() -> None:
    packed = engine(**named("int4-r64"))
    assert packed["log"][0].startswith("sawkv: KV cache format int4-k128-v128-r64, 136 bytes per token")
    simulated = engine(mutate="simulate_int4", **fp32_format("fp32-k128-v128-r64"))
    for result in (packed, simulated):
        assert result["implementation"] == ["SawAttentionImpl"]
    assert simulated["tokens"] == packed["tokens"]
    assert simulated["logprobs"] == packed["logprobs"]


def test_unquantized_equals_vllms_own_backend() -> None:
    stock = run_engine(waves=prompts(), max_tokens=TOKENS, **LIMITS)
    assert stock["implementation"] == ["CPUAttentionBackendImpl"], "vLLM's own"
    assert apart(stock, engine(**fp32_format("fp32-k128-v128-r64"))) < 2e-3
    assert apart(stock, engine(mutate="overlap_recent", **fp32_format("fp32-k128-v128-r64"))) > 2e-3


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between log-probabilities of tokens that both chose, all up to the first unlike one."""
    differences, compared = [0.0], 0
    for wave in range(2):
        for a, b, x, y in zip(
            *(result[key][wave] for key in ("tokens", "logprobs") for result in (one, other)), strict=True
        ):
            agreed = next((t for t in range(TOKENS) if a[t] != b[t]), TOKENS)
            differences += [abs(x[t] - y[t]) for t in range(agreed)]
            compared += agreed
    assert compared > 0.5 * 16 * TOKENS
    return max(differences)


def test_a_prompt_in_chunks_reads_what_the_lab_reads() -> None:
    found = apart_from_the_lab("int4-r64", **LIMITS, **POOL)
    assert found["int4-r64"] < 0.1 * found["int4"]  # a code in many falls the other way


def apart_from_the_lab(served: str, **options: Any) -> dict[str, float]:
    """How far an engine's losses in a prompt of several chunks are from the lab's in two formats; `int4` is one."""
    waves = [[max(prompts()[0], key=len)]]
    assert len(waves[0][0]) > 2 * options["max_num_batched_tokens"]
    scores = run_engine(waves=waves, max_tokens=1, scores=True, **options, **named(served))["scores"][0]
    model = EvalModel.load(MODEL, torch.device("cpu"), torch.float32)
    ids, found = torch.tensor(waves[0]), {}
    samples = collect_samples(model, ids)
    for name in (served, "int4"):
        with torch.no_grad(), model.reading(fit(find_method(name), samples)):
            logits = model.logits(model.hidden(ids)[:, :-1])
        losses = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
        found[name] = float((losses - torch.tensor(scores)).abs().mean())
    return found


def test_the_engine_prepares_pages_that_hold_the_newest_tokens(tmp_path: Path) -> None:
    """At start, unasked, as users have it; the file is that of the pages, whatever is kept beside them."""
    for name in ("int4-r32", "int4"):
        settings = {"format": name, "prepare": True, "prepare_cache": str(tmp_path / name)}
        result = run_engine(waves=[[[1, 2, 3]]], max_tokens=1, **LIMITS, **INT4, additional_config={"sawkv": settings})
        assert "error" not in result, result["error"]
        assert [line for line in result["log"] if "prepared in" in line]
    kept, plain = (Calibration.load(next((tmp_path / name).iterdir())) for name in ("int4-r32", "int4"))
    assert kept.fingerprint() == plain.fingerprint()


def test_the_engine_chooses_pages_that_hold_the_newest_tokens() -> None:
    compiled = run_engine(waves=[[list(range(400, 440))]], dtype="bfloat16", enforce_eager=False, **named("int3-r64"))
    assert len(compiled["tokens"][0][0]) == 32
    shape = read_shape(json.loads((MODEL / "config.json").read_text()))
    cache = KVCache.of_format(CacheFormat.parse("int3-r64"), shape)
    nbytes = cut_blocks(shape, Setting(GIB, 2048, block_size=128), cache).nbytes  # the CPU's default
    assert compiled["kv_tokens"] // RECENT_PAGE_SIZE == (64 << 20) // nbytes
    error = run_engine(block_size=32, **LIMITS, **named("int4-r64"))["error"]
    assert "(-r64): --block-size 32 (expected 128 or more)" in error
