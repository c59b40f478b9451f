"""Speculative decoding verifies several tokens of a sequence at once (query lengths above 1): greedy outputs must not
change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from tests.vllm.engine import MODEL, run_engine
from tests.vllm.test_centering import write_calibration

pytestmark = pytest.mark.vllm

# Repetitions, so that n-grams of the prompt predict what comes.
PROMPTS = [[[300 + (i * j) % 23 for j in range(1, 120 + 30 * i)] for i in range(1, 5)]]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "waves": PROMPTS,
    "max_tokens": 64,
    "kv_cache_dtype": "int4_per_token_head",
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def test_a_draft_has_a_cache_of_its_own(tmp_path: Path) -> None:
    """Of other heads than the target's, which has a named format and a calibration: neither is the draft's."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(vocab_size=AutoConfig.from_pretrained(MODEL).vocab_size, head_dim=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "draft")
    calibration = write_calibration(tmp_path, "int4-k64-v128")
    entry = {"additional_config": {"sawkv": {"format": "int4-k64-v128", "calibration": calibration}}}
    alone = run_engine(**OPTIONS, **entry)
    drafted = {"method": "draft_model", "model": str(tmp_path / "draft"), "num_speculative_tokens": 2}
    for options, of_draft in (({}, "SawAttentionImpl"), ({"kv_cache_dtype": "auto"}, "CPUAttentionBackendImpl")):
        result = run_engine(**OPTIONS, **entry, speculative_config=drafted | options)
        assert result.get("implementation") == sorted({"SawAttentionImpl", of_draft}), result.get("error")
        assert result["metrics"]["spec_decode_num_draft_tokens"] > 0
        assert result["tokens"] == alone["tokens"]


def test_ngram_speculation_gives_the_same_tokens() -> None:
    plain, speculative = run_engine(**OPTIONS), run_engine(**OPTIONS, speculative_config=NGRAM)
    assert speculative["implementation"] == ["SawAttentionImpl"]
    assert speculative["metrics"]["spec_decode_num_accepted_tokens"] > 0
    assert speculative["tokens"] == plain["tokens"]
