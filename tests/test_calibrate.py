"""Centers and feedback measured on a model: against its own cache, and where they must help and must not be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sawkv import CacheFormat, FormatError, PagedKVCache, PageLayout, append, gather
from sawkv.prepare import calibrate
from sawkv.prepare.calibrate import Saving
from sawkv.prepare.calibration import Calibration
from sawkv.prepare.model import EvalModel
from tests.conftest import relative_error

INT4 = CacheFormat("int4")


def make_model(key_bias: float = 0.0, value_bias: float = 0.0) -> Qwen2ForCausalLM:
    """Random weights; Qwen2 has biases of K and V. Keys get theirs in the pairs that RoPE turns slowest."""
    config = Qwen2Config(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rope_theta=1e3,
    )
    model = Qwen2ForCausalLM(config).train(False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.view(2, 32)[:, [14, 15, 30, 31]] = key_bias * torch.tensor([1.0, -1.0, 2.0, 0.5])
            layer.self_attn.v_proj.bias.copy_(value_bias * torch.randn(64))
    return model


def windows(count: int) -> torch.Tensor:
    return torch.randint(0, 200, (count, 64))


@torch.inference_mode()
def means_by_the_models_own_cache(model: Qwen2ForCausalLM, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    cache = model(ids, use_cache=True).past_key_values
    return [(layer.keys.mean((0, 2)), layer.values.mean((0, 2))) for layer in cache.layers]


def test_centers_are_the_means_of_what_the_model_caches() -> None:
    model, ids = make_model(8.0, 4.0), windows(3)
    wanted = means_by_the_models_own_cache(model, ids)
    made, savings = calibrate.calibrate(EvalModel(model), INT4, ids, windows(2), 64)
    assert str(made.format) == "int4-k32-v32"
    for layer, (k, v) in enumerate(wanted):
        torch.testing.assert_close(made.k_center[layer], k, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(made.v_center[layer], v, rtol=1e-3, atol=1e-3)
        for saving in savings[layer]:
            assert saving.centered < 0.5 * saving.plain, "an offset far from zero is what a center removes"


def test_what_does_not_help_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    equal = Saving(plain=1.0, centered=1.0, cost_plain=1.0, cost_centered=0.5, cost_fed_back=1.0)
    assert not equal.centers
    assert not equal.feeds_back, "0.5 is of centered rows, which these will not be; 1.0 is of plain ones"
    assert equal.cost_used == 1.0
    assert Saving(plain=1.0, centered=0.9, cost_plain=1.0, cost_centered=0.5, cost_fed_back=0.4).feeds_back
    assert not Saving(plain=1.0, centered=0.9, cost_plain=1.0, cost_centered=0.3, cost_fed_back=0.4).feeds_back
    assert not Saving(plain=1.0, centered=0.9, cost_plain=1.0, cost_centered=0.3).feeds_back
    monkeypatch.setattr(calibrate.Saving, "centers", property(lambda saving: False))
    monkeypatch.setattr(calibrate.Saving, "feeds_back", property(lambda saving: False))
    made, _ = calibrate.calibrate(EvalModel(make_model(8.0)), INT4, windows(2), windows(1), 64)
    assert not made.k_center.any()
    assert made.k_feedback is made.v_feedback is None
    assert set(vars(made.layer(1)).values()) == {None}


@torch.inference_mode()
def test_feedback_lowers_the_error_of_scores_and_outputs_read_from_pages() -> None:
    """Held-out rows through pages, with and without the feedback of the file; costs by their definitions, from the model's own modules."""
    model, ids = EvalModel(make_model(8.0, 4.0)), windows(1)
    for module in model.layers:  # queries and outputs of few directions, as trained models have them
        for name in ("q_proj.weight", "o_proj.weight"):
            weight = module.get_parameter(name)
            weight.copy_(torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1]) / 16)
    made, savings = calibrate.calibrate(model, INT4, windows(8), windows(2), 64)
    bare, _ = calibrate.calibrate(model, INT4, windows(8), windows(2), 64, feedback=False)
    assert bare.k_feedback is bare.v_feedback is None
    for layer, (module, states) in enumerate(zip(model.layers, model.states(ids), strict=True)):
        weight = module.get_parameter("o_proj.weight").view(64, 4, 32)  # [hidden, query head, channel]
        lost = []
        for given in (made.layer(layer), replace(made.layer(layer), k_feedback=None, v_feedback=None)):
            cache = PagedKVCache.allocate(PageLayout(made.format, 2, 32, 16), 4, **vars(given))
            append(states.k, states.v, cache, torch.arange(64), backend="reference")
            k, v = torch.empty(2, 64, 2, 32)
            ends = torch.tensor([0, 64], dtype=torch.int32)
            gather(cache, torch.arange(4, dtype=torch.int32)[None], ends[1:], ends, k, v, rotated=False, backend="reference")
            scores = torch.einsum("qghd,khd->ghqk", states.q.view(64, 2, 2, 32).transpose(1, 2), k - states.k)
            outputs = torch.einsum("ohgd,khd->khgo", weight.view(64, 2, 2, 32), v - states.v)
            lost.append((float(scores.square().sum()), float(outputs.square().sum())))
        for kind in range(2):
            assert savings[layer][kind].feeds_back
            assert lost[0][kind] < 0.9 * lost[1][kind]


def test_only_int4_gets_feedback() -> None:
    made, savings = calibrate.calibrate(EvalModel(make_model(8.0)), CacheFormat("int8"), windows(2), windows(1), 64)
    assert made.k_feedback is made.v_feedback is None
    assert savings[0][0].cost_fed_back is None


def test_short_windows_spread_over_a_context_give_its_centers() -> None:
    """Rotary embeddings turn an offset of keys with the position, so where the windows stand decides their mean."""
    model, text = make_model(8.0), torch.randint(0, 200, (8, 8)).repeat(1, 32)  # 256 tokens of eight, over and over
    wanted = means_by_the_models_own_cache(model, text)
    spread, _ = calibrate.calibrate(EvalModel(model), INT4, text[:, :32].repeat(4, 1), text, 256)
    at_start, _ = calibrate.calibrate(EvalModel(model), INT4, text[:, :32], text[:, :32], 32)
    for layer, (k, _) in enumerate(wanted):
        assert relative_error(spread.k_center[layer], k) < 0.15
        assert relative_error(at_start.k_center[layer], k) > 0.1


def test_formats_that_centers_do_not_improve_are_refused() -> None:
    with pytest.raises(FormatError, match="expected a quantized format"):
        calibrate.calibrate(EvalModel(make_model()), CacheFormat("bf16"), windows(1), windows(1), 64)


def test_the_command_writes_a_file_for_this_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = next((Path(__file__).parents[1] / "models").glob("sawkv-*"))
    options = {"cache_format": "int4-k64-v0", "context": 512, "window": 256, "windows": 4, "device": "cpu"}
    assert calibrate.run_calibrate(folder, None, tmp_path / "c.safetensors", **options) == 0
    shown = capsys.readouterr().out
    made = Calibration.load(tmp_path / "c.safetensors")
    assert made.fingerprint() in shown
    assert "layer 4" in shown
    assert str(made.format) == "int4-k64-v0"
    assert made.k_center.shape == (5, 2, 128)
    assert bool(made.k_center.any())
    assert made.k_feedback is not None
    assert made.v_feedback is not None
    assert "with feedback" in shown
    again = options | {"feedback": False}
    assert calibrate.run_calibrate(folder, None, tmp_path / "centers.safetensors", **again) == 0
    bare = Calibration.load(tmp_path / "centers.safetensors")
    assert bare.k_feedback is None
    assert torch.equal(bare.k_center, made.k_center)
