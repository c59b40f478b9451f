"""Tiny random models of many kinds, and a cache that simulates a format with Transformers' own tensors."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel, logging
from transformers.models.auto.configuration_auto import AutoConfig

from sawkv import CacheFormat
from sawkv.format.codecs import CODECS
from sawkv.format.rotation import rotate

logging.disable_progress_bar()

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 99,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"head_dim": 32},
    "qwen3": {},
    "mistral": {"sliding_window": 20},
    "gemma2": {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 20,
        "layer_types": ALTERNATING,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 20, "layer_types": ALTERNATING},
    "gpt_oss": {
        "head_dim": 32,
        "sliding_window": 20,
        "layer_types": ALTERNATING,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
UNLIKE: dict[str, dict[str, Any]] = {
    "gemma4_text": {  # two head_dims, and layers that share K and V
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 100,
        "sliding_window": 20,
        "layer_types": ALTERNATING,
    },
    "qwen3_next": {  # gated delta nets
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
"""Models whose layers differ: in heads, in whose K and V they read, or in whether they attend at all."""


CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def using(cache: Any) -> dict[str, Any]:
    """The argument that gives a cache to `generate` and to models: its name has changed."""
    return {CACHE_NAME: cache}


def make_model(kind: str, attention: str = "sawkv", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in fp32, with weights large enough that attention matters."""
    config = AutoConfig.for_model(kind, **(SMALL | (MODELS | UNLIKE)[kind] | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            elif "sinks" in name:
                weight.normal_()
    # Random models never mean to stop; without any, Transformers 5.5 cannot draft.
    model.generation_config.eos_token_id = 10**6
    model.generation_config.pad_token_id = 0
    return model


def plain_attention(kind: str) -> str:
    """Of Transformers' implementations, the one that computes what this kind of model needs."""
    return "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"


class SimulatedCache(DynamicCache):
    """16- or 32-bit K and V that went through a format: rotated, encoded, decoded and rotated back. Knows nothing of
    pages.
    """

    def __init__(self, config: Any, format_name: str) -> None:
        super().__init__(config=config)
        self._format = CacheFormat.parse(format_name)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        cache_format = self._format.resolve(key_states.shape[-1])
        codec = CODECS[cache_format.codec]
        k, v = (
            rotate(codec.decode(*codec.encode(rotate(x, order or 0))), order or 0).to(x.dtype)
            for x, order in ((key_states, cache_format.k_rotation_order), (value_states, cache_format.v_rotation_order))
        )
        return super().update(k, v, layer_idx, *args, **kwargs)
