"""Compiled decoding: one graph a step, that never recompiles, and gives what uncompiled steps give."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from transformers import CompileConfig, PreTrainedModel

from sawkv.integrations.transformers import SawCache
from tests.transformers.models import make_model, using
from tests.transformers.test_generate import PADDED, generate, prompt


def compiled_by(backend: Any) -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True  # Transformers compiles on a GPU alone, unless it is told
    return config


def counting(graphs: list[torch.fx.GraphModule]) -> Any:
    """A compiler that runs graphs as they are, and lists them."""

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return compiler


def static(model: PreTrainedModel, **options: Any) -> SawCache:
    return SawCache(model.config, max_cache_len=80, **options)


@pytest.fixture(autouse=True)
def _forget_graphs() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("kind", "padded"), [("qwen3", True), ("mistral", False), ("gemma2", True)])
def test_compiled_steps_equal_uncompiled_ones(kind: str, padded: bool) -> None:
    ids, model = prompt(), make_model(kind)
    options = {"attention_mask": PADDED} if padded else {}
    want = generate(model, SawCache(model.config), ids, **options)
    eager = generate(model, static(model), ids, disable_compile=True, **options)
    assert torch.equal(eager.sequences, want.sequences)
    graphs: list[torch.fx.GraphModule] = []
    compiler, cache = counting(graphs), static(model)
    for _ in range(2):
        got = generate(model, cache, ids, compile_config=compiled_by(compiler), **options)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=0.02, rtol=0)
        assert int(cache.get_seq_length()) == 53
        cache.reset()
    assert len(graphs) == 1, "one graph serves all steps, and all generations with this cache"


def test_aot_autograd_keeps_every_layer() -> None:
    """The pages change behind the graph's back: no pass may merge, drop or reorder the calls."""
    ids, model = prompt(), make_model("qwen3")
    want = generate(model, SawCache(model.config), ids)
    caches = [static(model), static(model)]  # the second must not run a graph of the first
    for cache in caches:
        got = generate(model, cache, ids, compile_config=compiled_by("aot_eager"))
        assert torch.equal(got.sequences, want.sequences)


def test_new_caches_compile_nothing() -> None:
    """The cache's number is an argument of the graph."""
    ids, model = prompt(), make_model("qwen3")
    graphs: list[torch.fx.GraphModule] = []
    compiler, want = counting(graphs), generate(model, SawCache(model), ids)
    for _ in range(4):
        got = generate(model, static(model), ids, compile_config=compiled_by(compiler))
        assert torch.equal(got.sequences, want.sequences)
    assert len(graphs) == 1


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_pickled_cache_is_one_of_its_own(is_alive: bool) -> None:
    """In the process that holds the original, and in others, whose caches have numbers of their own."""
    ids, model = prompt(1), make_model("llama")
    want = generate(model, SawCache(model.config), ids)
    cache = static(model)
    with torch.no_grad():
        model(ids[:, :-1], **using(cache))
    pickled, before = pickle.dumps(cache), int(cache.get_seq_length())
    if not is_alive:
        del cache
    other = pickle.loads(pickled)  # noqa: S301  # its own
    got = generate(model, other, ids, compile_config=compiled_by("eager"))
    assert torch.equal(got.sequences, want.sequences)
    assert not is_alive or int(cache.get_seq_length()) == before


def test_a_compiled_step_checks_its_mask_and_room() -> None:
    """It cannot ask the host, so the device stops with an error."""
    model, ids = make_model("llama"), prompt()
    step = torch.compile(model.__call__, backend="eager")
    full, some = torch.ones(3, 1, 1, 32, dtype=torch.bool), torch.ones(3, 1, 1, 32, dtype=torch.bool)
    some[:, :, :, 5] = False
    with torch.no_grad():
        for mask, steps in ((some, 1), (full, 2)):  # each of a cache of its own: there is no way back
            cache = SawCache(model.config, max_cache_len=32)
            model(ids, **using(cache))
            causal = full & (torch.arange(32) <= 30)
            step(ids[:, :1], **using(cache), attention_mask=causal, position_ids=torch.full((3, 1), 30))
            if steps == 2:
                step(ids[:, :1], **using(cache), attention_mask=full, position_ids=torch.full((3, 1), 31))
            with pytest.raises(RuntimeError, match="Expected"):
                step(ids[:, :1], **using(cache), attention_mask=mask, position_ids=torch.full((3, 1), 30 + steps))


def test_a_growing_cache_under_torch_compile_is_right() -> None:
    """It breaks the graph at each attention."""
    model, ids = make_model("llama", num_hidden_layers=1), prompt()
    step = torch.compile(model.__call__, backend="eager")
    plain, cache = SawCache(model.config), SawCache(model.config)
    with torch.no_grad(), pytest.raises(Exception, match="only decoding steps of a SawCache with max_cache_len"):
        torch.compile(model.__call__, backend="eager", fullgraph=True)(ids, **using(SawCache(model.config)))
    with torch.no_grad():
        for piece in (ids, ids[:, :1]):
            torch.testing.assert_close(step(piece, **using(cache)).logits, model(piece, **using(plain)).logits)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"do_sample": True}])
def test_other_modes_with_pages_that_never_move(options: dict[str, Any]) -> None:
    ids = prompt(1)
    for kind in ("qwen3", "mistral"):
        model = make_model(kind)
        want = generate(model, SawCache(model.config), ids, **options)
        cache = static(model)
        addresses = []
        for _ in range(2):
            got = generate(model, cache, ids, disable_compile=True, **options)
            addresses.append([layer.pages.pages.data_ptr() for layer in cache.layers])
            assert torch.equal(got.sequences, want.sequences)
            cache.reset()
        assert addresses[0] == addresses[1]
