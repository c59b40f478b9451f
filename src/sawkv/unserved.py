"""What attention sawkv does not serve, by the fields of config.json that ask for it. `sawkv plan` and the checks before
an engine starts give the same answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from sawkv.checkpoint import is_encoder

MLA: Final = "MLA (multi-head latent attention)"
ENCODER: Final = "the attention of an encoder"
CROSS: Final = "cross attention (is_encoder_decoder)"
CHUNKS: Final = "attention in chunks (attention_chunk_size)"
DIFFUSION: Final = "attention in both directions among the tokens of a block (diffusion)"
BIDIRECTIONAL: Final = (
    "attention in both directions among the tokens of an image (add --language-model-only to serve text alone)"
)
ALIBI: Final = "ALiBi"
KEEPS_16_BITS: Final = "layers to which vLLM gives no --kv-cache-dtype, so that they keep 16 bits"
WINDOWS: Final = "layers with sliding windows"
RECURRENT: Final = "models with recurrent layers"
UNLIKE: Final = "layers of unlike KV heads or head_dims"
SPECULATION: Final = "speculation"
SPARSE: Final = "layers with a cache of their own (sparse attention)"

_KEEPS_ITS_OWN_CACHE: Final = ("deepseek_v4", "inkling", "minimax_m3", "qwen4_exp")
"""Starts of model types whose layers ask no backend of vLLM (0.33), and write and read pages themselves."""

_SEES_IMAGES_BOTH_WAYS: Final = ("bagel", "gemma3", "molmo2", "moondream3", "paligemma")
"""Model types whose image tokens attend to later ones of their image (vLLM 0.33: `is_mm_prefix_lm`)."""


def unserved(whole: Mapping[str, Any], text: Mapping[str, Any], *, without_images: bool = False) -> list[str]:
    """Why sawkv cannot serve a model, in words; empty if it may.

    Args:
        whole: config.json, with or without the defaults of its class.
        text: its part for the language model.
        without_images: whether the engine is told to serve text alone.
    """
    model_type, both_ways = str(text.get("model_type")), text.get("use_bidirectional_attention")
    latent, found = text.get("kv_lora_rank"), []
    if latent and not computes_k_and_v(text):
        found.append(MLA)
    k_dim, v_dim = text.get("head_dim"), text.get("v_head_dim")
    if k_dim and v_dim and k_dim != v_dim and not latent:
        found.append(unlike_head_dims(k_dim, v_dim))
    if model_type.startswith(_KEEPS_ITS_OWN_CACHE) or str(whole.get("model_type")).startswith(_KEEPS_ITS_OWN_CACHE):
        found.append(SPARSE)
    # MiMo-V2 has the field, and no chunks.
    if text.get("attention_chunk_size") and not model_type.startswith("mimo_v2"):
        found.append(CHUNKS)
    if whole.get("is_encoder_decoder") or text.get("cross_attention_layers"):
        found.append(CROSS)
    elif is_encoder(text) or both_ways is True or both_ways == "all" or whole.get("is_causal") is False:
        found.append(ENCODER)
    if "canvas_length" in whole:
        found.append(DIFFUSION)
    elif not without_images and (
        (whole.get("model_type") in _SEES_IMAGES_BOTH_WAYS and whole.get("vision_config") is not None)
        or (both_ways == "vision" and "text_config" in whole)  # those without a tower read images too
    ):
        found.append(BIDIRECTIONAL)
    inner = text.get("attn_config")
    if True in (text.get("alibi"), isinstance(inner, Mapping) and inner.get("alibi")) or model_type == "bloom":
        found.append(ALIBI)
    elif model_type == "falcon":
        found.append(KEEPS_16_BITS)
    return found


def no_newest_tokens(count: int, kinds: Iterable[tuple[object, str]]) -> list[str]:
    """Why a format's newest tokens cannot be kept, and what to do.

    Args:
        count: of them.
        kinds: whether each is asked for, and its name.
    """
    found = [kind for asked, kind in kinds if asked]
    what = f"the newest tokens in 16 bits (-r{count}): {', '.join(found)} (take the format without -r{count})"
    return [what] if found else []


def computes_k_and_v(text: Mapping[str, Any]) -> bool:
    """Whether vLLM computes the K and V of each head from a latent, and stores these as it does for other models."""
    return text.get("model_type") == "minicpm3" or os.environ.get("VLLM_MLA_DISABLE", "0") not in ("", "0")


def unlike_head_dims(k_dim: int, v_dim: int) -> str:
    """The reason of a model whose K and V differ in size."""
    return f"head_dim {v_dim} of V apart from {k_dim} of K"
