"""Reads a model's memory shape from its config.json by Transformers' own classes, and refuses what serving would
refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sawkv.checkpoint import text_config
from sawkv.errors import UnsupportedError
from sawkv.unserved import ENCODER, unlike_head_dims, unserved

OLDEST_TRANSFORMERS: Final = "5.19"
"""Oldest version that `sawkv plan` was tested with."""

ATTENTION: Final = {"full_attention", "sliding_attention", "hybrid"}
RECURRENT: Final = {"linear_attention", "conv", "hybrid"}
SERVED_LAYERS: Final = ATTENTION | RECURRENT | {"moe", "mlp"}
_OLD_NAMES: Final = {"attention": "full_attention", "mamba": "linear_attention"}

_KV_HEADS: Final = ("n_head_kv", "num_kv_heads", "num_key_value_heads")
_EXPERTS: Final = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_ACTIVE_EXPERTS: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
_CONTEXTS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")

_GENERATING: Final = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
"""Transformers' lists of model types that generate text."""

_HYBRIDS: Final = (
    "falcon_h1",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5",
    "qwen3_next",
    "zamba2",
)
"""Starts of the model types with recurrent states that vLLM (0.32, 0.33) has a file of. It serves no others."""

STATE_DTYPES: Final = {"auto": 2, "float32": 4, "float16": 2, "bfloat16": 2}
"""vLLM's names of dtypes of states, and their bytes. "auto" is the model's, which has 16 bits."""
_STATE_DTYPE_KEYS: Final = {"qwen3_5": "mamba_ssm_dtype", "nemotron_h": "mamba_ssm_cache_dtype"}
"""Where vLLM finds the dtype of recurrent states without an option. In other models it is that of the convolution."""


@dataclass(frozen=True)
class Attention:
    """A layer that stores keys and values. `window` is in tokens, 0 for full attention. `drafts`: it is of a draft."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    drafts: bool = False


@dataclass(frozen=True)
class State:
    """A layer that keeps a state per request: of a short convolution and, if `heads`, of a recurrence after it.

    Attributes:
        conv_tokens, conv_bytes: tokens in the convolution's state, and its storage.
        channels, groups, group_channels: it has `channels` plus `groups` times `group_channels` channels.
        heads, head_values, value_bytes: the recurrent state, and its storage.
        held: states that a request holds under prefix caching: the current one, the last shareable one, and between
            them one more if vLLM does not cut prompts for it (Mamba 2).
    """

    conv_tokens: int
    channels: int
    groups: int = 0
    group_channels: int = 0
    heads: int = 0
    head_values: int = 0
    conv_bytes: int = 2
    value_bytes: int = 2
    held: int = 2

    def nbytes(self, ranks: int) -> int:
        """Bytes on each of `ranks` GPUs. Groups that ranks do not divide are replicated, as in vLLM."""
        groups = self.groups if self.groups % ranks == 0 else ranks
        conv = self.conv_tokens * (self.channels + groups * self.group_channels) // ranks
        return self.conv_bytes * conv + self.heads // ranks * self.head_values * self.value_bytes


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on, apart from the weights.

    Attributes:
        config: of the whole model, a Transformers `PretrainedConfig`.
        attention, states: layers that store something; a layer may have both.
        attention_places, state_places: their numbers among all layers of the model.
        num_layers: of the model.
        intermediate_size: of dense MLPs, 0 if all layers have experts.
        experts_per_token, expert_size: 0 in a dense model.
        mixer_size: widest projection before a recurrent state.
        ties: whether the output layer is the embedding.
        max_context: longest request of the model in tokens; None if its config does not say.
        sees: whether parts of the model read images, audio or video.
        draft_bytes: of the weights those of a draft, all of which are in the last stage of a pipeline.
    """

    config: Any
    hidden_size: int
    vocab_size: int
    attention: tuple[Attention, ...]
    attention_places: tuple[int, ...]
    states: tuple[State, ...]
    state_places: tuple[int, ...]
    num_layers: int
    intermediate_size: int
    experts_per_token: int
    expert_size: int
    mixer_size: int
    ties: bool
    max_context: int | None
    sees: bool
    draft_bytes: int = 0

    @property
    def table_bytes(self) -> int:
        """Of the embedding, and of an output layer, in 16 bits."""
        return 2 * self.vocab_size * self.hidden_size


def read_shape(
    config: Mapping[str, Any], language_model_only: bool = False, conv_dtype: str = "auto", ssm_dtype: str = "auto"
) -> ModelShape:
    """The shape in a Hugging Face config.json, with the defaults of its class in Transformers.

    Args:
        config: the object in config.json.
        language_model_only: vLLM's `--language-model-only`: serve no images.
        conv_dtype: vLLM's `--mamba-cache-dtype`, one of `STATE_DTYPES`.
        ssm_dtype: vLLM's `--mamba-ssm-cache-dtype`, alike.

    Raises:
        UnsupportedError: sawkv does not serve such a model, or Transformers does not know its type.
    """
    _refuse(unserved(config, text_config(config), without_images=language_model_only))
    whole = _make_config(config)
    try:
        decoder = whole.get_text_config(decoder=True)
        _refuse(unserved(whole.to_dict(), decoder.to_dict(), without_images=language_model_only))  # with defaults
        return _shape(whole, decoder, language_model_only, conv_dtype, ssm_dtype)
    except (AttributeError, TypeError, ArithmeticError) as error:  # a field is missing, or makes no sense
        wanted = f"expected the sizes of a decoder in config.json of a {whole.model_type}"
        raise UnsupportedError(f"plan: {wanted}, got: {_one_line(error)}") from error


def _shape(whole: Any, decoder: Any, language_model_only: bool, conv_dtype: str, ssm_dtype: str) -> ModelShape:
    kinds = _layer_kinds(decoder)
    layers = list(zip(kinds, decoder.per_layer_config, strict=False))
    stored = layers[: len(layers) - (getattr(decoder, "num_kv_shared_layers", 0) or 0)]
    attention = {i: _attention(layer, kind) for i, (kind, layer) in enumerate(stored) if kind in ATTENTION}
    if not attention:
        raise _refusal("no layer with attention: there is no KV cache")
    states = {
        i: _state(layer, kind, conv_dtype, ssm_dtype) for i, (kind, layer) in enumerate(layers) if kind in RECURRENT
    }
    experts = _size(decoder, *_EXPERTS)
    intermediate = (
        _size(decoder, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") or 4 * decoder.hidden_size
    )
    dense = not experts or _size(decoder, "first_k_dense_replace") or getattr(decoder, "mlp_only_layers", None)
    return ModelShape(
        config=whole,
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        attention=tuple(attention.values()),
        attention_places=tuple(attention),
        states=tuple(states.values()),
        state_places=tuple(states),
        num_layers=len(layers),
        intermediate_size=intermediate if dense else 0,
        experts_per_token=_size(decoder, *_ACTIVE_EXPERTS) if experts else 0,
        expert_size=(_size(decoder, "moe_intermediate_size") or intermediate) if experts else 0,
        mixer_size=2 * max((state.channels + state.heads for state in states.values()), default=0),
        ties=bool(getattr(whole, "tie_word_embeddings", False) or getattr(decoder, "tie_word_embeddings", False)),
        max_context=_max_context(decoder),
        sees=decoder is not whole and not language_model_only,
    )


def _make_config(config: Mapping[str, Any]) -> Any:
    """The config as an object of Transformers' class for its model type."""
    try:
        import transformers
        from transformers import CONFIG_MAPPING
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise UnsupportedError("plan: expected Transformers, got none: pip install 'sawkv[transformers]'") from error
    if not hasattr(transformers.PreTrainedConfig, "per_layer_config"):  # older ones hide that layers differ
        raise UnsupportedError(
            f"plan: expected Transformers {OLDEST_TRANSFORMERS} or newer, got {transformers.__version__}"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        wanted = f"expected a model_type that Transformers {transformers.__version__} knows"
        raise UnsupportedError(f"plan: {wanted}, got {kind!r} (no code of a checkpoint is run)")
    # Before the config is made: that of a model that only sees may ask the hub for its parts.
    if not any(kind in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", ()) for name in _GENERATING):
        raise _refusal(ENCODER)
    weights_and_code = ("quantization_config", "compression_config", "auto_map")
    try:
        return CONFIG_MAPPING[kind].from_dict(
            {name: value for name, value in config.items() if name not in weights_and_code}
        )
    except Exception as error:  # each class checks its fields in its own way
        wanted = f"expected a config.json that Transformers' {kind} class reads"
        raise UnsupportedError(f"plan: {wanted}, got: {_one_line(error)}") from error


def _layer_kinds(config: Any) -> list[str]:
    """Type of each decoder layer in Transformers' words; if the config has no list, from other fields, as Transformers
    does.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
        kind = "sliding_attention" if window else "chunked_attention" if chunk else "full_attention"
        kinds = [kind] * config.num_hidden_layers
    kinds = [_OLD_NAMES.get(kind, kind) for kind in kinds]
    others = sorted(set(kinds) - SERVED_LAYERS)
    if others:
        raise _refusal(f"layers of {', '.join(others)}")
    return kinds


def _attention(config: Any, kind: str) -> Attention:
    q_heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # K and V of each head are computed from a latent, V padded to K
        return Attention(q_heads, q_heads, config.qk_nope_head_dim + config.qk_rope_head_dim)
    head_dim = _size(config, "head_dim", "attention_head_dim") or config.hidden_size // q_heads
    v_head_dim = getattr(config, "v_head_dim", None) or head_dim
    if v_head_dim != head_dim:
        raise _refusal(unlike_head_dims(head_dim, v_head_dim))
    kv_heads = _size(config, *_KV_HEADS) or q_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1
    if min(q_heads, kv_heads, head_dim) < 1:
        raise TypeError(f"{q_heads} query heads, {kv_heads} KV heads, head_dim {head_dim}")
    window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else 0
    return Attention(q_heads, kv_heads, head_dim, window or 0)


def _state(config: Any, kind: str, conv_dtype: str, ssm_dtype: str) -> State:
    """The state of one layer, in the shapes that vLLM gives it (model_executor/layers/mamba/mamba_utils.py)."""
    if not config.model_type.startswith(_HYBRIDS):
        raise _refusal(f"layers of {kind} of {config.model_type}")
    conv_bytes = STATE_DTYPES[conv_dtype]
    if kind == "conv":
        return State(config.conv_L_cache - 1, _size(config, "conv_dim") or config.hidden_size, conv_bytes=conv_bytes)
    if ssm_dtype == "auto":
        dtype_key = next((key for model, key in _STATE_DTYPE_KEYS.items() if config.model_type.startswith(model)), "")
        named = getattr(config, dtype_key, None) or ("float32" if config.model_type == "nemotron_h" else conv_dtype)
        ssm_dtype = str(named).removeprefix("torch.")
    value_bytes = STATE_DTYPES.get(ssm_dtype, 2)
    if getattr(config, "linear_num_value_heads", None):  # gated delta net
        k_heads, v_heads = config.linear_num_key_heads, config.linear_num_value_heads
        k_dim, v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        conv_tokens, channels = config.linear_conv_kernel_dim - 1, 2 * k_heads * k_dim + v_heads * v_dim
        sizes = {"heads": v_heads, "head_values": k_dim * v_dim, "conv_bytes": conv_bytes, "value_bytes": value_bytes}
        return State(conv_tokens, channels, **sizes)
    conv_tokens = _size(config, "conv_kernel", "mamba_d_conv") - 1
    size = _size(config, "ssm_state_size", "mamba_d_state")
    heads = _size(config, "mamba_num_heads", "mamba_n_heads", "n_mamba_heads")
    if heads:  # Mamba 2
        head_dim = _size(config, "mamba_head_dim", "mamba_d_head", "mamba_headdim")
        groups = _size(config, "n_groups", "mamba_n_groups", "mamba_ngroups")
        sizes = {"heads": heads, "head_values": head_dim * size, "conv_bytes": conv_bytes, "value_bytes": value_bytes}
        return State(conv_tokens, heads * head_dim, groups, 2 * size, held=3, **sizes)
    channels = config.mamba_expand * config.hidden_size  # Mamba 1
    sizes = {"heads": channels, "head_values": size, "conv_bytes": conv_bytes, "value_bytes": value_bytes}
    return State(conv_tokens, channels, **sizes)


def _max_context(config: Any) -> int | None:
    """Derived as vLLM derives `--max-model-len` (config/model.py: `_get_and_verify_max_len`)."""
    lengths = [length for key in _CONTEXTS if isinstance(length := getattr(config, key, None), int) and length > 0]
    rope = getattr(config, "rope_parameters", None) or {}
    factors = [
        parameters.get("factor") or 1
        for parameters in (rope, *rope.values())
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("linear", "dynamic")
    ]
    if not lengths:
        return None
    return int(min(lengths) * (factors[-1] if factors and "gemma3" not in config.model_type else 1))


def _size(config: Any, *names: str) -> int:
    """The first of these fields with a value, else 0. Of a list with one value per layer, the largest."""
    found = (getattr(config, name, None) for name in names)
    size = next((value for value in found if value), 0)
    largest: int = max(size) if isinstance(size, (list, tuple)) else size
    return largest


def _refuse(reasons: Sequence[str]) -> None:
    if reasons:
        raise _refusal("; ".join(reasons))


def _refusal(reason: str) -> UnsupportedError:
    return UnsupportedError(f"sawkv cannot serve this model: {reason}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
