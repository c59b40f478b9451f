"""Reads what a SawCache needs from a model's config."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sawkv.errors import UnsupportedError
from sawkv.prepare.model import kv_sources

NAME = "sawkv"
"""Name of the attention implementation, for `attn_implementation=` and `model.set_attn_implementation()`."""
STATES = ("linear_attention", "conv", "mamba", "moe", "mlp")
"""Types of layers without K and V. Some keep a state of fixed size, which is Transformers' own affair."""
HYBRID = "hybrid"
"""Type of layers with K and V, and such a state beside them."""


def find_model(module: nn.Module) -> PreTrainedModel:
    """The module itself, or the first Transformers model in it.

    Raises:
        UnsupportedError: there is none.
    """
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            return part
    raise UnsupportedError(f"SawCache: expected a model of Transformers or its config, got {type(module).__name__}")


def layer_configs(decoder: PretrainedConfig) -> list[PretrainedConfig]:
    """The config of each layer. They differ only in models that give layers configs of their own (Transformers from
    5.16 on).
    """
    if getattr(decoder, "is_heterogeneous", False):
        return list(decoder.per_layer_config)
    return [decoder] * decoder.num_hidden_layers


def head_dim_of(layer: PretrainedConfig) -> int:
    """Channels per head of K and V, from a layer's config."""
    return int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def layer_types(config: PretrainedConfig) -> list[str]:
    """The type of each decoder layer, as Transformers calls it. Layers that share the K and V of others come last, and
    are left out.
    """
    decoder = config.get_text_config(decoder=True)
    types = getattr(decoder, "layer_types", None)
    if types is None:
        chunked, window = (getattr(decoder, name, None) for name in ("attention_chunk_size", "sliding_window"))
        types = [
            "chunked_attention" if chunked else "sliding_attention" if window else "full_attention"
        ] * decoder.num_hidden_layers
    return ["full_attention" if name == "attention" else name for name in types[: len(set(kv_sources(decoder)))]]


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of each layer of `layer_types`: 0 for full attention, None for a layer without attention.

    Raises:
        UnsupportedError: names everything in this model that a SawCache cannot hold.
    """
    decoder, types = config.get_text_config(decoder=True), layer_types(config)
    window = getattr(decoder, "sliding_window", None) or 0
    held = {"full_attention", "sliding_attention", HYBRID, *STATES}
    reasons = [f"layers of type {name}" for name in sorted(set(types) - held)]
    if not reasons and set(types) <= set(STATES):
        reasons.append("no layer of attention")
    if config.is_encoder_decoder:
        reasons.append("an encoder and cross attention")
    if getattr(decoder, "kv_lora_rank", None):
        reasons.append("multi-head latent attention (kv_lora_rank)")
    if "sliding_attention" in types and not window:
        reasons.append("sliding attention without a sliding_window")
    if reasons:
        raise UnsupportedError(
            "SawCache: expected causal self-attention, alone or beside recurrent states, got a"
            f" {decoder.model_type} with {', '.join(reasons)}. Use DynamicCache(config=model.config) for this model"
        )
    return [None if name in STATES else window if name == "sliding_attention" else 0 for name in types]
