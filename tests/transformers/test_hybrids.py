"""Models with attention in some layers and recurrent states in others: sawkv has the pages, Transformers the states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from sawkv import LayoutError, UnsupportedError
from sawkv.integrations.transformers import SawCache
from tests.transformers.models import CACHE_NAME, SMALL, UNLIKE, SimulatedCache

KINDS: dict[str, dict[str, Any]] = {
    "qwen3_next": UNLIKE["qwen3_next"],
    "lfm2": {  # short convolutions
        "layer_types": ["conv", "full_attention"] * 2,
        "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "zamba2": {
        "hidden_size": 64,
        "head_dim": 32,
        "attention_head_dim": 32,
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "num_key_value_heads": 4,
    },
}
"""Attention in some layers, or beside a recurrent part in all layers (Falcon-H1) or in some (Zamba2)."""
LENGTHS = (31, 12, 20)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    config = AutoConfig.for_model(request.param, **SMALL | KINDS[request.param] | {"initializer_range": 0.3})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sawkv").float().eval()


def batch() -> dict[str, torch.Tensor]:
    """Prompts of unlike lengths, padded on the left."""
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(LENGTHS):
        ids[i, -length:] = torch.randint(2, 99, (length,))
        mask[i, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def written(model: PreTrainedModel, cache: Any, inputs: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None} | options
    with torch.inference_mode():
        texts: list[list[int]] = model.generate(**inputs, **{CACHE_NAME: cache}, **options).tolist()
    return texts


@pytest.mark.parametrize("attention", ["sawkv", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_pages_without_quantization_write_the_texts_of_transformers_own_cache(
    model: PreTrainedModel, attention: str, options: dict[str, Any]
) -> None:
    inputs = batch()
    model.set_attn_implementation("sdpa")
    want = written(model, DynamicCache(config=model.config), inputs, **options)
    model.set_attn_implementation(attention)
    cache = SawCache(model, "fp32-k16-v16")
    assert written(model, cache, inputs, **options) == want
    assert cache.nbytes > 0
    other = SawCache(model, "int4", prepare=False)
    assert len(written(model, other, inputs, **options)) == len(want)
    assert other.nbytes < cache.nbytes / 4


def test_int4_is_prepared_and_holds_what_was_measured(model: PreTrainedModel) -> None:
    inputs, losses = batch(), []
    if model.config.model_type == "zamba2":
        with pytest.raises(UnsupportedError, match="expected attention layers that know their index, got Zamba2Att"):
            written(model, SawCache(model), inputs)
        return
    with torch.inference_mode():
        exact = model(**inputs, **{CACHE_NAME: SawCache(model, "fp32-k16-v16")}).logits[:, -1]
        for prepare in (True, False):
            cache = SawCache(model, prepare=prepare)
            got = model(**inputs, **{CACHE_NAME: cache}).logits[:, -1]
            losses.append(float((got - exact).square().mean()))
            layers = [layer for layer in cache.layers if hasattr(layer, "pages")]
            assert [layer.index for layer in layers] == [
                i for i, name in enumerate(model.config.layer_types) if name in ("full_attention", "hybrid")
            ]
            assert all((layer.pages.k_feedback is not None) == prepare for layer in layers)
            assert all(bool(layer.pages.k_center.any()) for layer in layers) if prepare else True
        model.set_attn_implementation("sdpa")
        simulated = model(**inputs, **{CACHE_NAME: SimulatedCache(model.config, "int4")}).logits[:, -1]
    assert 0 < max(losses) < 0.5 * float(exact.square().mean())
    assert float((got - simulated).square().mean()) < 1e-3 * losses[-1], "unprepared"


def test_a_crop_of_recurrent_states_is_refused_and_a_reset_is_not(model: PreTrainedModel) -> None:
    inputs, cache = batch(), SawCache(model, "fp32-k16-v16")
    want = written(model, cache, inputs)
    held = cache.get_seq_length()
    with pytest.raises(UnsupportedError, match=r"recurrent states of .* cannot be taken back"):
        cache.crop(-2)
    assert cache.get_seq_length() == held
    cache.crop(held)
    assert cache.get_seq_length() == held
    alone = {name: x[:1] for name, x in inputs.items()}
    cache.reset()
    assert written(model, cache, alone) == want[:1], "of another batch size, from no states"
    cache.crop(-cache.get_seq_length())
    assert written(model, cache, inputs) == want


def test_a_prompt_that_dies_before_its_first_layer_of_attention_is_noticed(model: PreTrainedModel) -> None:
    """By the next pass of several tokens. Steps of one token change states behind the cache's back."""
    inputs, cache = batch(), SawCache(model, "fp32-k16-v16")
    mixer = next(part for part in model.modules() if hasattr(part, "in_proj") or hasattr(part, "in_proj_qkvz"))
    with torch.inference_mode():
        hook = mixer.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs, **{CACHE_NAME: cache})
        hook.remove()
        for _ in range(2):
            with pytest.raises(LayoutError, match=r"before its first layer of attention, stopped half way.*reset"):
                model(**inputs, **{CACHE_NAME: cache})
        cache.reset()
        got, want = (model(**inputs, **{CACHE_NAME: held}).logits for held in (cache, SawCache(model, "fp32-k16-v16")))
    assert torch.equal(got, want)


def test_a_copy_and_a_selection_have_their_own_states(model: PreTrainedModel) -> None:
    inputs = batch()
    with torch.inference_mode():
        cache = SawCache(model, "fp32-k16-v16")
        first = model(**inputs, **{CACHE_NAME: cache}).logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(first)], 1)
        twin = copy.deepcopy(cache)
        want = model(first, attention_mask=mask, **{CACHE_NAME: cache}).logits
        chosen = torch.tensor([2, 0])
        twin.batch_select_indices(chosen)
        got = model(first[chosen], attention_mask=mask[chosen], **{CACHE_NAME: twin}).logits
    torch.testing.assert_close(got, want[chosen], rtol=1e-4, atol=1e-4)


def test_what_is_not_served_is_refused_by_name(model: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedError, match="expected no max_cache_len for a"):
        SawCache(model, max_cache_len=64)
    if model.config.layer_types[0] == "hybrid":
        return
    layers = {name: [model.config.layer_types[0]] * 4 for name in ("layer_types", "layers_block_type")}
    without = AutoConfig.for_model(model.config.model_type, **SMALL | KINDS[model.config.model_type] | layers)
    with pytest.raises(UnsupportedError, match="no layer of attention"):
        SawCache(without)
