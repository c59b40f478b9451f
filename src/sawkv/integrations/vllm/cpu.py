"""vLLM's CPU backend, with our layers among its own.

vLLM's CPU platform selects `CPU_ATTN` whatever the command line says, so the class registered under that name must serve both kinds of
layers. vLLM instantiates what `get_impl_cls` and `get_builder_cls` return, or its own subclasses of these (for encoders, cross attention,
attention in chunks): `__new__` of the two classes below makes ours where the cache is ours, and otherwise leaves all as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from sawkv.integrations.vllm.backend import SawAttentionBackend, SawAttentionImpl, SawMetadataBuilder, refuse_subclass
from sawkv.integrations.vllm.config import KV_CACHE_DTYPE_CODECS, SawConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec


class DispatchingImpl(CPUAttentionBackendImpl):
    """Makes a `SawAttentionImpl` where the cache is ours."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        kv_cache_dtype = kwargs["kv_cache_dtype"] if "kv_cache_dtype" in kwargs else args[6]
        if SawConfig.from_vllm(get_current_vllm_config(), kv_cache_dtype) is None:
            return super().__new__(cls)  # type: ignore[no-untyped-call]
        refuse_subclass(cls, DispatchingImpl)
        return SawAttentionImpl(*args, **kwargs)


class DispatchingBuilder(CPUAttentionMetadataBuilder):
    """Makes a `SawMetadataBuilder` where the group's layers are ours."""

    def __new__(cls, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> Any:
        layers = vllm_config.compilation_config.static_forward_context
        if not isinstance(layers[layer_names[0]].impl, SawAttentionImpl):
            return super().__new__(cls)
        refuse_subclass(cls, DispatchingBuilder)
        return SawMetadataBuilder(kv_cache_spec, layer_names, vllm_config, device)


class DispatchingCPUBackend(CPUAttentionBackend):
    """Registered under `CPU_ATTN`."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        *CPUAttentionBackend.supported_kv_cache_dtypes,
        *KV_CACHE_DTYPE_CODECS,
    ]

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return DispatchingImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return DispatchingBuilder

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        return kv_cache_dtype in KV_CACHE_DTYPE_CODECS or super().supports_kv_cache_dtype(kv_cache_dtype)

    @staticmethod
    def get_supported_kernel_block_sizes(*args: Any) -> list[int | MultipleOf]:
        sizes = CPUAttentionBackend.get_supported_kernel_block_sizes(*args)
        ours = [getattr(spec.kv_quant_mode, "is_per_token_head", False) for spec in args if spec is not None]
        return SawAttentionBackend.get_supported_kernel_block_sizes() if any(ours) else sizes

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        owner: Any = SawAttentionBackend if cache_dtype_str in KV_CACHE_DTYPE_CODECS else CPUAttentionBackend
        shape: tuple[int, ...] = owner.get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str)
        return shape

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return SawAttentionBackend.customize_spec(super().customize_spec(spec))
