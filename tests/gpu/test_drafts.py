"""A hybrid model's own draft head under CUDA graphs: `pytest -m gpu tests/gpu/test_drafts.py`. Needs vLLM.

The head guesses some tokens, each step verifies several at once, and texts stay what they are without it. The model's
next token is far ahead of the others, so that rounding decides nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.engine import run_engine
from tests.vllm.test_speculative import predictable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


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
        "gpu_memory_utilization": 0.1,
    }
    if family == "qwen3-next":
        options["gdn_prefill_backend"] = "triton"  # FlashInfer's kernels are compiled at start, for minutes
    alone = run_engine(**options)
    drafted = run_engine(**options, speculative_config={"method": "mtp", "num_speculative_tokens": 3})
    for result in (alone, drafted):
        assert "SawAttentionImpl" in result.get("implementation", []), result.get("error")
    assert drafted["metrics"]["spec_decode_num_accepted_tokens"] > 0
    assert drafted["tokens"] == alone["tokens"]
