"""vLLM's MLA backends for the CPU, as they are but for one refusal.

vLLM's CPU platform selects them for MLA models whatever `--kv-cache-dtype` says; they would read an INT4 cache as 16-bit latents.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.mla.amx_mla import AMXMLABackend
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from sawkv.errors import UnsupportedError
from sawkv.integrations.vllm.config import SawConfig


def _refuse_our_cache() -> None:
    vllm_config = get_current_vllm_config()
    if SawConfig.from_vllm(vllm_config, vllm_config.cache_config.cache_dtype) is not None:
        raise UnsupportedError(
            "sawkv cannot serve this configuration: MLA (multi-head latent attention). To serve it in 16 bits, drop --kv-cache-dtype."
        )


class CPU_MLA(CPUMLABackend):
    """Registered under `CPU_MLA`."""

    @staticmethod
    def get_impl_cls() -> Any:
        _refuse_our_cache()
        return CPUMLABackend.get_impl_cls()


class AMX_MLA(AMXMLABackend):
    """Registered under `AMX_MLA`."""

    @staticmethod
    def get_impl_cls() -> Any:
        _refuse_our_cache()
        return AMXMLABackend.get_impl_cls()
