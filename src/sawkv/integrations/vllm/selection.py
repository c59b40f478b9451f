"""Chooses the attention backend of each layer, in place of the function of vLLM that does (`install`).

vLLM's registry of backends knows names, and not layers. On a CPU vLLM takes `CPU_ATTN` for all layers, so another
plugin that registers this name last would get our layers too. On CUDA `--attention-backend CUSTOM` applies to all
layers, also to those that vLLM leaves in 16 bits. So this module decides per layer: our layers get our backend, and all
others get what vLLM gives them without sawkv.
"""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from sawkv.errors import UnsupportedError
from sawkv.integrations.vllm import PLUGIN
from sawkv.integrations.vllm.config import KV_CACHE_DTYPE_CODECS, OWN_DTYPE_CODECS, SawConfig, has_entry, is_draft
from sawkv.integrations.vllm.refusals import refuse, refuse_kind

BACKEND = "sawkv.integrations.vllm.backend.SawAttentionBackend"
REPLACED = "_cached_get_attn_backend"
"""Function of `vllm.v1.attention.selector` that takes the chosen backend and the description of a layer, and returns a
class.
"""

logger = init_logger(f"vllm.{__name__}")


class Selection:
    """Replaces `_cached_get_attn_backend`.

    Args:
        ask_vllm: the replaced function.
    """

    def __init__(self, ask_vllm: Any) -> None:
        self._ask_vllm = ask_vllm
        self.cache_clear = ask_vllm.cache_clear

    def __call__(self, backend: Any, attn_selector_config: Any, **others: Any) -> Any:
        """The class of a layer's backend.

        Args:
            backend: `--attention-backend`, or None.
            attn_selector_config: vLLM's description of the layer.
            others: passed on to vLLM.

        Raises:
            SawkvError: the layer should use sawkv and cannot.
        """
        vllm_config, layer = get_current_vllm_config(), attn_selector_config
        config = SawConfig.from_vllm(vllm_config, layer.kv_cache_dtype)
        if config is None:
            of_engine = vllm_config.cache_config.cache_dtype
            if backend == AttentionBackendEnum.CUSTOM and (is_draft(vllm_config) or layer.kv_cache_dtype != of_engine):
                backend = None  # the layer's dtype is not what the user chose with this backend: vLLM is to choose both
            vllms = self._ask_vllm(backend=backend, attn_selector_config=layer, **others)
            if not _beside_ours(vllm_config):
                return vllms
            logger.info_once("sawkv: some layers keep vLLM's own cache (%s)", layer.kv_cache_dtype)
            return _by_its_own_dtype(vllms, layer.kv_cache_dtype) if current_platform.is_cpu() else vllms
        if not current_platform.is_cpu() and backend != AttentionBackendEnum.CUSTOM:
            _leave_to_vllm(vllm_config, layer.kv_cache_dtype)
            return self._ask_vllm(backend=backend, attn_selector_config=layer, **others)
        if vllm_config.model_config.multimodal_config is None:  # vLLM takes Gemma 4 without its tower for one that sees
            layer = layer._replace(use_mm_prefix=False)
        refuse_kind(vllm_config, layer)
        from sawkv.integrations.vllm.backend import SawAttentionBackend, backend_of

        if current_platform.is_cpu():
            return backend_of(config.format)
        if (path := AttentionBackendEnum.CUSTOM.get_path()) != BACKEND:
            raise UnsupportedError(
                f"sawkv: expected its own backend under --attention-backend CUSTOM, got {path}, which another plugin of"
                f" vLLM registered. Set VLLM_PLUGINS={PLUGIN} to load no other plugin"
            )
        found = self._ask_vllm(backend=backend, attn_selector_config=layer, **others)
        return backend_of(config.format) if found is SawAttentionBackend else found


def install() -> None:
    """Register the backend, and install `Selection`, once.

    Raises:
        UnsupportedError: this vLLM lacks the function.
    """
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    replaced = getattr(selector, REPLACED, None)
    if isinstance(replaced, Selection):
        return
    if not hasattr(replaced, "cache_clear"):
        raise UnsupportedError(f"sawkv does not fit this vLLM: it needs vllm.v1.attention.selector.{REPLACED}")
    setattr(selector, REPLACED, Selection(replaced))


def _beside_ours(vllm_config: Any) -> bool:
    """Whether the engine's dtype, or that of an earlier layer (such as a draft's target), is one of ours."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    dtypes = [vllm_config.cache_config.cache_dtype, *(getattr(layer, "kv_cache_dtype", None) for layer in layers)]
    return any(dtype in KV_CACHE_DTYPE_CODECS for dtype in dtypes)


@cache  # vLLM groups layers by their backend's class
def _by_its_own_dtype(backend: Any, kv_cache_dtype: str) -> Any:
    """vLLM's CPU backend for layers in an engine that also has ours. Its metadata builder reads the engine's dtype, and
    would treat an unknown one as FP8.
    """
    builder: Any = backend.get_builder_cls()

    class Builder(builder):  # type: ignore[misc]
        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
            vllm_config = copy(vllm_config)
            vllm_config.cache_config = copy(vllm_config.cache_config)
            vllm_config.cache_config.cache_dtype = kv_cache_dtype
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    return type(backend.__name__, (backend,), {"get_builder_cls": staticmethod(lambda: Builder)})


def _leave_to_vllm(vllm_config: Any, kv_cache_dtype: str) -> None:
    """Use vLLM's own INT4 and INT8 caches on a GPU if sawkv was not asked for.

    Raises:
        UnsupportedError: sawkv was asked for.
    """
    if kv_cache_dtype in OWN_DTYPE_CODECS:
        missing = (
            'without "attention_backend": "CUSTOM" in --speculative-config'
            if is_draft(vllm_config)
            else "without --attention-backend CUSTOM"
        )
        refuse(vllm_config, [f"--kv-cache-dtype {kv_cache_dtype} {missing} (add it)"])
    elif is_draft(vllm_config):
        logger.warning_once(
            'sawkv: the draft model gets vLLM\'s own %s. Add "attention_backend": "CUSTOM" to --speculative-config for'
            " sawkv's",
            kv_cache_dtype,
        )
    elif has_entry(vllm_config):
        refuse(vllm_config, ["a sawkv entry in --additional-config without --attention-backend CUSTOM (add it)"])
    else:
        logger.warning_once("sawkv: vLLM's own %s is used. Add --attention-backend CUSTOM for sawkv's", kv_cache_dtype)
