"""What is read from config.json: layers, windows, states, the longest context; and what is refused, by the reason that
serving gives.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from benchmarks.shapes import SHAPES
from sawkv.capacity.caches import KVCache
from sawkv.capacity.model import Attention, State, read_shape
from sawkv.errors import UnsupportedError
from sawkv.format.spec import CacheFormat
from tests.capacity.configs import CONFIGS


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (SHAPES["mistral-7b"], {4096: 32}),
        (SHAPES["gemma-2-9b"], {4096: 21, 0: 21}),
        (SHAPES["gemma-3-1b"], {512: 22, 0: 4}),
        (SHAPES["gpt-oss-20b"], {128: 12, 0: 12}),
        (CONFIGS["phi-3-mini-4k"], {2047: 32}),
        (CONFIGS["gemma-3-27b"], {1024: 52, 0: 10}),
        (CONFIGS["gemma-3n-e4b"], {512: 16, 0: 4}),  # of 35 layers the last 15 store nothing
        (SHAPES["qwen2.5-7b"] | {"sliding_window": 64, "use_sliding_window": False}, {0: 28}),
        (SHAPES["gemma-3-1b"] | {"layer_types": ["sliding_attention"] * 25 + ["full_attention"]}, {512: 25, 0: 1}),
    ],
)
def test_windows(config: dict[str, Any], windows: dict[int, int]) -> None:
    assert Counter(layer.window for layer in read_shape(config, language_model_only=True).attention) == windows


def test_layers_of_unlike_heads() -> None:
    shape = read_shape(CONFIGS["gemma-4-26b-a4b"])
    assert Counter((layer.num_kv_heads, layer.head_dim, layer.window) for layer in shape.attention) == {
        (8, 256, 1024): 25,
        (2, 512, 0): 5,
    }


@pytest.mark.parametrize(
    ("name", "attention", "states", "state"),
    [
        # 2 x 16 x 128 + 32 x 128 channels; a matrix of 128 x 128 for each of 32 heads.
        ("qwen3-next-80b", 12, 36, State(3, 8192, heads=32, head_values=16384)),
        ("qwen3.5-35b-a3b", 10, 30, State(3, 8192, heads=32, head_values=16384, value_bytes=4)),
        # 128 x 80 channels, and 2 x 128 for each of 8 groups; in 32 bits although config.json does not say so.
        ("nemotron-nano-9b-v2", 4, 27, State(3, 10240, 8, 256, heads=128, head_values=10240, value_bytes=4, held=3)),
        ("granite-4-h-small", 4, 36, State(3, 8192, 1, 256, heads=128, head_values=8192, held=3)),
        ("falcon-h1-1.5b", 24, 24, State(3, 3072, 1, 512, heads=48, head_values=16384, held=3)),
        ("zamba2-1.2b", 6, 38, State(3, 4096, 1, 128, heads=64, head_values=4096, held=3)),
        ("lfm2-1.2b", 6, 10, State(2, 2048)),
    ],
)
def test_states_of_hybrids(name: str, attention: int, states: int, state: State) -> None:
    shape = read_shape(CONFIGS[name])
    assert (len(shape.attention), len(shape.states)) == (attention, states)
    assert set(shape.states) == {state}


def test_bytes_of_a_state() -> None:
    """Convolution in 16 bits; groups that the ranks do not divide are repeated to one for each rank, as vLLM does."""
    state = State(3, 8192, 1, 256, heads=128, head_values=8192)
    assert state.nbytes(1) == 2 * 3 * (8192 + 256) + 2 * 128 * 8192
    assert state.nbytes(4) == 2 * 3 * (8192 + 4 * 256) // 4 + 2 * 32 * 8192


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (CONFIGS["phi-3-mini-4k"], 4096),
        (CONFIGS["gpt2"], 1024),
        ({"model_type": "gpt_neox", "is_decoder": False, "hidden_size": 512, "num_attention_heads": 8}, 2048),
        (CONFIGS["gemma-3-27b"], 131072),  # by its class, and not times the factor of 8 that its RoPE has
        (
            CONFIGS["llama-3.1-8b"]
            | {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            16384,
        ),
        (
            CONFIGS["llama-3.1-8b"]
            | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
    ],
)
def test_longest_context(config: dict[str, Any], longest: int) -> None:
    assert read_shape(config, language_model_only=True).max_context == longest


MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "deepseek_v3", **MLA}, r"MLA \(multi-head latent attention\)"),
        (
            {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, **MLA},
            "MLA",
        ),
        ({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2", **MLA}}, "MLA"),
        ({"model_type": "deepseek_v3"}, "MLA"),  # by the defaults of its class
        (
            {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "num_hidden_layers": 48}},
            r"attention in chunks \(attention_chunk_size\)",
        ),
        (
            {"model_type": "llama", "layer_types": ["full_attention", "indexed_attention"], "num_hidden_layers": 2},
            "layers of indexed_attention",
        ),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "the attention of an encoder"),
        ({"model_type": "roberta", "is_decoder": False}, "the attention of an encoder"),
        ({"model_type": "modernbert"}, "the attention of an encoder"),
        ({"model_type": "vit"}, "the attention of an encoder"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "the attention of an encoder"),
        ({"model_type": "t5"}, "cross attention"),
        ({"model_type": "whisper"}, "cross attention"),
        ({"model_type": "mamba"}, "no layer with attention"),
        ({"model_type": "mamba2"}, "no layer with attention"),
        ({"model_type": "minimax"}, "layers of linear_attention of minimax"),
        ({"model_type": "qwen2", "is_causal": False}, "the attention of an encoder"),
        ({"model_type": "diffusion_gemma"}, "tokens of a block"),
        ({"model_type": "minimax_m3_vl"}, r"a cache of their own \(sparse attention\)"),
        ({"model_type": "gemma4_unified"}, "add --language-model-only"),
        ({"model_type": "bamba", "attn_layer_indices": [9]}, "layers of linear_attention of bamba"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "gemma4_text", "global_head_dim": 1024}, "head_dim: expected .* or 512, got 1024"),
        (CONFIGS["gemma-3-27b"], "add --language-model-only to serve text alone"),
        ({"model_type": "rwkv"}, "expected the sizes of a decoder"),
        ({"model_type": "my_new_model"}, "got 'my_new_model' .no code of a checkpoint is run"),
        ({}, "expected a model_type that Transformers .* knows, got None"),
        (
            {"model_type": "qwen3", "hidden_size": "big"},
            "expected a config.json that Transformers' qwen3 class reads, got: .*hidden_size",
        ),
        ({"model_type": "qwen3", "num_hidden_layers": None}, "expected"),
    ],
)
def test_what_is_not_served_is_refused_by_its_reason(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as refusal:
        KVCache.of_format(CacheFormat("int4"), read_shape(config))
    assert "\n" not in str(refusal.value)


def test_head_dims_of_keys_and_values_must_agree() -> None:
    transformers = pytest.importorskip("transformers")
    if "mimo_v2_flash" not in transformers.CONFIG_MAPPING:
        pytest.skip("this Transformers does not know the model")
    for config in ({}, {"head_dim": 192, "v_head_dim": 128, "attention_chunk_size": 128}):  # as on the hub
        with pytest.raises(UnsupportedError, match=r"model: head_dim 128 of V apart from 192 of K$"):
            read_shape({"model_type": "mimo_v2_flash"} | config)


@pytest.mark.parametrize(("model_type", "disabled"), [("minicpm3", ""), ("deepseek_v3", "1")])
def test_k_and_v_of_each_head_from_a_latent(model_type: str, disabled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM stores them as other models' K and V, and pads V to K."""
    monkeypatch.setenv("VLLM_MLA_DISABLE", disabled or "0")
    config = {
        "model_type": model_type,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        **MLA,
    }
    assert read_shape(config).attention == (Attention(8, 8, 192),) * 2


def test_nothing_of_the_checkpoint_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("code of a checkpoint was asked for")

    monkeypatch.setattr(dynamic_module_utils, "get_class_from_dynamic_module", fail)
    assert (
        len(
            read_shape(
                CONFIGS["qwen3-8b"] | {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
            ).attention
        )
        == 36
    )
