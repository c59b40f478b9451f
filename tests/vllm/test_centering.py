"""Calibration in real vLLM engines: centers change nothing but the error of quantization, feedback reaches the bytes,
and a file that does not fit is refused at start-up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sawkv import CacheFormat
from sawkv.format.feedback import takes_from
from sawkv.prepare.calibration import Calibration, model_id
from tests.conftest import MODEL
from tests.vllm.engine import run_engine

pytestmark = pytest.mark.vllm

PASSTHROUGH = "fp32-k128-v128"
TOKENS = 64
PROMPTS = [
    [[300 + i * 7 % 1700 for i in range(start, start + length)] for start, length in ((0, 40), (9, 300), (5, 1))]
]


def write_calibration(
    folder: Path,
    format_name: str,
    *,
    model: str | None = None,
    scale: float = 3.0,
    gains: bool = False,
    feedback: bool = False,
) -> str:
    """A file of large random centers, and if asked for of random gains and feedback, different for every layer, head
    and channel.
    """
    config = AutoConfig.from_pretrained(MODEL)
    shape = (2, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    random = torch.Generator().manual_seed(1)
    k_center, v_center = scale * torch.randn(shape, generator=random)
    fed: dict[str, torch.Tensor] = {}
    for name in ("k_gain", "v_gain") if gains else ():
        fed[name] = torch.exp2(4 * torch.rand(shape[1:], generator=random) - 2)
    for name in ("k_feedback", "v_feedback") if feedback else ():
        weights = torch.randint(-127, 128, (*shape[1:], config.head_dim), dtype=torch.int8, generator=random)
        fed |= {
            name: weights * takes_from(config.head_dim).to(torch.int8),
            f"{name}_step": torch.full(shape[1:3], 2e-5),
        }
    path = folder / f"{format_name}.safetensors"
    Calibration(CacheFormat.parse(format_name), model or model_id(config), k_center, v_center, **fed).save(path)
    return str(path)


def engine(**settings: str) -> dict[str, Any]:
    mutate, tensor_parallel = settings.pop("mutate", None), settings.pop("tensor_parallel", None)
    options: dict[str, Any] = (
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"} if tensor_parallel else {}
    )
    options |= {"dtype": "float32", "max_num_batched_tokens": 128, "additional_config": {"sawkv": settings}}
    return run_engine(waves=PROMPTS, max_tokens=TOKENS, mutate=mutate, **options)


def agreed_tokens(a: dict[str, Any], b: dict[str, Any]) -> int:
    """How many tokens agree before the first that differs, over all prompts; log-probabilities up to
    there must agree.
    """
    agreed = 0
    for i in range(len(PROMPTS[0])):
        for t in range(TOKENS):
            if a["tokens"][0][i][t] != b["tokens"][0][i][t]:
                break
            assert abs(a["logprobs"][0][i][t] - b["logprobs"][0][i][t]) < 2e-3
            agreed += 1
    return agreed


@pytest.mark.newest
def test_centers_and_gains_are_taken_by_layer_and_rank_and_change_nothing_without_quantization(tmp_path: Path) -> None:
    """Two ranks, each with its heads' centers and gains, against one without any. A wrong layer, head or sign would
    move values much.
    """
    plain = engine(format=PASSTHROUGH)
    path = write_calibration(tmp_path, PASSTHROUGH, gains=True)
    centered = engine(calibration=path, tensor_parallel="yes")  # the format is the file's
    assert "error" not in centered, centered["error"]
    assert plain["implementation"] == ["SawAttentionImpl"]
    assert agreed_tokens(plain, centered) > 0.9 * TOKENS * len(PROMPTS[0])
    # The control: values written centered and read as if they were not.
    with pytest.raises(AssertionError):
        assert agreed_tokens(plain, engine(calibration=path, mutate="lose_v_center")) > 0.9 * TOKENS * len(PROMPTS[0])


def test_feedback_reaches_the_bytes_that_the_engine_writes(tmp_path: Path) -> None:
    """Log-probabilities to the last bit as where the reference writes, layer by layer and head by head; and others
    without feedback.
    """
    path = write_calibration(tmp_path, "int4-k128-v128", scale=0.1, gains=True, feedback=True)
    settings: dict[str, Any] = {
        "dtype": "float32",
        "kv_cache_dtype": "int4_per_token_head",
        "additional_config": {"sawkv": {"calibration": path}},
    }
    served, by_reference, without = (
        run_engine(waves=PROMPTS, max_tokens=12, mutate=mutate, **settings)
        for mutate in (None, "by_reference", "lose_feedback")
    )
    assert "error" not in served, served["error"]
    assert served["logprobs"] == by_reference["logprobs"]
    assert served["logprobs"] != without["logprobs"]


@pytest.mark.newest
def test_a_calibration_that_does_not_fit_is_refused_at_start_up(tmp_path: Path) -> None:
    other_model = write_calibration(tmp_path, "int4-k128-v128", model="0" * 16)
    options: dict[str, Any] = {"kv_cache_dtype": "int4_per_token_head"}
    error = run_engine(**options, additional_config={"sawkv": {"format": "int4-k128-v0", "calibration": other_model}})[
        "error"
    ]
    assert "model: expected" in error
    assert f"got {'0' * 16}" in error
    assert "format: expected int4-k128-v0, got int4-k128-v128" in error
