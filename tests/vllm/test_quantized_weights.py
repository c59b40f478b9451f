"""Checkpoints with quantized weights: the KV format is the user's, whatever the checkpoint says of its own."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.architectures import quantize_checkpoint
from tests.conftest import MODEL
from tests.vllm.engine import run_engine

pytestmark = pytest.mark.vllm


def generate(model: Path) -> dict[str, Any]:
    draw = random.Random(1)
    prompts = [[draw.randrange(300, 2000) for _ in range(length)] for length in (5, 70, 200)]
    result = run_engine(model=str(model), waves=[prompts], kv_cache_dtype="int4_per_token_head")
    assert "error" not in result, result["error"]
    assert result["implementation"] == ["SawAttentionImpl"]
    return result


@pytest.mark.newest
def test_int4_pages_under_a_checkpoint_made_for_fp8_pages(tmp_path: Path) -> None:
    plain, asking = (Path(shutil.copytree(MODEL, tmp_path / name)) for name in ("plain", "asking"))
    quantize_checkpoint(plain)
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    quantize_checkpoint(asking, kv_cache_scheme=scheme)
    tensors = load_file(asking / "model.safetensors")
    attention = [name.removesuffix("q_proj.weight") for name in tensors if name.endswith("q_proj.weight")]
    # FP8's, and far from right.
    scales = {f"{prefix}{x}_scale": torch.tensor([0.5]) for prefix in attention for x in "kv"}
    save_file(tensors | scales, asking / "model.safetensors")

    unsaid = [run_engine(model=str(folder)).get("kv_tokens") for folder in (asking, plain)]
    assert unsaid[0] != unsaid[1], "the scheme is in force where the user says nothing"

    wide = run_engine(model=str(asking), additional_config={"sawkv": {"format": "bf16-k128-v128"}})
    assert (
        "expected --kv-cache-dtype bfloat16, got fp8, which the checkpoint's quantization_config asks for"
        in wide["error"]
    )

    got = generate(asking)
    assert got == generate(plain) | {name: got[name] for name in ("metrics", "log")}, (
        "tokens, log-probabilities and capacity"
    )
    assert got["kv_tokens"] == (unquantized := generate(MODEL))["kv_tokens"]
    assert got["logprobs"] != unquantized["logprobs"], "the weights are the quantized ones"
