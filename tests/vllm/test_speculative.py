"""Speculative decoding verifies several tokens of a sequence at once (query lengths above 1): greedy outputs must not change."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.engine import run_engine

pytestmark = pytest.mark.vllm

# Repetitions, so that n-grams of the prompt predict what comes.
PROMPTS = [[[300 + (i * j) % 23 for j in range(1, 120 + 30 * i)] for i in range(1, 5)]]
OPTIONS: dict[str, Any] = {"dtype": "float32", "waves": PROMPTS, "max_tokens": 64, "kv_cache_dtype": "int4_per_token_head"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def test_ngram_speculation_gives_the_same_tokens() -> None:
    plain, speculative = run_engine(**OPTIONS), run_engine(**OPTIONS, speculative_config=NGRAM)
    assert speculative["implementation"] == ["SawAttentionImpl"]
    assert speculative["metrics"]["spec_decode_num_accepted_tokens"] > 0
    assert speculative["tokens"] == plain["tokens"]
