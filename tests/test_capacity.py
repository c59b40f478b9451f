"""`sawkv plan`: against vLLM's own reports, and its parts against independent counts."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shapes import SHAPES, write_config
from sawkv import cli
from sawkv.capacity import GIB, ModelShape, Plan, Setting, card_memory, kv_capacity, make_plan, read_model
from sawkv.errors import SawkvError, UnsupportedError
from sawkv.format.spec import CacheFormat
from tests.vllm.engine import MODEL, run_engine

H100 = Setting(card_memory("80GiB"), context=17408, max_num_batched_tokens=16384)
BF16, INT4 = CacheFormat("bf16"), CacheFormat("int4")


def plan_of(name: str, cache_format: CacheFormat, setting: Setting = H100) -> Plan:
    return make_plan(ModelShape.from_config(SHAPES[name]), setting, cache_format)


@pytest.mark.parametrize(("cache_format", "reported"), [(BF16, 394_576), (INT4, 1_481_040)])
def test_within_two_percent_of_what_vllm_reported_on_an_h100(cache_format: CacheFormat, reported: int) -> None:
    """Qwen3-8B, vLLM 0.26.0, gpu_memory_utilization 0.90. INT4: docs/results/serving.jsonl."""
    assert plan_of("qwen3-8b", cache_format).kv_tokens == pytest.approx(reported, rel=0.02)


@pytest.mark.vllm
@pytest.mark.parametrize("codec", ["bf16", "int4"])
def test_capacity_equals_what_vllm_reports_on_the_cpu(codec: str) -> None:
    options = {} if codec == "bf16" else {"kv_cache_dtype": "int4_per_token_head"}
    shape, _ = read_model(str(MODEL))
    setting = Setting(GIB, context=2048, block_size=128)  # the CPU's pages
    assert kv_capacity(shape, CacheFormat(codec), 64 << 20, setting)[0] == run_engine(**options)["kv_tokens"]


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_that_transformers_makes(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(write_config(tmp_path, name))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert ModelShape.from_config(SHAPES[name]).weight_bytes == pytest.approx(counted, rel=1e-3)


def test_the_shipped_models_files_agree_with_its_shape() -> None:
    shape, weight_bytes = read_model(str(MODEL))
    assert weight_bytes == pytest.approx(shape.weight_bytes, rel=2e-3)


def test_bytes_of_files_are_counted_as_vllm_holds_them(tmp_path: Path) -> None:
    tensors = {"a": ("F32", [3, 5]), "b": ("BF16", [7]), "c": ("F8_E4M3", [11]), "d": ("I32", [2])}
    header = {"__metadata__": {}} | {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    write_config(tmp_path, "qwen3-8b", quantization_config={"quant_method": "awq"})
    assert read_model(str(tmp_path))[1] == 2 * 15 + 2 * 7 + 11 + 4 * 2


def test_more_cards_hold_more_and_weights_that_do_not_fit_hold_nothing() -> None:
    one, two = (plan_of("qwen3-32b", INT4, Setting(card_memory("80GiB"), 16384, tensor_parallel=n)) for n in (1, 2))
    assert two.kv_tokens > 4 * one.kv_tokens  # half the weights, and half the KV heads on each card
    assert plan_of("glm-4.7", INT4).kv_tokens == 0


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (SHAPES["mistral-7b"], {4096: 32}),
        (SHAPES["gemma-2-9b"], {4096: 21, 0: 21}),
        (SHAPES["gemma-3-1b"], {512: 22, 0: 4}),
        (SHAPES["gpt-oss-20b"], {128: 12, 0: 12}),
        (SHAPES["qwen2.5-7b"] | {"sliding_window": 64, "use_sliding_window": False}, {0: 28}),
        (SHAPES["qwen2.5-7b"] | {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"] * 14}, {0: 28}),
        (SHAPES["gemma-3-1b"] | {"layer_types": ["sliding_attention"] * 25 + ["full_attention"]}, {512: 25, 0: 1}),
    ],
)
def test_windows(config: dict[str, Any], windows: dict[int, int]) -> None:
    found = ModelShape.from_config(config).windows
    assert {window: found.count(window) for window in found} == windows


def test_what_cannot_be_planned_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, message in (
        ({"kv_lora_rank": 512}, "MLA"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"hidden_size": None}, "hidden_size"),
        ({"quantization_config": {"quant_method": "awq"}}, "safetensors"),
    ):
        config = {name: value for name, value in (SHAPES["qwen3-8b"] | changes).items() if value is not None}
        with pytest.raises(UnsupportedError, match=message):
            make_plan(ModelShape.from_config(config), H100, BF16)
    model = write_config(tmp_path, "qwen3-8b")
    for arguments, message in (
        (["--gpu-memory", "80 apples"], "got '80 apples'"),
        (["--gpu-memory", "80GiB", "--tensor-parallel", "3"], "divisor of 32 and 8"),
        (["--gpu-memory", "80GiB", "--context", "0"], "context: expected at least 1"),
        (["--gpu-memory", "80GiB", "--gpu-memory-utilization", "90"], "at most 1, got 90"),
        (["--gpu-memory", "80GiB", "--format", "int4-k256-v0"], "divisor of head_dim"),
    ):
        assert cli.main(["plan", model, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path / "none" / "such" / "model"), "--gpu-memory", "1GiB"]) == 2


def test_a_size_is_the_cards_and_less_is_reported() -> None:
    assert card_memory("80GB") == card_memory("80GiB") == card_memory("81920MiB") == pytest.approx(79.1 * GIB, rel=1e-3)
    with pytest.raises(SawkvError, match="got '0GiB'"):
        card_memory("0GiB")


def test_the_command_shows_both_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", write_config(tmp_path, "qwen3-8b"), "--gpu-memory", "80GiB", "--context", "16384"]) == 0
    shown = capsys.readouterr().out
    assert "int4-k128-v128" in shown
    assert "3.76x" in shown
    assert "--max-num-batched-tokens 8192" in shown
