"""vLLM's attention backend over sawkv pages.

All attention reads the pages, the new tokens' included, so a token's output does not depend on how its prompt was cut in chunks, on
prefix-cache hits or on preemption, beyond rounding (docs/decisions/0002).

vLLM's words for ours: block = page, head_size = head_dim, `[blocks, kv heads, block_size, content bytes]` = our page layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from sawkv import ops
from sawkv.cache import PagedKVCache
from sawkv.errors import SawkvError, UnsupportedError
from sawkv.integrations.vllm.config import KV_CACHE_DTYPE_CODECS, SawConfig
from sawkv.integrations.vllm.contract import check_contract
from sawkv.kernels import select_backend
from sawkv.layout import PAGE_SIZE_MULTIPLE, PageLayout
from sawkv.spec import HEAD_DIMS, CacheFormat

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

logger = init_logger(f"vllm.{__name__}")  # under vLLM's name, so that its log settings apply


@dataclass
class SawMetadata(AttentionMetadata):
    """What one step's attention needs, for all layers of a group. Shapes as in `ops.decode_attention`."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


class SawMetadataBuilder(AttentionMetadataBuilder[SawMetadata]):
    """Builds `SawMetadata` once a step."""

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> SawMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise UnsupportedError("sawkv: expected causal attention, got a request for non-causal attention")
        return SawMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
        )


class SawAttentionImpl(AttentionImpl[SawMetadata]):
    """One attention layer: refuses at start-up what it cannot serve, then appends and attends."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **other_arguments: Any,
    ) -> None:
        check_contract()
        vllm_config = get_current_vllm_config()
        config = SawConfig.from_vllm(vllm_config, kv_cache_dtype)
        if config is None:
            raise UnsupportedError(f"sawkv: expected --kv-cache-dtype {' or '.join(KV_CACHE_DTYPE_CODECS)}, got {kv_cache_dtype}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window or 0
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.kv_cache_dtype, self.attn_type, self.sinks = kv_cache_dtype, attn_type, sinks
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._cache: PagedKVCache | None = None
        self._kv_cache: torch.Tensor | None = None
        self._format = _check_supported(
            vllm_config, config, head_size, attn_type, alibi_slopes is not None, sliding_window is not None, other_arguments
        )
        _announce(self._format, head_size, self.num_kv_heads, vllm_config)

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Append the step's new tokens. vLLM pads: `key` may be longer than `slot_mapping`, whose padding is -1."""
        ops.append(key, value, self._bind(kv_cache), slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SawMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the pages. `query` and `output`: [num_tokens, num_heads, head_size]; rows past num_actual_tokens are padding."""
        if attn_metadata is None:  # profiling
            return output.zero_()
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("sawkv: fused quantization of the attention output is not supported")
        num_tokens = attn_metadata.num_actual_tokens
        ops.decode_attention(
            query[:num_tokens],
            self._bind(kv_cache),
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            softmax_scale=self.scale,
            max_query_len=attn_metadata.max_query_len,
            sliding_window=self.sliding_window,
            logit_softcap=self.logits_soft_cap,
            sinks=self.sinks,
            out=output[:num_tokens].view(num_tokens, self.num_heads, self.head_size),
        )
        return output

    def _bind(self, kv_cache: torch.Tensor) -> PagedKVCache:
        """The pages that vLLM handed over, checked once and again whenever they change (after a wake-up, say)."""
        if self._cache is None or self._kv_cache is not kv_cache:
            layout = PageLayout(self._format, self.num_kv_heads, self.head_size, kv_cache.shape[2])
            self._cache, self._kv_cache = PagedKVCache(kv_cache.view(torch.uint8), layout), kv_cache
        return self._cache


class SawAttentionBackend(AttentionBackend):
    """Selected by `--attention-backend CUSTOM` on CUDA; on the CPU `cpu.DispatchingCPUBackend` leads here."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    # "auto" and the 16-bit names are for the float formats of `--additional-config`.
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [*KV_CACHE_DTYPE_CODECS, "auto", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SawAttentionImpl]:
        return SawAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[SawMetadataBuilder]:
        return SawMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_SIZE_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @staticmethod
    def use_cascade_attention(*args: object, **kwargs: object) -> bool:
        return False

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Shape of one layer's pages, in elements of the cache's dtype. vLLM before 0.29."""
        codec = KV_CACHE_DTYPE_CODECS.get(cache_dtype_str)
        content = 2 * head_size if codec is None else token_bytes(codec, head_size)
        return num_blocks, num_kv_heads, block_size, content

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Heads outermost inside a page; across layers, pages outermost. vLLM before 0.29."""
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Give vLLM our bytes for each token and KV head. vLLM from 0.28."""
        codec = KV_CACHE_DTYPE_CODECS.get(f"{spec.kv_quant_mode.name.lower()}")
        return spec if codec is None else replace(spec, state_content_bytes=token_bytes(codec, spec.head_size))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Layouts that keep a (page, KV head) contiguous. vLLM from 0.29."""
        from vllm.v1.kv_cache_interface import KVCacheLayout  # type: ignore[attr-defined]  # not in the oldest vLLM

        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC


def token_bytes(codec: str, head_size: int) -> int:
    """Bytes that K and V of one token take for one KV head."""
    return PageLayout(CacheFormat(codec), 1, head_size, PAGE_SIZE_MULTIPLE).token_bytes


def _check_supported(
    vllm_config: VllmConfig,
    config: SawConfig,
    head_size: int,
    attn_type: str,
    has_alibi: bool,
    has_sliding_window: bool,
    other_arguments: dict[str, Any],
) -> CacheFormat:
    """The format with its rotation orders, or one error that names everything this model and configuration need and sawkv lacks."""
    parallel, reasons = vllm_config.parallel_config, []
    try:
        resolved = config.format.resolve(head_size)
    except SawkvError as error:
        resolved, reasons = config.format, [str(error)]
    if attn_type != AttentionType.DECODER:
        reasons.append(f"attention type {attn_type} (only decoder self-attention)")
    if has_alibi:
        reasons.append("ALiBi")
    if has_sliding_window and resolved.quantized and not hasattr(AttentionBackend, "customize_spec"):
        reasons.append("sliding window attention with vLLM before 0.28, which sizes its quantized pages wrongly")
    if getattr(parallel, "decode_context_parallel_size", 1) > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        reasons.append("context parallelism")
    if vllm_config.kv_transfer_config is not None:
        reasons.append("KV transfer and offload connectors (--kv-transfer-config)")
    head_size_v = other_arguments.pop("head_size_v", head_size)
    if head_size_v != head_size:
        reasons.append(f"head_dim {head_size_v} of V apart from {head_size} of K")
    reasons += [f"attention argument {name}={value!r}" for name, value in other_arguments.items() if value is not None]
    if reasons:
        raise UnsupportedError(f"sawkv cannot serve this configuration: {'; '.join(reasons)}. Drop --kv-cache-dtype to serve in 16 bits.")
    return resolved


_announced: set[tuple[CacheFormat, int, int]] = set()


def _announce(cache_format: CacheFormat, head_size: int, num_kv_heads: int, vllm_config: VllmConfig) -> None:
    """Say once which format and kernels run, so that a log shows that sawkv is in use. Builds the kernels, so that no request waits."""
    if (cache_format, head_size, num_kv_heads) in _announced:
        return
    _announced.add((cache_format, head_size, num_kv_heads))
    layout = PageLayout(cache_format, num_kv_heads, head_size, PAGE_SIZE_MULTIPLE)
    backend = select_backend(torch.device(vllm_config.device_config.device_type), layout)
    logger.info(
        "sawkv: KV cache format %s, %d bytes a token, KV head and layer (16 bits: %d), %s kernels",
        cache_format,
        layout.token_bytes,
        4 * head_size,
        backend.name,
    )
    if backend.name == "reference":
        logger.warning("sawkv: there are no fast kernels here (`sawkv info` says why): attention is correct but very slow")
