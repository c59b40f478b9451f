"""sawkv's lines in vLLM's log when an engine starts: format and kernels, number of layers, and what
costs capacity.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.logger import init_logger

from sawkv.errors import UnsupportedError
from sawkv.format.constants import BUCKET_SIZE
from sawkv.format.layout import ENGINE_PAGE_SIZE, PAGE_SIZE_MULTIPLE, PageLayout
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm import PLUGIN
from sawkv.integrations.vllm.config import KV_CACHE_DTYPE_CODECS
from sawkv.integrations.vllm.refusals import WAY_OUT
from sawkv.kernels import NO_FAST_KERNELS, select_backend
from sawkv.prepare.calibration import Calibration
from sawkv.prepare.turning import buckets_in
from sawkv.unserved import unlike_head_dims

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig

LARGE_BLOCK: Final = 128
"""Tokens of the largest block that an engine chooses for a model with attention alone."""

logger = init_logger(f"vllm.{__name__}")  # under vLLM's name, so that its log settings apply


def say_format(
    cache_format: CacheFormat, recent: int, head_dim: int, num_kv_heads: int, device: torch.device, calibration: str
) -> None:
    """Log the format and the kernels, which shows that sawkv is in use. Builds the kernels, so that no request waits
    for them.

    Args:
        cache_format: of the layer's pages.
        recent: the newest tokens that it keeps beside them.
        head_dim, num_kv_heads: of the layer, on this rank.
        device: of the pages.
        calibration: fingerprint of the calibration file, or "".
    """
    layout = PageLayout(cache_format, num_kv_heads, head_dim, PAGE_SIZE_MULTIPLE)
    backend = select_backend(device, layout)
    logger.info(
        "sawkv: KV cache format %s, %d bytes per token, KV head and layer (16 bits: %d), %s kernels%s",
        replace(cache_format, recent=recent),
        layout.head_bytes,
        4 * head_dim,
        backend.name,
        f", calibrated by {calibration}" if calibration else "",
    )
    if backend.name == "reference":
        logger.warning(NO_FAST_KERNELS)


def warn_unprepared() -> None:
    """Warn of the cost of serving a model unprepared, as the user asked."""
    logger.warning(
        "sawkv: the model is served unprepared. Where keys have a large static part, as in Qwen2.5, perplexity can rise"
        " manyfold; `sawkv eval` measures it. The model is prepared unless --no-prepare is given, or"
        ' "prepare": false in the sawkv entry of --additional-config.'
    )


def warn_short(calibration: Calibration, context: int) -> None:
    """Warn if a calibration from a file has centers of K for less than `context` positions."""
    if 1 < calibration.num_buckets < buckets_in(context):
        logger.warning_once(
            "sawkv: the calibration has centers of K for %d positions, and --max-model-len is %d. Later positions take"
            " the last center, and lose accuracy. `sawkv prepare` makes one for the whole context.",
            calibration.num_buckets * BUCKET_SIZE,
            context,
        )


def say_pages(spec: AttentionSpec, layout: PageLayout, reused_block: int) -> None:
    """Warn if vLLM's treatment of a group's pages costs capacity or prefix-cache hits.

    Args:
        spec: vLLM's spec of the group.
        layout: of the group's pages.
        reused_block: tokens of the prefix cache's block, which vLLM may cut into several pages; 0 if the cache is off.
    """
    needed, taken = layout.rows.num_kv_heads * layout.span_bytes, int(spec.page_size_bytes)
    wide = 4 * layout.head_dim * layout.num_kv_heads * layout.page_size
    if taken > needed:
        logger.warning_once(  # groups are often alike
            "sawkv: vLLM pads our pages from %d to %d bytes, as other layers' pages have, so they hold %.2f times the"
            " tokens of a 16-bit cache and not %.2f times",
            needed,
            taken,
            wide / taken,
            wide / needed,
        )
    if reused_block > LARGE_BLOCK:
        logger.info_once(
            "sawkv: blocks have %d tokens, so the prefix cache finds multiples of %d tokens, and shorter prompts never",
            reused_block,
            reused_block,
        )


def say_states(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Log how many tokens a hybrid whose recurrent states have 32 bits would hold with states of 16 bits."""
    from vllm.v1.kv_cache_interface import MambaSpec

    specs: list[Any] = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    narrow = [_narrow(spec, vllm_config.model_config.dtype) for spec in specs if isinstance(spec, MambaSpec)]
    attention = next((spec for spec in specs if not isinstance(spec, MambaSpec)), None)
    if attention is None or all(spec in specs for spec in narrow):
        return
    # vLLM lengthens blocks of attention until they are as large as a state.
    unit = attention.unpadded_page_size_bytes // attention.block_size * ENGINE_PAGE_SIZE
    block_size = ENGINE_PAGE_SIZE * max(-(-spec.page_size_bytes // unit) for spec in narrow)
    narrow += [
        replace(spec, block_size=block_size, page_size_padded=None) for spec in specs if not isinstance(spec, MambaSpec)
    ]
    num_blocks = kv_cache_config.num_blocks * attention.page_size_bytes // narrow[-1].page_size_bytes
    tokens, more = (
        int(count / sum(spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes for spec in kinds) * context)
        for context in (vllm_config.model_config.max_model_len,)
        for count, kinds in ((kv_cache_config.num_blocks, specs), (num_blocks, narrow))
    )
    logger.info(
        "sawkv: recurrent states have 32 bits. The cache holds %s tokens; with states of 16 bits"
        " (--mamba-ssm-cache-dtype bfloat16) it would hold some %s. What that does to accuracy was not measured",
        f"{tokens:,}",
        f"{more:,}",
    )


def _narrow(spec: Any, dtype: Any) -> Any:
    """A spec of recurrent states, with `dtype` in place of 32 bits."""
    if torch.float32 not in spec.dtypes or dtype == torch.float32:
        return spec
    dtypes = tuple(dtype if each == torch.float32 else each for each in spec.dtypes)
    return replace(spec, dtypes=dtypes, page_size_padded=None)


def say_kernels(layout: PageLayout, device: torch.device) -> None:
    """Log the kernels that read the group's pages, if they differ from those that `say_format` named before the page
    size was known.
    """
    named, real = (
        select_backend(device, each).name for each in (replace(layout, page_size=PAGE_SIZE_MULTIPLE), layout)
    )
    if real != named:
        logger.warning_once(
            "sawkv: pages have %d tokens, which %s kernels read, and not %s kernels", layout.page_size, real, named
        )


def say_layers(worker: Any) -> None:
    """Log how many layers of a worker are ours, if not all are. Called in each worker when its model is loaded, before
    anything runs.

    Raises:
        UnsupportedError: a layer is not served as it should be (`_refuse_taken`, `_refuse_unlike_readers`).
    """
    from sawkv.integrations.vllm.backend import SawAttentionImpl

    _refuse_taken(worker)
    config = worker.vllm_config
    layers, skipped = config.compilation_config.static_forward_context, config.cache_config.kv_cache_dtype_skip_layers
    attending = {
        name: layer for name, layer in layers.items() if hasattr(layer, "kv_cache_dtype") and hasattr(layer, "impl")
    }
    _refuse_unlike_readers(attending)
    others = [
        f"{name} ({layer.kv_cache_dtype})"
        for name, layer in attending.items()
        if not isinstance(layer.impl, SawAttentionImpl)
    ]
    is_whole = config.parallel_config.pipeline_parallel_size == 1  # a stage does not know the layers of others
    if not attending and is_whole:
        logger.warning("sawkv: serves nothing: this model has no layer of attention")
    if others:
        ours = len(attending) - len(others)
        logger.log(
            logging.INFO if ours else logging.WARNING,
            "sawkv: serves %s of %d attention layers; vLLM's own cache is kept for %s%s",
            ours or "none",
            len(attending),
            ", ".join(others[:4]),
            f" and {len(others) - 4} more" if len(others) > 4 else "",
        )
    known = {part for name in attending for part in name.split(".") if part.isdigit()} | {"sliding_window"}
    if unknown := [name for name in skipped if name not in known and (is_whole or not name.isdigit())]:
        logger.warning(
            "sawkv: vLLM ignores what it does not know in --kv-cache-dtype-skip-layers: %s", ", ".join(unknown)
        )


def _refuse_taken(worker: Any) -> None:
    """Refuse layers of our dtypes that are not ours, though they should be.

    Raises:
        UnsupportedError: a layer asks no backend and keeps its pages itself, its model chooses the backend, or another
            plugin has given it vLLM's own attention.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from sawkv.integrations.vllm.backend import SawAttentionImpl

    config, on_cpu = worker.vllm_config, worker.device.type == "cpu"
    if not on_cpu and config.attention_config.backend != AttentionBackendEnum.CUSTOM:
        return
    taken = [
        (isinstance(layer, Attention), f"{name} has {type(getattr(layer, 'impl', layer)).__name__}{_unlike(layer)}")
        for name, layer in config.compilation_config.static_forward_context.items()
        if getattr(layer, "kv_cache_dtype", None) in KV_CACHE_DTYPE_CODECS
        and not isinstance(getattr(layer, "impl", None), SawAttentionImpl)
    ]
    other_plugin = f"Set VLLM_PLUGINS={PLUGIN} to load no other plugin"
    for asks, way_out in ((False, WAY_OUT), (True, other_plugin if on_cpu else WAY_OUT)):
        found = [what for asked, what in taken if asked == asks]
        # On a GPU a draft may have vLLM's own INT4.
        if found and (on_cpu or not asks or config.speculative_config is None):
            raise UnsupportedError(
                f"sawkv: expected its own attention in all layers of its dtypes, got {len(found)} without:"
                f" {found[0]}. {way_out}"
            )


def _refuse_unlike_readers(attending: Mapping[str, Any]) -> None:
    """Refuse layers that would read pages of another layer which are not as their own would be.

    Args:
        attending: layers with a cache, by vLLM's name.

    Raises:
        UnsupportedError: there is one.
    """
    from sawkv.integrations.vllm.backend import SawAttentionImpl

    for name, layer in attending.items():
        read = attending.get(getattr(layer, "kv_sharing_target_layer_name", None) or "")
        if read is None:
            continue
        # vLLM tells a draft whose pages it reads when its implementation is made, which then has no calibration.
        knows = getattr(layer.impl, "kv_sharing_target_layer_name", None) is not None
        both = [isinstance(each.impl, SawAttentionImpl) for each in (layer, read)]
        if any(both) and not (knows and all(both)):
            raise UnsupportedError(
                f"sawkv: expected a layer that reads another's pages to have the same cache, got {name}"
                f" ({layer.kv_cache_dtype}) with those of {layer.kv_sharing_target_layer_name} ({read.kv_cache_dtype})."
                " Name both in --kv-cache-dtype-skip-layers, or neither. A draft that reads the model's pages (Gemma"
                " 4's MTP) is not served"
            )


def _unlike(layer: Any) -> str:
    """That K and V of a layer differ in size, for which models choose a backend themselves."""
    k_dim, v_dim = (getattr(layer, name, None) for name in ("head_size", "head_size_v"))
    return f" ({unlike_head_dims(k_dim, v_dim)})" if k_dim and v_dim and k_dim != v_dim else ""
