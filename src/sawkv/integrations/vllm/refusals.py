"""What sawkv does not serve, named by the options that ask for it, or by vLLM's own description. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sawkv.errors import UnsupportedError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm import connectors
from sawkv.integrations.vllm.config import dtype_codec, is_draft
from sawkv.integrations.vllm.contract import PADS_PAGES, SIZES_PAGES, installed_release
from sawkv.unserved import BIDIRECTIONAL, CHUNKS, DIFFUSION, ENCODER, MLA

WAY_OUT: Final = "To serve it in 16 bits, start `vllm serve` without --kv-cache-dtype and --attention-backend."

_SUBCLASSES: Final = {
    "FastPrefill": "--kv-sharing-fast-prefill",
    "ChunkedLocal": CHUNKS,
    "EncoderOnly": ENCODER,
    "CrossAttention": "cross attention",
    "StaticSink": "attention sinks in the cache",
}
"""What vLLM subclasses a backend's classes for, by the start of the subclass's name."""


def refuse(vllm_config: Any, reasons: Sequence[str]) -> None:
    """Raise one error with all reasons, and say how to serve the model without sawkv.

    Raises:
        UnsupportedError: there is a reason.
    """
    if not reasons:
        return
    if is_draft(vllm_config):
        what, way_out = (
            "the draft model",
            'To give it a cache in 16 bits, add "kv_cache_dtype": "auto" to --speculative-config.',
        )
    else:
        what, way_out = "this configuration", WAY_OUT
    raise UnsupportedError(f"sawkv cannot serve {what}: {'; '.join(reasons)}. {way_out}")


def refuse_kind(vllm_config: Any, layer: Any) -> None:
    """Refuse layers that vLLM would refuse without naming sawkv, or that its CPU backend would not refuse at all.

    Args:
        vllm_config: the current configuration.
        layer: vLLM's `AttentionSelectorConfig`.

    Raises:
        UnsupportedError: sawkv has no backend for this kind of layer.
    """
    kinds = (
        (layer.use_mla, MLA),
        (layer.use_mm_prefix, BIDIRECTIONAL),
        (getattr(layer, "use_non_causal", False), "attention that is not causal"),
        (getattr(layer, "use_rswa", False), "windows over the answer alone (rswa_window)"),
    )
    found = [reason for asked, reason in kinds if asked]
    refuse(vllm_config, [*found, *of_configuration(vllm_config)] if found else [])


def of_format(cache_format: CacheFormat) -> list[str]:
    """Why a format cannot be served here, whatever the model is."""
    needs = (
        (cache_format.recent, PADS_PAGES, "pads pages to one size"),
        (dtype_codec(cache_format) != cache_format.codec, SIZES_PAGES, "asks for the size of its pages"),
    )
    release = installed_release()
    for needed, since, what in needs:
        if needed and release < since:
            wanted, got = (".".join(map(str, numbers)) for numbers in (since, release))
            return [f"format {cache_format}: expected vLLM {wanted} or newer, which {what}, got {got or 'none'}"]
    return []


def of_configuration(vllm_config: Any) -> list[str]:
    """Features of the configuration that sawkv lacks, apart from the kinds of layers."""
    parallel, found = vllm_config.parallel_config, []
    if getattr(vllm_config.model_config, "attention_chunk_size", None) is not None:
        found.append(CHUNKS)
    if getattr(vllm_config, "diffusion_config", None) is not None:
        found.append(DIFFUSION)
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            found.append(f"--{name.replace('_', '-')} {getattr(parallel, name)}")
    if (transfer := vllm_config.kv_transfer_config) is not None:
        offloads = getattr(vllm_config.cache_config, "kv_offloading_size", None) is not None
        engine = connectors.Engine(
            on_gpu=vllm_config.device_config.device_type != "cpu",
            lora=vllm_config.lora_config is not None,
            hybrid=vllm_config.model_config.is_hybrid,
            speculates=vllm_config.speculative_config is not None,
        )
        option = "--kv-offloading-size" if offloads else "--kv-transfer-config"
        module = getattr(transfer, "kv_connector_module_path", None)
        extra = transfer.kv_connector_extra_config or {}
        found += connectors.refused(transfer.kv_connector, extra, engine, option, module)
    return found


def refuse_subclass(cls: type, ours: type) -> None:
    """Refuse vLLM's subclasses of our classes, which it makes for layers with another attention.

    Raises:
        UnsupportedError: `cls` is not `ours`.
    """
    if cls is not ours:
        what = next(
            (words for start, words in _SUBCLASSES.items() if cls.__name__.startswith(start)),
            "attention of another kind",
        )
        raise UnsupportedError(f"sawkv: expected plain causal attention, got {what} (vLLM's {cls.__name__}). {WAY_OUT}")
