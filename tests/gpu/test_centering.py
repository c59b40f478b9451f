"""Calibrated pages in vLLM on a GPU: `pytest -m gpu tests/gpu/test_centering.py`. Needs vLLM. With SAWKV_DRY_RUN=1, on
the CPU.

Centers, under CUDA graphs and compilation: INT8 pages, whose error is small, so that greedy text with and without
centers is the same nearly everywhere; random centers larger than K and V themselves, so that a lost one changes it.
Prompts go through the prefill that restores centers, and continue through decoding. Gains and feedback, in INT4 pages:
the engine's output is that of pages which the reference wrote, and another one without feedback.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.engine import run_engine
from tests.vllm.test_centering import PROMPTS, TOKENS, write_calibration

DRY_RUN = os.environ.get("SAWKV_DRY_RUN") == "1"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not DRY_RUN and not torch.cuda.is_available(), reason="no CUDA device"),
]

FORMAT = "int8-k128-v128"


def engine(
    mutate: str | None = None, dtype: str = "int8_per_token_head", eager: bool = False, **settings: str
) -> dict[str, Any]:
    backend: dict[str, Any] = {} if DRY_RUN else {"attention_backend": "CUSTOM", "gpu_memory_utilization": 0.3}
    result = run_engine(
        waves=PROMPTS,
        max_tokens=TOKENS,
        mutate=mutate,
        kv_cache_dtype=dtype,
        enforce_eager=DRY_RUN or eager or mutate is not None,
        additional_config={"sawkv": settings},
        **backend,
    )
    assert "error" not in result, result["error"]
    assert result["implementation"] == ["SawAttentionImpl"]
    return result


def share_before_the_first_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Over all prompts, of tokens that agree before the first that differs."""
    agreed = 0
    for x, y in zip(a["tokens"][0], b["tokens"][0], strict=True):
        agreed += next((t for t in range(TOKENS) if x[t] != y[t]), TOKENS)
    return agreed / (TOKENS * len(a["tokens"][0]))


def test_centers_change_nothing_but_rounding(tmp_path: Path) -> None:
    plain = engine(format=FORMAT)
    path = write_calibration(tmp_path, FORMAT, scale=1.0)
    assert share_before_the_first_difference(plain, engine(calibration=path)) > 0.4
    lost = engine("lose_v_center", calibration=path)  # the control: written without the center that reading adds
    assert share_before_the_first_difference(plain, lost) < 0.2


def test_feedback_reaches_the_bytes_that_the_engine_writes(tmp_path: Path) -> None:
    path = write_calibration(tmp_path, "int4-k128-v128", scale=0.1, gains=True, feedback=True)
    served, by_reference, without = (
        engine(mutate, "int4_per_token_head", eager=True, calibration=path)
        for mutate in (None, "by_reference", "lose_feedback")
    )
    assert share_before_the_first_difference(served, by_reference) == 1
    torch.testing.assert_close(
        torch.tensor(served["logprobs"]), torch.tensor(by_reference["logprobs"]), rtol=0, atol=1e-5
    )
    assert share_before_the_first_difference(served, without) < 1
