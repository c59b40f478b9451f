"""A model is prepared when it is loaded: what that is worth on models whose keys have an offset, and what is kept
between starts.

The models are tiny and random, with a large bias in their key projections, as Qwen2.5 has in some layers: served
unprepared, the control, such a model is far from itself in 16 bits. Its true log-probabilities are those of
Transformers, in fp32.
"""

from __future__ import annotations

import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sawkv import CacheFormat
from sawkv.format.constants import BUCKET_SIZE
from sawkv.prepare import corpus
from sawkv.prepare.calibration import Calibration, LayerCalibration
from sawkv.prepare.fit import fit
from sawkv.prepare.statistics import LayerStatistics
from sawkv.prepare.store import contents_digest, shipped_paths
from tests.vllm.engine import run_engine

pytestmark = pytest.mark.vllm

VOCABULARY, CONTEXT = 512, 2 * BUCKET_SIZE
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
KINDS: dict[str, dict[str, Any]] = {
    # It turns keys by much from one bucket of positions to the next.
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gemma4_text": {  # two head_dims, one stored as two rows; K and V of one projection; a layer that shares both
        "attention_bias": True,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "head_dim": 256,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        },
        "tie_word_embeddings": True,
    },
    "gpt_oss": {  # sinks, the same windows
        "sliding_window": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 512,
        },
    },
    "granitemoehybrid": {  # a recurrent layer between two that attend
        "attention_bias": True,
        "layer_types": ["attention", "mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "position_embedding_type": "rope",
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": 0.125,
    },
}
PROMPTS = [random.Random(length).choices(range(VOCABULARY), k=length) for length in (40, 240)]
LONG = random.Random(0).choices(range(VOCABULARY), k=BUCKET_SIZE + 200)


def make_model(folder: Path, kind: str) -> Path:
    """Offsets of keys in channels that RoPE hardly turns, hundreds of times what tells keys apart. Norms of keys keep
    that ratio, and make keys longer again.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind]}), dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            head_dim = model.get_submodule(name.removesuffix(".k_proj.bias")).head_dim
            offset = parameter.data.zero_().view(-1, head_dim)
            offset[:, head_dim // 2 - 4 : head_dim // 2] = 200 * torch.randn(len(offset), 4)
        elif name.endswith("k_norm.weight"):
            parameter.data.fill_(8)
        elif parameter.ndim > 1:
            parameter.data.normal_(std=0.06)
    model.save_pretrained(folder)
    return folder


class Truth:
    """A model in Transformers, in fp32, that looks at what its attention gets."""

    def __init__(self, folder: Path) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register("watched", self._attend)
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="watched"
        ).eval()
        self._statistics: dict[int, LayerStatistics] | None = None
        self._context, self._running = 0, corpus.Pass(torch.empty(0), torch.empty(0))

    @torch.no_grad()
    def scores(self, prompts: list[list[int]]) -> list[list[float]]:
        """Log-probabilities of the prompts' own tokens."""
        out = []
        for prompt in prompts:
            logits = self._model(torch.tensor([prompt])).logits[0, :-1]
            out.append(logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist())
        return out

    @torch.no_grad()
    def fitted(self, cache_format: CacheFormat, context: int, window: int) -> list[Calibration]:
        """What the text of preparation says, here random tokens, as the models have no tokenizer; for each shape of
        layers.
        """
        self._statistics, self._context = {}, context
        windows = corpus.random_windows(VOCABULARY, window, corpus.NUM_WINDOWS)
        for each in corpus.passes(windows, corpus.preparation_positions(*windows.shape, context), context):
            self._running = each
            self._model(each.ids[None], position_ids=each.positions[None])
        found, self._statistics = self._statistics, None
        shapes: dict[tuple[int, int], dict[int, LayerCalibration]] = {}
        for index, layer in zip(found, fit(list(found.values()), cache_format), strict=True):
            shape = found[index].num_kv_heads, found[index].head_dim
            shapes.setdefault(shape, {})[index] = layer
        num_layers = self._model.config.num_hidden_layers
        return [Calibration.from_layers(cache_format, "m", num_layers, shapes[shape]) for shape in sorted(shapes)]

    def _attend(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """Whatever the mask: texts are alone in their batch. Plain fp32, all scores at once."""
        window, softcap = options.get("sliding_window"), options.get("softcap")
        if self._statistics is not None:
            index = max(self._statistics) if getattr(module, "is_kv_shared_layer", False) else module.layer_idx
            statistics = self._statistics.get(index)
            if statistics is None:
                statistics = LayerStatistics(k.shape[1], k.shape[3], "cpu", scaling, window or 0, self._context)
                statistics.set_output_weight(module.o_proj.weight)
                self._statistics[index] = statistics
            rows = (x[0].transpose(0, 1) for x in (q, k, v))
            statistics.add(*rows, positions=self._running.positions, is_probe=self._running.is_probe)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        scores = scores.masked_fill((distance < 0) | (distance >= (window or len(distance))), -torch.inf)
        if (sinks := getattr(module, "sinks", None)) is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)], -1)
        return (scores.softmax(-1)[..., : q.shape[2]] @ v).transpose(1, 2), None


# One kind is enough for the oldest vLLM, and 0.27 cannot read Gemma 4's config as Transformers 5.24 has it.
MARKS = {kind: pytest.mark.newest for kind in KINDS if kind != "qwen2"}


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=MARKS.get(kind, ())) for kind in KINDS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """The biased model, a folder of what was prepared, and its first start, which filled that."""
    model, kept = make_model(tmp_path_factory.mktemp("biased"), "qwen2"), tmp_path_factory.mktemp("kept")
    return model, kept, engine(model, kept)


def engine(
    model: Path, kept: Path, prompts: list[list[int]] = PROMPTS, prepared: bool = True, **options: Any
) -> dict[str, Any]:
    limits = {
        "max_model_len": CONTEXT,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "kv_cache_dtype": "int4_per_token_head",
    }
    settings = {"sawkv": {"prepare": prepared, "prepare_cache": str(kept)}}
    result = run_engine(
        model=str(model), waves=[prompts], max_tokens=1, scores=True, additional_config=settings, **limits | options
    )
    # Of ranks that are other processes nothing is seen.
    assert "error" in result or result["implementation"] in (["SawAttentionImpl"], [])
    return result


def entry(kept: Path) -> Path:
    (path,) = kept.glob("*.safetensors")
    return path


def logged(result: dict[str, Any], text: str) -> list[str]:
    return [line for line in result["log"] if text in line]


def distance(a: list[list[float]], b: list[list[float]]) -> float:
    """Mean difference of log-probabilities in nats."""
    return float(
        torch.tensor([abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]).mean()
    )


def assert_near(got: Calibration, expected: Calibration) -> None:
    """Equal but for rounding. Feedback's weights are rounded to integers: one may be off by one."""
    for name in ("k_center", "v_center", "k_gain", "v_gain"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-3, atol=1e-3)
    for name in ("k_feedback", "v_feedback"):
        steps = getattr(got, f"{name}_step"), getattr(expected, f"{name}_step")
        torch.testing.assert_close(*steps, rtol=1e-2, atol=0)
        assert (getattr(got, name).int() - getattr(expected, name).int()).abs().max() <= 2


def test_a_prepared_model_is_near_itself_in_16_bits(folder: Path, tmp_path: Path) -> None:
    """One model is asked a prompt of two buckets too, and judged by the second one alone."""
    truth, is_long = Truth(folder), '"model_type": "qwen2"' in (folder / "config.json").read_text()
    prompts = [*PROMPTS, LONG] if is_long else PROMPTS
    prepared, unprepared = (engine(folder, tmp_path, prompts, choice) for choice in (True, False))
    assert "error" not in prepared, prepared["error"]
    exact = truth.scores(prompts)
    for part in [slice(0, 240), slice(BUCKET_SIZE, None)][: 1 + is_long]:
        near, far, right = ([s[part] for s in scores] for scores in (prepared["scores"], unprepared["scores"], exact))
        assert distance(near, right) < 0.4 * distance(far, right)
    (line,) = logged(prepared, "prepared in")
    kept = sorted(map(Calibration.load, tmp_path.glob("*.safetensors")), key=lambda x: (x.num_kv_heads, x.head_dim))
    assert f"fingerprint {', '.join(part.fingerprint() for part in kept)}" in line
    assert all(part.num_buckets == 2 for part in kept)
    window = int(re.search(r"windows of (\d+) tokens", line)[1])  # with recurrent layers it depends on vLLM's version
    for got, expected in zip(kept, truth.fitted(kept[0].format, CONTEXT, window), strict=True):
        assert_near(got, expected)
    assert not logged(prepared, "unprepared")
    assert logged(unprepared, "served unprepared")


def test_a_second_start_runs_no_text_and_serves_the_same(biased: tuple[Path, Path, dict[str, Any]]) -> None:
    model, kept, first = biased
    second = engine(model, kept, seed=1)  # another engine, asked the same
    assert logged(first, "preparing the model on")
    assert not logged(second, "preparing the model on")
    assert logged(second, f"from {entry(kept)}, fingerprint {Calibration.load(entry(kept)).fingerprint()}")
    assert second["scores"] == first["scores"]
    assert second["kv_tokens"] == first["kv_tokens"]


def test_a_damaged_entry_is_made_again_with_equal_bytes(biased: tuple[Path, Path, dict[str, Any]]) -> None:
    model, kept, first = biased
    path, content = entry(kept), bytearray(entry(kept).read_bytes())
    fingerprint = Calibration.load(path).fingerprint()
    content[-100] ^= 4
    path.write_bytes(content)
    again = engine(model, kept, seed=2)
    assert logged(again, "made again")
    assert logged(again, "preparing the model on")
    assert Calibration.load(path).fingerprint() == fingerprint
    assert again["scores"] == first["scores"]


@pytest.mark.newest
def test_two_ranks_fit_what_one_does(biased: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    """Each has one of the two KV heads. The file does not depend on ranks, so its name is the same."""
    model, kept, first = biased
    ranked = engine(model, tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert entry(tmp_path).name == entry(kept).name
    assert_near(Calibration.load(entry(tmp_path)), Calibration.load(entry(kept)))
    assert distance(ranked["scores"], first["scores"]) < 0.02


def test_a_preparation_that_comes_with_the_model_is_used(
    biased: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, kept, first = biased
    published = Path(shutil.copytree(model, tmp_path / "published"))
    path = publish(published, Calibration.load(entry(kept)), contents_digest(published) or "")
    served = engine(published, tmp_path / "none", seed=3)
    assert logged(served, f"from {path}, which came with the model, fingerprint {Calibration.load(path).fingerprint()}")
    assert not logged(served, "preparing the model on")
    assert served["scores"] == first["scores"]


def publish(folder: Path, calibration: Calibration, weights: str) -> Path:
    (path,) = shipped_paths(folder, [{"cache_format": calibration.format}])
    replace(calibration, weights=weights).save(path)
    return path


def test_one_changed_weight_is_another_model_and_a_small_engine_prepares_it(
    biased: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, kept, _ = biased
    changed = Path(shutil.copytree(model, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"][3] *= 1.001
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    publish(changed, Calibration.load(entry(kept)), contents_digest(model) or "")
    mine = Path(shutil.copytree(kept, tmp_path / "kept"))
    small = {
        "max_model_len": CONTEXT,
        "max_num_batched_tokens": CONTEXT,
        "max_num_seqs": 1,
        "enable_chunked_prefill": False,
    }
    result = engine(changed, mine, [[1, 2, 3]], enable_prefix_caching=False, enable_lora=True, **small)
    assert logged(result, "which came with the model, cannot be used, and the model is prepared anew")
    assert logged(result, "preparing the model on")
    assert len(list(mine.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("fault", ["NaN", "too short"])
def test_a_model_that_cannot_be_prepared_is_not_served(
    fault: str, biased: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, options = biased[0], {}
    if fault == "NaN":
        model = Path(shutil.copytree(model, tmp_path / "broken"))
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = torch.nan
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    else:
        options = {"max_model_len": 12}
    error = engine(model, tmp_path / "kept", [], **options)["error"]
    assert "sawkv cannot prepare this model" in error
    assert "--format int8" in error
    assert "--no-prepare" in error
    assert ("NaN" if fault == "NaN" else "--max-model-len") in error
