# Over 400 lines: one test per thing that preparation has to leave unchanged.
"""A SawCache prepares its model at its first use: near 16 bits where unprepared INT4 is far off, once, and without a
trace in the model.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules import module as torch_modules
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from sawkv import CacheFormat, LayoutError, UnsupportedError
from sawkv.format.constants import BUCKET_SIZE
from sawkv.integrations.transformers import SawCache, prepare, stored
from sawkv.prepare import model as lab_model
from sawkv.prepare.calibration import Calibration, LayerCalibration, model_id
from sawkv.prepare.corpus import preparation_positions
from sawkv.prepare.store import CalibrationStore, contents_digest, shipped_paths
from tests.transformers.models import SMALL, make_model, plain_attention, using
from tests.transformers.test_compile import compiled_by, counting

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "models" / "sawkv-6m"


def ids(rows: int = 2, tokens: int = 40) -> torch.Tensor:
    return torch.randint(1, 99, (rows, tokens))


def biased(kind: str = "qwen2", attention: str = "sawkv", **changes: Any) -> PreTrainedModel:
    """A model whose keys have a large static part, in channels that rotary embeddings hardly turn: unprepared, 4 bits
    are spent on it.
    """
    model = make_model(kind, attention, attention_bias=True, **changes)
    head_dim = model.model.layers[0].self_attn.head_dim
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                heads = parameter.zero_().view(-1, 2, head_dim // 2)
                heads[:, :, -3:] = torch.randn(len(heads), 2, 3) * (30 if kind == "gpt_oss" else 60)
            elif name.endswith("q_proj.weight"):
                parameter.mul_(1.5 if kind == "gpt_oss" else 1)
    return model


def distance(model: PreTrainedModel, cache: Any, reference: PreTrainedModel | None = None) -> float:
    """Mean KL from the model's own 16-bit cache, nats a token, of a prompt and of steps."""
    torch.manual_seed(5)
    x, logs = ids(2, 60), []
    for each, held in ((reference or model, DynamicCache(config=model.config)), (model, cache)):
        with torch.no_grad():
            steps = [each(piece, **using(held)).logits for piece in x.split([50, 1, 1, 8], 1)]
        logs.append(torch.cat(steps, 1).log_softmax(-1))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[PreTrainedModel]:
    """The models that ran the text, with nothing on disk before."""
    measured: list[PreTrainedModel] = []
    measure = prepare.measure

    def noted(model: PreTrainedModel, *args: Any) -> Any:
        measured.append(model)
        return measure(model, *args)

    monkeypatch.setattr(prepare, "measure", noted)
    monkeypatch.setattr(stored, "CalibrationStore", functools.partial(CalibrationStore, tmp_path / "store"))
    return measured


def forget() -> None:
    """As a new process: nothing in memory."""
    prepare._prepared.clear()


def written_with(cache: SawCache) -> list[LayerCalibration]:
    return [layer._calibration for layer in cache.layers]


def assert_equal(a: list[LayerCalibration], b: list[LayerCalibration]) -> None:
    for ours, theirs in zip(a, b, strict=True):
        for x, y in zip(vars(ours).values(), vars(theirs).values(), strict=True):
            pairs = [(x, y)] if isinstance(x, torch.Tensor) else [(x.weights, y.weights), (x.step, y.step)]
            assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("attention", ["sawkv", "own"])
@pytest.mark.parametrize("options", [{}, {"max_cache_len": 80}, {"offload": True}, {"exact_prefill": True}])
@pytest.mark.parametrize("kind", ["qwen2", "gpt_oss"])
def test_a_prepared_model_is_near_where_an_unprepared_one_is_far_off(
    kind: str, options: dict[str, Any], attention: str
) -> None:
    """gpt-oss has sinks and windows."""
    name = plain_attention(kind) if attention == "own" else attention
    model, reference = biased(kind, name), biased(kind, plain_attention(kind))
    prepared, plain = (
        distance(model, SawCache(model.config, prepare=choice, **options), reference) for choice in (True, False)
    )
    assert prepared < 0.25 * plain
    assert plain > (0.05 if "exact_prefill" in options else 0.2), "the control must be bad"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text"])
def test_other_kinds(kind: str) -> None:
    """Soft-caps, windows, norms of keys. These random weights give keys no static part; without preparation they are
    near 16 bits too.
    """
    model, reference = make_model(kind), make_model(kind, plain_attention(kind))
    prepared, plain = (distance(model, SawCache(model.config, prepare=choice), reference) for choice in (True, False))
    assert prepared < 2 * plain


def test_the_shipped_model_and_its_text(
    runs: list[PreTrainedModel], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "WINDOW", 512)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32, attn_implementation="sawkv").eval()
    reference = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    with caplog.at_level(logging.INFO, "sawkv"):
        prepared = distance(model, SawCache(model.config), reference)
    assert prepared < 0.9 * distance(model, SawCache(model.config, prepare=False), reference)
    assert "random tokens" not in caplog.text
    assert "on 8 windows of 512 tokens, kept in" in caplog.text


def test_centers_of_buckets_are_those_that_the_lab_measures() -> None:
    """In both places a text at shifted positions shows how keys turn."""
    context = 3 * BUCKET_SIZE
    model, text = biased(max_position_embeddings=context), ids(3, 40)
    trunk = prepare.trunk_of(model)
    got = prepare.measure(trunk, model.config, text, preparation_positions(3, 40, context), context)
    want = lab_model.measure(lab_model.EvalModel(model), text, context)
    for mine, theirs in zip(got, want, strict=True):
        assert mine is not None
        assert mine.centers.shape == (3, 2, 2, 32)
        torch.testing.assert_close(mine.centers, theirs.centers, rtol=1e-2, atol=1e-2)
        assert float((mine.centers[2, 0] - mine.centers[0, 0]).norm()) > 1
        assert mine.rows == theirs.rows


def test_caches_of_one_model_share_one_preparation(runs: list[PreTrainedModel]) -> None:
    model = biased()
    caches = [
        SawCache(model.config),
        SawCache(model),
        SawCache(model.config, max_cache_len=80),
        SawCache(model.config, "int4-k16-v16"),
    ]
    for cache in (*caches, SawCache(model.config)):
        distance(model, cache)
    assert runs == [model.model] * 2, "a format of its own is fitted on its own"
    same = [written_with(cache) for cache in caches]
    assert all(a.k_center is b.k_center for a, b in zip(same[0], same[1], strict=True))
    assert not torch.equal(same[0][0].k_feedback.weights, same[3][0].k_feedback.weights)


def test_a_new_process_finds_it_on_disk(
    runs: list[PreTrainedModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, again = biased(), biased()
    caches = [SawCache(first), SawCache(again)]
    distance(first, caches[0])
    distance(again, caches[1])
    assert runs == [first.model], "the same weights in another model"
    assert_equal(written_with(caches[0]), written_with(caches[1]))
    (entry,) = (tmp_path / "store").glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-7])
    forget()
    caches.append(SawCache(again))
    distance(again, caches[2])
    assert runs == [first.model, again.model], "a damaged entry is made again"
    assert "made again" in caplog.text
    assert_equal(written_with(caches[0]), written_with(caches[2]))


@pytest.mark.parametrize(("kind", "shapes"), [("gemma4_text", 2), ("qwen3_next", 1)])
def test_layers_of_unlike_shapes_are_found_on_disk(
    kind: str, shapes: int, runs: list[PreTrainedModel], tmp_path: Path
) -> None:
    """Two head_dims, one in two rows, with layers that share K and V; and layers without attention."""
    first, again = make_model(kind), make_model(kind)
    if shapes > 1 and not getattr(first.config, "is_heterogeneous", False):
        pytest.skip("this Transformers does not say which layer has which heads, so nothing is kept")
    x, logs = ids(), []
    for model in (first, again):
        with torch.no_grad():
            logs.append(model(x, **using(SawCache(model))).logits)
    assert runs == [first.model]
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == shapes
    assert torch.equal(*logs)
    with torch.no_grad():
        unprepared = first(x, **using(SawCache(first, prepare=False))).logits
    assert not torch.equal(logs[0], unprepared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", [None, "in memory", "rotary embeddings", "in the file", "of other weights"])
def test_a_preparation_that_comes_with_the_model(
    changed: str | None,
    dtype: torch.dtype,
    runs: list[PreTrainedModel],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is used by the model in those files, in whatever dtype it is loaded, and by no other."""
    folder = tmp_path / "published"
    biased().save_pretrained(folder)
    calibration = prepared_for(folder)
    shutil.rmtree(tmp_path / "store")
    (path,) = shipped_paths(folder, [{"cache_format": calibration.format}])
    replace(calibration, weights="0" * 64 if changed == "of other weights" else contents_digest(folder) or "").save(
        path
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sawkv").eval()
    del runs[:]
    if changed is None:  # the weights are compared with those in the files, and need no digest
        monkeypatch.delattr(stored, "weights_digest")
    with torch.no_grad(), caplog.at_level(logging.INFO, "sawkv"):
        if changed == "in memory":
            model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
        elif changed == "rotary embeddings":
            model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
        elif changed == "in the file":
            path.write_bytes(path.read_bytes()[:-3])
        cache = SawCache(model)
        distance(model, cache)
    if changed is None:
        assert runs == []
        assert f"from {path}, which came with the model" in caplog.text
        assert_equal(written_with(cache), [calibration.layer(i) for i in range(calibration.num_layers)])
    else:
        assert runs == [model.model]
        assert (
            "which came with the model, cannot be used" in caplog.text
            or "the model in memory is not the one" in caplog.text
        )


def prepared_for(folder: Path) -> Calibration:
    """What a model in a folder is prepared with."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sawkv").eval()
    cache = SawCache(model)
    distance(model, cache)
    layers = dict(enumerate(written_with(cache)))
    return Calibration.from_layers(
        CacheFormat("int4").resolve(model.config.head_dim), model_id(model.config), len(layers), layers
    )


@pytest.mark.parametrize("how", ["in place", "one number of a bias", "data", "an adapter"])
def test_other_weights_never_share(how: str, runs: list[PreTrainedModel]) -> None:
    model = biased()
    distance(model, SawCache(model))
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        if how == "in place":
            attention.k_proj.weight.mul_(1.01)
        elif how == "one number of a bias":
            attention.k_proj.bias[3] += 50
        elif how == "data":
            attention.q_proj.weight.data += 0.01
        else:
            attention.k_proj = Adapted(attention.k_proj)
    distance(model, SawCache(model))
    assert len(runs) == 2
    distance(model, SawCache(model))
    assert len(runs) == 2
    if how == "an adapter":
        attention.k_proj.disable_adapters = True
        distance(model, SawCache(model))
        assert len(runs) == 3


class Adapted(torch.nn.Module):
    """As PEFT's layers: the weights of an adapter beside those of the model, and attributes that say which are in
    force.
    """

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer, self.disable_adapters = base, False
        self.lora = torch.nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) if self.disable_adapters else self.base_layer(x) + self.lora(x)


Adapted.__module__ = "peft.tuners.lora.layer"


def test_a_digest_of_weights_sees_every_bit() -> None:
    tensors = {
        "a": torch.randn(1000, 7),
        "b": torch.randn(5).bfloat16(),
        "c": torch.randint(0, 255, (3, 2**21 + 1), dtype=torch.uint8),
    }
    seen = {stored.weights_digest(tensors)}
    for name, x in tensors.items():
        for place in (0, -1, x.numel() // 2):
            changed = x.clone()
            as_bytes = changed.view(-1).view(torch.uint8)
            as_bytes[place] ^= 1
            seen.add(stored.weights_digest(tensors | {name: changed}))
    seen.add(stored.weights_digest(tensors | {"a": tensors["a"].view(7, 1000)}))
    seen.add(stored.weights_digest({"x" + name: x for name, x in tensors.items()}))
    assert len(seen) == 1 + 9 + 2
    assert stored.weights_digest(tensors) == stored.weights_digest(
        {name: x.clone() for name, x in reversed(tensors.items())}
    )
    assert stored.weights_digest(tensors | {"d": torch.empty(3, device="meta")}) is None


def test_it_is_deterministic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []
    for run in range(2):
        monkeypatch.setattr(stored, "CalibrationStore", functools.partial(CalibrationStore, tmp_path / str(run)))
        model = biased("gpt_oss", plain_attention("gpt_oss") if run else "sawkv")
        torch.manual_seed(run)
        cache = SawCache(model)
        distance(model, cache)
        made.append(written_with(cache))
    assert_equal(*made)


def everything(model: PreTrainedModel) -> dict[str, Any]:
    """All that could change in a model, and around it."""
    state = {name: x.clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}
    attributes = {
        f"{name}: {key}": repr(x) for name, m in model.named_modules() for key, x in vars(m).items() if key != "config"
    }
    return state | {
        "attributes": attributes,
        "config": repr(model.config),
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "generation": repr(model.generation_config),
        "random": torch.get_rng_state(),
        "gradients": torch.is_grad_enabled(),
        "hooks": len(torch_modules._global_forward_pre_hooks),
    }


@pytest.mark.parametrize("rope", [None, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}])
@pytest.mark.parametrize("attention", ["sawkv", "sdpa", "eager"])
def test_the_model_is_left_as_it_was(attention: str, rope: dict[str, Any] | None, runs: list[PreTrainedModel]) -> None:
    changes = {} if rope is None else {"rope_parameters": rope, "max_position_embeddings": 128}
    model = biased("llama", attention, **changes)
    model.train()
    model.model.layers[1].eval()
    before = everything(model)
    prepare.prepared(model, model.config, SawCache(model.config, "int4-k16-v16").settings.format)
    after = everything(model)
    assert runs == [model.model]
    for name, x in before.items():
        assert torch.equal(x, after[name]) if isinstance(x, torch.Tensor) else x == after[name], name


def test_hooks_go_away() -> None:
    model = biased()
    before = len(torch_modules._global_forward_pre_hooks), len(model.model._forward_pre_hooks)
    caches = [SawCache(model.config), SawCache(model), SawCache(model.config)]
    assert len(torch_modules._global_forward_pre_hooks) == before[0] + 2
    assert len(model.model._forward_pre_hooks) == before[1] + 1
    del caches[2]
    gc.collect()
    assert len(torch_modules._global_forward_pre_hooks) == before[0] + 1, "nobody waits for a cache that is gone"
    for cache in caches:
        distance(model, cache)
    assert (len(torch_modules._global_forward_pre_hooks), len(model.model._forward_pre_hooks)) == before
    for cache in (SawCache(model.config, "int8"), SawCache(model.config, prepare=False)):
        assert len(torch_modules._global_forward_pre_hooks) == before[0]
        distance(model, cache)


def test_a_pass_without_the_cache_may_prepare_it_but_never_fails_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = biased(), ids()

    def fail(*args: Any) -> None:
        raise RuntimeError("out of luck")

    caches = SawCache(model.config), SawCache(model)
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "prepared", fail)
        model(x, use_cache=False).logits.sum().backward()
        for cache in caches:
            with (
                torch.no_grad(),
                pytest.raises(UnsupportedError, match=r'RuntimeError: out of luck.*"int8".*prepare=False'),
            ):
                model(x, **using(cache))
            assert cache.get_seq_length() == 0
    want = distance(model, SawCache(model))
    assert [distance(model, cache) for cache in caches] == [want] * 2, "the next pass prepares it"


UNPREPARABLE: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "own attention": (
        lambda: AutoModelForCausalLM.from_config(
            AutoConfig.for_model("bloom", **(SMALL | {"n_head": 4, "n_layer": 2, "hidden_size": 64})),
            attn_implementation="eager",
        ).eval(),
        "bloom could not be prepared.*BloomModel to use Transformers' AttentionInterface, got 4 of 4 that do not",
    ),
    "numbers that are not finite": (lambda: with_nan(biased()), "expected finite Q, K and V"),
}


def with_nan(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.bias[0] = torch.nan
    return model


@pytest.mark.parametrize("what", UNPREPARABLE)
@pytest.mark.parametrize("options", [{}, {"max_cache_len": 80}, {"offload": True}])
def test_models_that_cannot_be_prepared_are_refused(
    what: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    make, message = UNPREPARABLE[what]
    model, x = make(), ids()
    cache = SawCache(model.config, **options)
    for _ in range(2):
        with (
            torch.no_grad(),
            pytest.raises(UnsupportedError, match=rf'{message}.*"int8"\) needs no preparation.*prepare=False'),
        ):
            model(x, **using(cache))
        assert int(cache.get_seq_length()) == 0
    assert "not prepared" not in caplog.text
    for _ in range(2):
        for other in (SawCache(model.config, "int8", **options), SawCache(model.config, prepare=False, **options)):
            with torch.no_grad():
                model(x, **using(other))
    assert caplog.text.count("not prepared (prepare=False)") == 1


def test_a_cache_of_another_model_is_refused() -> None:
    cache, model = SawCache(copy.deepcopy(biased().config)), biased()
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedError, match=r"expected a forward pass of the model before.*SawCache\(model\)"),
    ):
        model(ids(), **using(cache))


@pytest.mark.parametrize("given", ["model", "config"])
def test_assisted_generation_prepares_each_model(given: str, runs: list[PreTrainedModel]) -> None:
    model, assistant = biased(), biased(num_hidden_layers=2, layer_types=None)
    make = SawCache if given == "model" else (lambda model, *args: SawCache(model.config, *args))
    x = torch.randint(1, 99, (1, 6)).repeat(1, 8)
    cache, other = make(model), make(assistant)
    distance(assistant, other)
    assert runs == [assistant.model]
    plain = model.generate(x, **using(make(model)), max_new_tokens=20, do_sample=False)
    assert runs == [assistant.model, model.model]
    fast = model.generate(x, **using(cache), max_new_tokens=20, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, fast)
    assert runs == [assistant.model, model.model]


def test_compiled_steps_are_captured_after_it(runs: list[PreTrainedModel]) -> None:
    torch.compiler.reset()
    model, x = biased(), ids(3, 30)
    graphs: list[torch.fx.GraphModule] = []
    got = []
    for _ in range(2):
        cache = SawCache(model.config, max_cache_len=80)
        got.append(
            model.generate(
                x, **using(cache), max_new_tokens=9, do_sample=False, compile_config=compiled_by(counting(graphs))
            )
        )
    want = model.generate(x, **using(SawCache(model)), max_new_tokens=9, do_sample=False)
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], want)
    assert runs == [model.model]
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # when modules have hooks of all
@pytest.mark.parametrize("given", ["model", "config"])
@pytest.mark.parametrize("how", ["call", "module"])
def test_a_model_that_its_user_compiled(how: str, given: str, runs: list[PreTrainedModel]) -> None:
    torch.compiler.reset()
    model, x = biased(num_hidden_layers=1), ids()
    step = torch.compile(model.__call__ if how == "call" else model, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            cache = SawCache(model if given == "model" else model.config)
            got = [step(piece, **using(cache)).logits for piece in x.split([39, 1], 1)]
    plain = SawCache(model)
    with torch.no_grad():
        want = [model(piece, **using(plain)).logits for piece in x.split([39, 1], 1)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert runs == [model.model]
    torch.compiler.reset()


def test_modes_around_it(runs: list[PreTrainedModel]) -> None:
    """Inference mode, autocast, a grad mode that is on: what was made in one is used in the others."""
    x, model = ids(), biased()
    with torch.inference_mode():
        first = SawCache(model.config)
        model(x, **using(first))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x, **using(SawCache(model.config)))
    frozen = model.requires_grad_(False)
    frozen(x, **using(SawCache(model.config)))
    first.reset()
    assert distance(model, first) < 0.1
    assert runs == [model.model]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_default_device_of_the_caller_is_not_for_it(backend: str | None, runs: list[PreTrainedModel]) -> None:
    """As in scripts with `torch.set_default_device("cuda")`; meta stands for a GPU."""
    x, model = ids(), biased()
    with torch.device("meta"), torch.no_grad():
        got = model(x, **using(SawCache(model, backend=backend))).logits
    assert runs == [model.model]
    with torch.no_grad():
        torch.testing.assert_close(got, model(x, **using(SawCache(model, backend=backend))).logits)


def test_copies_and_pickles(runs: list[PreTrainedModel]) -> None:
    model, x = biased(), ids()
    cache = SawCache(model.config)
    early = copy.deepcopy(cache)
    with torch.no_grad():
        model(x, **using(cache))
        model(x, **using(early))
        late, loaded = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))  # noqa: S301
        want = model(x, **using(cache)).logits
        for other in (early, late):
            assert torch.equal(model(x, **using(other)).logits, want)
    assert runs == [model.model]
    assert all(a is b for a, b in zip(written_with(late), written_with(cache), strict=True)), "constants are shared"
    assert_equal(written_with(loaded), written_with(cache))


def test_a_model_that_waits_for_its_first_pass_is_copied_and_pickled(runs: list[PreTrainedModel]) -> None:
    model, x = biased(), ids()
    cache = SawCache(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301
    with torch.no_grad():
        want = model(x, **using(cache)).logits
        for other in copies:
            assert torch.equal(other(x, **using(SawCache(other))).logits, want)


def test_threads_prepare_once(runs: list[PreTrainedModel]) -> None:
    model, x = biased(), ids()
    want: list[torch.Tensor] = []

    def work() -> None:
        with torch.no_grad():
            want.append(model(x, **using(SawCache(model))).logits)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1
    assert len(want) == 4
    assert all(torch.equal(want[0], other) for other in want)


def test_the_decoder_alone_and_wrapped() -> None:
    """A bare decoder, a module around the model, and a model of several whose text config is given."""
    model, x = biased(), ids()
    for given in (model.config, model, model.model):
        cache = SawCache(given)
        with torch.no_grad():
            model.model(x, **using(cache))
        assert cache.get_seq_length() == 40
    wrapper = torch.nn.Sequential(model)
    cache = SawCache(wrapper)
    with torch.no_grad():
        model(x, **using(cache))
    with pytest.raises(UnsupportedError, match="expected a model of Transformers"):
        SawCache(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("given", ["whole", "text"])
def test_a_model_with_other_parts_is_prepared_on_text(given: str, runs: list[PreTrainedModel]) -> None:
    text = SMALL | {
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    from transformers import Gemma3ForConditionalGeneration

    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="sawkv", dtype=torch.float32).eval()
    cache = SawCache(model.config if given == "whole" else model.config.text_config)
    with torch.no_grad():
        model(ids(), **using(cache))
    assert runs == [model.model.language_model]
    assert cache.layers[0]._calibration.k_center is not None


def test_a_file_overrides_it(runs: list[PreTrainedModel], tmp_path: Path) -> None:
    model = biased()
    cache = SawCache(model)
    distance(model, cache)
    (entry,) = (tmp_path / "store").glob("*.safetensors")
    loaded = SawCache(model.config, calibration=entry)
    distance(model, loaded)
    assert runs == [model.model]
    assert isinstance(loaded.settings.calibration, Calibration)
    assert_equal(written_with(loaded), written_with(cache))


def test_random_tokens_are_said_once(caplog: pytest.LogCaptureFixture, runs: list[PreTrainedModel]) -> None:
    for seed in range(2):
        model = make_model("llama", seed=seed)
        distance(model, SawCache(model))
    assert len(runs) == 2
    assert caplog.text.count("random tokens, which is worse than on text") == 1


def test_early_initialization_comes_before_it(runs: list[PreTrainedModel]) -> None:
    model, x = biased(), ids()
    caches = [SawCache(model.config), SawCache(model.config)]
    caches[0].early_initialization(2, 2, 32, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        got, want = (model(x, **using(cache)).logits for cache in caches)
    assert torch.equal(got, want)
    with pytest.raises(LayoutError, match="expected 2 sequences"), torch.no_grad():
        model(x[:1], **using(caches[0]))
