"""What `sawkv prepare` fits to a model: against its own modules and cache, and by what it saves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from sawkv import CacheFormat, PagedKVCache, PageLayout, append, cli, gather
from sawkv.format.constants import BUCKET_SIZE
from sawkv.integrations.transformers import SawCache
from sawkv.integrations.transformers.prepare import measure
from sawkv.integrations.vllm import preflight, refusals
from sawkv.integrations.vllm.options import Options
from sawkv.prepare import calibrate
from sawkv.prepare.calibration import Calibration, LayerCalibration
from sawkv.prepare.corpus import preparation_positions
from sawkv.prepare.fit import fit
from sawkv.prepare.model import EvalModel
from sawkv.prepare.statistics import LayerStatistics
from sawkv.prepare.store import contents_digest
from tests.conftest import MODEL, relative_error
from tests.transformers import models as tiny_models

INT4 = CacheFormat("int4")


def make_model(key_bias: float = 0.0, value_bias: float = 0.0, rope_theta: float = 1e3) -> Qwen2ForCausalLM:
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
        rope_theta=rope_theta,
    )
    model = Qwen2ForCausalLM(config).train(False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.view(2, 32)[:, [14, 15, 30, 31]] = key_bias * torch.tensor(
                [1.0, -1.0, 2.0, 0.5]
            )
            layer.self_attn.v_proj.bias.copy_(value_bias * torch.randn(64))
    return model


def windows(count: int) -> torch.Tensor:
    return torch.randint(0, 200, (count, 64))


def test_the_file_holds_what_is_fitted_to_the_models_own_rows() -> None:
    """Statistics from the model's own modules and cache, in its own positions."""
    model, ids = make_model(8.0, 4.0), windows(1)
    taken: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(
            lambda module, args, out, index=index: taken.__setitem__(index, out)
        )
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(64)[None])
        statistics = []
        for index, layer in enumerate(model.model.layers):
            q, _ = apply_rotary_pos_emb(
                taken[index].view(1, 64, 4, 32).transpose(1, 2), cache.layers[index].keys, cos, sin
            )
            statistics.append(LayerStatistics(2, 32, "cpu"))
            statistics[-1].set_output_weight(layer.self_attn.o_proj.weight)
            statistics[-1].add(
                *(x[0].transpose(0, 1) for x in (q, cache.layers[index].keys, cache.layers[index].values))
            )
    (made,) = calibrate.calibrate(EvalModel(model), INT4, ids, 64)
    assert str(made.format) == "int4-k32-v32"
    for index, wanted in enumerate(fit(statistics, INT4)):
        got = made.layer(index)
        for name in ("k_center", "v_center", "k_gain", "v_gain"):
            torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-3, atol=1e-3)
        for name in ("k_feedback", "v_feedback"):
            weights = [
                getattr(each, name).weights.int() * getattr(each, name).step[:, None, None] for each in (got, wanted)
            ]
            assert relative_error(*weights) < 0.02


@torch.inference_mode()
def test_what_is_fitted_lowers_the_error_of_attention_read_from_pages() -> None:
    """Fresh text through pages, with nothing fitted and with each part: the error of the layer's output, from the
    model's own modules.
    """
    model, ids = EvalModel(make_model(8.0, 4.0)), windows(1)
    for module in model.layers:  # queries and outputs of few directions, as trained models have them
        for name in ("q_proj.weight", "o_proj.weight"):
            weight = module.get_parameter(name)
            weight.copy_(torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1]) / 16)
    (made,) = calibrate.calibrate(model, INT4, windows(8), 64)
    for layer, (module, states) in enumerate(zip(model.layers, model.states(ids), strict=True)):
        whole = made.layer(layer)
        centers = LayerCalibration(k_center=whole.k_center, v_center=whole.v_center)
        gains = replace(whole, k_feedback=None, v_feedback=None)
        lost = []
        for given in (LayerCalibration(), centers, gains, whole):
            cache = PagedKVCache.allocate(PageLayout(made.format, 2, 32, 16), 4, **given.constants())
            append(states.k, states.v, cache, torch.arange(64), backend="reference")
            k, v = torch.empty(2, 64, 2, 32)
            ends = torch.tensor([0, 64], dtype=torch.int32)
            gather(
                cache,
                torch.arange(4, dtype=torch.int32)[None],
                ends[1:],
                ends,
                k,
                v,
                rotated=False,
                backend="reference",
            )
            outputs = []
            for keys, values in ((states.k, states.v), (k, v)):
                heads = (x.transpose(0, 1)[None] for x in (states.q, keys, values))
                out = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True, scale=states.softmax_scale)
                outputs.append(module.get_submodule("o_proj")(out[0].transpose(0, 1).flatten(1)))
            lost.append(float((outputs[1] - outputs[0]).square().sum()))
        assert lost[1] < 0.5 * lost[0], "an offset far from zero is what a center removes"
        assert lost[3] < 0.9 * min(lost[1:3])


def test_only_int4_gets_feedback() -> None:
    (made,) = calibrate.calibrate(EvalModel(make_model(8.0)), CacheFormat("int8"), windows(2), 64)
    assert made.k_feedback is made.v_feedback is None


def test_windows_are_spread_over_the_context() -> None:
    """Rotary embeddings turn an offset of keys with the position, so where the windows stand decides their mean."""
    model, text = EvalModel(make_model(8.0)), windows(4)[:, :32]
    (near,), (far,) = (calibrate.calibrate(model, INT4, text, context) for context in (32, 256))
    assert relative_error(far.k_center, near.k_center) > 0.05
    assert relative_error(far.v_center[0], near.v_center[0]) < 0.03


@pytest.mark.parametrize("command", ["prepare", "eval", "analyze"])
def test_arguments_are_refused_before_the_model_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which takes minutes for a large one."""
    monkeypatch.setattr(EvalModel, "load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe8")
    wrong = [["--text", "none.txt"], ["--text", str(tmp_path / "latin.txt")], ["--out", str(tmp_path)]]
    wrong += [["--format", "bf16", "--out", str(tmp_path / "c")]] if command == "prepare" else [["--formats", "int5"]]
    if command == "prepare":  # read as weights, or in their place
        wrong += [["--out", str(MODEL / name)] for name in ("c.safetensors", "model.safetensors", "sawkv/../c.bin")]
        wrong += [["--tokens", str(10**12)], ["--window", str(10**12)]]
    with pytest.raises(SystemExit):
        cli.main([command, str(MODEL), "--tokens", str(10**30)])
    assert "--tokens: expected a positive integer of at most 18 digits, got" in capsys.readouterr().err
    for options in wrong:
        assert cli.main([command, str(MODEL), *options]) == 2
        shown = capsys.readouterr().err
        assert "expected" in shown
        assert shown.count("\n") == 1


def test_each_bucket_of_positions_gets_the_center_of_its_keys() -> None:
    """Also buckets in which no window stands: a text that is read there has keys about that center."""
    model = EvalModel(make_model(8.0, rope_theta=2e4))
    (made,) = calibrate.calibrate(model, INT4, windows(4), 4 * BUCKET_SIZE)
    assert made.num_buckets == 4
    for bucket in range(4):
        places = bucket * BUCKET_SIZE + BUCKET_SIZE // 2 + torch.arange(64)
        for index, states in enumerate(model.states(windows(1), places)):
            far = torch.stack([(states.k.mean(0) - center).norm() for center in made.k_center[index]])
            assert int(far.argmin()) == bucket, far
            assert float(far[bucket]) < 0.2 * float(states.k.mean(0).norm())


def test_by_default_the_file_travels_with_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    assert cli.main(["prepare", str(folder), "--tokens", "512", "--window", "128", "--device", "cpu"]) == 0
    path = folder / "sawkv" / "int4-k128-v128.safetensors"
    assert str(path) in capsys.readouterr().out
    made = Calibration.load(path)
    assert made.weights == contents_digest(MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sawkv")
    cache = SawCache(model)
    model.generate(torch.tensor([[1, 2, 3]]), past_key_values=cache, max_new_tokens=1)
    assert torch.equal(cache.layers[2]._calibration.k_center, made.layer(2).k_center)


def test_the_newest_tokens_are_named_when_the_file_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is that of the pages, so the command that serves it names the format."""
    monkeypatch.setattr(refusals, "installed_release", lambda: (0, 32))
    file, short = tmp_path / "c.safetensors", ["--tokens", "128", "--window", "64", "--device", "cpu"]
    assert cli.main(["prepare", str(MODEL), "--format", "int4-r64", "--out", str(file), *short]) == 0
    assert f"sawkv serve {MODEL} --format int4-r64 --calibration {file}\n" in capsys.readouterr().out
    assert str(Calibration.load(file).format) == "int4-k128-v128"
    for name in ("int4-r64", "int4-r32", "int4"):
        preflight.check(str(MODEL), CacheFormat.parse(name), Options(["--port", "0"]), str(file), on_gpu=False)

    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    for name, named in (("int4-r64", " --format int4-r64"), ("int3", " --format int3"), ("int4", "")):
        assert cli.main(["prepare", str(folder), "--format", name, *short]) == 0
        assert f"Whoever serves {folder}{named} finds it there" in capsys.readouterr().out


def test_layers_of_unlike_heads_get_a_file_for_each_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma 4: two head_dims, and layers that read the K and V of others, whose queries count for these."""
    folder = tmp_path / "model"
    vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    sizes = {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    tiny_models.make_model("gemma4_text", **sizes).save_pretrained(folder)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sawkv")
    ids = torch.randint(0, vocabulary, (2, 64))
    made = calibrate.calibrate(EvalModel(AutoModelForCausalLM.from_pretrained(folder)), INT4, ids, 256)
    assert [part.k_center.shape for part in made] == [(4, 1, 1, 512), (4, 1, 2, 256)]
    wanted = measure(model.model, model.config, ids, preparation_positions(*ids.shape, 256), 256)
    assert [layer.rows for layer in wanted if layer is not None] == [[2 * 2 * 64]] * 2, "each is read by two layers"
    for index, shape in enumerate((1, 0)):
        (expected,) = fit([wanted[index]], INT4)
        got = made[shape].layer(index)
        for name in ("k_center", "v_center", "k_gain", "v_gain"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-3, atol=1e-3)
        assert all(part is None for part in vars(made[shape].layer(index + 2)).values()), "it has no pages"

    options = ["prepare", str(folder), "--tokens", "128", "--window", "64", "--device", "cpu"]
    assert cli.main([*options, "--out", str(tmp_path / "c")]) == 2
    assert "--out: expected a model whose layers have heads of one shape, got 2 layers, 1 KV" in capsys.readouterr().err
    assert cli.main(options) == 0
    shown = capsys.readouterr().out
    names = ["int4-k128-v128-1x512.safetensors", "int4-k128-v128-2x256.safetensors"]
    assert sorted(file.name for file in (folder / "sawkv").iterdir()) == names
    assert all(name in shown for name in names)
    files = [Calibration.load(folder / "sawkv" / name) for name in names]
    cache = SawCache(model)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    for index, part in enumerate(reversed(files)):
        assert part.weights == contents_digest(folder)
        assert torch.equal(cache.layers[index]._calibration.k_center, part.k_center[index])


def test_there_is_no_folder_beside_a_model_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prepare", str(tmp_path / "typo")]) == 2
    assert "expected a checkpoint directory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("own_text", [False, True])
def test_the_command_writes_a_file_for_this_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own_text: bool
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words, and others. " * 600)
    options = {"cache_format": CacheFormat("int4", 64, 0), "context": 512, "window": 128, "windows": 2, "device": "cpu"}
    assert calibrate.run_prepare(MODEL, text if own_text else None, tmp_path / "c.safetensors", **options) == 0
    shown = capsys.readouterr().out
    made = Calibration.load(tmp_path / "c.safetensors")
    assert made.fingerprint() in shown
    assert ("text.txt" if own_text else "the text of sawkv") in shown
    assert str(made.format) == "int4-k64-v0"
    assert made.k_center.shape == (5, 1, 2, 128)
    for part in (made.k_center, made.v_center, made.k_gain, made.v_gain, made.k_feedback, made.v_feedback):
        assert part is not None
        assert bool(part.any())
