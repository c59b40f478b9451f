"""A hybrid model's own draft head under CUDA graphs: `pytest -m gpu tests/gpu/test_drafts.py`. Needs vLLM.

The head guesses some tokens, each step verifies several at once, and texts stay what they are without it, up to
near-ties: logits in bf16 are 0.03 apart, and vLLM's own 16 bits part there too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.agreement import first_difference
from tests.vllm.engine import run_engine
from tests.vllm.test_speculative import predictable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NEAR_TIE = 0.07
"""Nats between the two tokens' log-probabilities, each in its own run."""


@pytest.mark.parametrize("family", ["qwen3-next", "glm-4.5"])
def test_drafts_of_three_tokens_leave_texts_as_they_are(family: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model": str(predictable(tmp_path / "model", family)),
        "waves": [[[(3 * i * j + 7) % 50 + 2 for j in range(1, 90 + 30 * i)] for i in range(1, 9)]],
        "max_tokens": 64,
        "dtype": "bfloat16",
        "kv_cache_dtype": "int4_per_token_head",
        "attention_backend": "CUSTOM",
        "skip_tokenizer_init": True,
        "enforce_eager": False,
        "max_num_seqs": 16,  # states of vLLM's 1,024 do not fit beside so few pages
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},  # without minutes of Inductor
        "gpu_memory_utilization": 0.1,
    }
    if family == "qwen3-next":
        options["gdn_prefill_backend"] = "triton"  # FlashInfer's kernels are compiled at start, for minutes
    alone = run_engine(**options)
    drafted = run_engine(**options, speculative_config={"method": "mtp", "num_speculative_tokens": 3})
    for result in (alone, drafted):
        assert "SawAttentionImpl" in result.get("implementation", []), result.get("error")
    assert drafted["metrics"]["spec_decode_num_accepted_tokens"] > 0
    agreed = 0
    for i, text in enumerate(alone["tokens"][0]):
        first = first_difference(text, drafted["tokens"][0][i])
        agreed += len(text) if first is None else first
        if first is not None:
            apart = alone["logprobs"][0][i][first] - drafted["logprobs"][0][i][first]
            assert abs(apart) <= NEAR_TIE, f"text {i} differs from token {first} on"
    assert agreed >= 8 * 64 / 2
