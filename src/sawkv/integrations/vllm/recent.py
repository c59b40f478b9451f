"""The newest tokens of each request as the model made them, beside pages of fewer bits: `-r64` in a format's name.

Each attention layer gets a second cache layer of 16 bits with a sliding window, `<layer>.recent`. vLLM takes it for a
layer of a hybrid model: its blocks come from the same pool, and those behind the window go back there. Prefix caching
and preemption are vLLM's own. K and V of a token are written to both at once, and no token is moved later.

Query p reads the keys up to p - window from the pages, and those after it from here, whether it decodes or is part of a
prompt. The log-sum-exps of the two sets join their results. To the kernels the first is attention whose sequences are
shorter by the window. On a GPU the second is a small kernel in steps of few tokens per request, and else one call of
vLLM's FlashAttention for all requests; on a CPU our own kernel (docs/decisions/0029).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from vllm import _custom_ops as vllm_ops
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from sawkv import ops
from sawkv.cache import PagedKVCache
from sawkv.errors import UnsupportedError
from sawkv.format.layout import RECENT_PAGE_SIZE, PageLayout, least_page_size
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.config import FLOAT_CODECS
from sawkv.integrations.vllm.prefill import MAX_FLASH_HEAD_DIM, Blocks, padded
from sawkv.kernels import Step
from sawkv.unserved import RECURRENT, SPECULATION, UNLIKE, WINDOWS, no_newest_tokens

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from sawkv.integrations.vllm.backend import SawAttentionBackend, SawAttentionImpl

FEW_QUERIES = 8
"""Most new tokens per request of a step that `attend_newest` serves: of all steps in CUDA graphs, which have one."""


@dataclass(frozen=True, kw_only=True)
class RecentSpec(SlidingWindowSpec):
    """A window without a step's tokens, which vLLM would reserve for each request of its own. They are those of all
    requests together (`RecentTokens.check_size`), and at 16 bits four times as many bytes as in the pages.
    """

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        return int(super().max_admission_blocks_per_request(0, max_model_len))

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        if vllm_config.model_config.original_max_model_len != -1:
            return int(super().max_memory_usage_bytes(vllm_config))
        return self.least_blocks(vllm_config) * int(self.page_size_bytes)  # `auto`: vLLM lowers it to what fits

    def least_blocks(self, vllm_config: VllmConfig) -> int:
        """Blocks of a request that is alone, with the tokens of its steps."""
        steps, longest = vllm_config.max_in_flight_tokens, vllm_config.model_config.max_model_len
        return int(super().max_admission_blocks_per_request(steps, longest))


@dataclass
class RecentMetadata(AttentionMetadata):
    """Where the newest tokens of all requests of a step are: a step of our kernel on a CPU, else vLLM's blocks."""

    newest: Step | Blocks


class RecentMetadataBuilder(AttentionMetadataBuilder[RecentMetadata]):
    """Builds `RecentMetadata` once per step, for all layers of a group."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        scheduler = vllm_config.scheduler_config
        self._window: int = layer.window
        self._schedule = None
        if device.type == "cpu":
            self._schedule = ops.Schedule(
                layer.layout(kv_cache_spec.block_size),
                device,
                num_q_heads=layer.num_heads,
                max_num_seqs=padded(scheduler.max_num_seqs, vllm_config),
                max_query_len=scheduler.max_num_batched_tokens,
                sliding_window=self._window,
            )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RecentMetadata:
        common = common_attn_metadata
        table, seq_lens = common.block_table_tensor[: common.num_reqs], common.seq_lens[: common.num_reqs]
        starts = common.query_start_loc[: common.num_reqs + 1]
        if self._schedule is not None:
            return RecentMetadata(self._schedule.update(table, seq_lens, starts))
        if common.max_query_len > FEW_QUERIES:
            table, seq_lens = self._cut(table, seq_lens, starts, common.max_query_len)
        return RecentMetadata(Blocks(table, seq_lens, starts, common.max_query_len))

    def _cut(
        self, table: torch.Tensor, seq_lens: torch.Tensor, starts: torch.Tensor, max_query_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks from that of the first key in a window on, and the lengths from there on.

        vLLM has given earlier blocks to others by now. FlashAttention reads whole tiles, hidden keys too, and what is
        a page of codes to others may be NaN in 16 bits, which a weight of 0 would not hide.
        """
        skipped = (seq_lens - starts.diff() - self._window + 1).clamp_min_(0) // RECENT_PAGE_SIZE
        kept = skipped[:, None] + torch.arange(self._num_blocks(max_query_len), device=table.device)
        return table.gather(1, kept.clamp_max_(table.shape[1] - 1)), seq_lens - RECENT_PAGE_SIZE * skipped

    def _num_blocks(self, query_len: int) -> int:
        """Most blocks in which the keys that `query_len` queries see can lie."""
        return (query_len + self._window - 3) // RECENT_PAGE_SIZE + 2


class RecentTokens(AttentionLayerBase):
    """The second cache layer of an attention layer.

    Args:
        name: of this layer.
        impl: of the layer whose newest tokens it holds.
        backend: of that layer.
        window: tokens that a query reads from here, itself included.
        dtype: of K and V.
    """

    def __init__(
        self,
        name: str,
        impl: SawAttentionImpl,
        backend: type[SawAttentionBackend],
        window: int,
        dtype: torch.dtype,
    ) -> None:
        self.name, self.window, self.num_heads, self._of, self._dtype = name, window, impl.num_heads, impl, dtype
        self.kv_cache = torch.empty(0)
        self._page_size = 0
        self._bound: tuple[torch.Tensor, ops.Attention] | None = None
        self._backend = recent_backend(backend)

    def layout(self, block_size: int) -> PageLayout:
        return PageLayout(
            CacheFormat(FLOAT_CODECS[self._dtype], 0, 0), self._of.num_kv_heads, self._of.head_size, block_size
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self._backend

    def check_size(self, vllm_config: VllmConfig) -> None:
        """Refuse a cache in which a request alone might not fit: vLLM would begin its prompt again and again. vLLM
        binds smaller ones too, to find out how much memory CUDA graphs take.

        Raises:
            UnsupportedError: there are too few blocks.
        """
        longest = vllm_config.model_config.max_model_len  # `auto` has lowered it by now
        own = self.get_kv_cache_spec(vllm_config).least_blocks(vllm_config)
        least = -(-longest // self._page_size) + own + 1  # vLLM keeps one back
        if self.kv_cache.shape[0] < least:
            raise UnsupportedError(
                f"sawkv: expected a KV cache of {least} blocks or more for one request of --max-model-len {longest} and"
                f" the newest tokens of a step, got {self.kv_cache.shape[0]}. Lower that or --max-num-batched-tokens"
            )

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> RecentSpec:
        """What vLLM allocates: blocks of as many bytes as the pages have, whose ends stay empty.

        Raises:
            UnsupportedError: the pages are too small for a block.
        """
        # vLLM sets this to the least of all blocks when it has made the cache, and may ask again.
        self._page_size = self._page_size or vllm_config.cache_config.block_size
        page_size, of = self._page_size, self._of
        pages = of.layout(page_size)
        least = _least_page_size(of, self._dtype)
        if page_size < least:
            raise UnsupportedError(
                f"sawkv: expected --block-size {least} or more, so that {RECENT_PAGE_SIZE} of the newest tokens fit in"
                f" a page, got {page_size}"
            )
        return RecentSpec(
            block_size=RECENT_PAGE_SIZE,
            num_kv_heads=of.num_kv_heads,
            head_size=of.head_size,
            dtype=self._dtype,
            page_size_padded=of.num_kv_heads * page_size * pages.head_bytes,
            sliding_window=self.window,
        )

    def append(self, layer: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the step's new tokens, as `SawAttentionImpl.do_kv_cache_update` of `layer` does."""
        _, _, _, slots = get_attention_context(self.name)
        if self._of.prefill is None:
            self._bind().append(key, value, slots)
        else:
            vllm_ops.reshape_and_cache_flash(
                key, value, *self._k_and_v(), slots, "auto", layer._k_scale, layer._v_scale
            )

    def attend(self, query: torch.Tensor, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Add attention to the newest tokens.

        Args:
            query: [num_tokens, num_heads, head_size].
            output: like `query`, attention to all tokens behind the window. Becomes that to all tokens.
            lse: [num_heads, num_tokens] fp32, its log-sum-exp; -inf where there are no such tokens.
        """
        metadata, *_ = get_attention_context(self.name)
        newest = metadata.newest
        if self._of.prefill is None:
            found, found_lse = torch.zeros_like(output), torch.zeros_like(lse)
            self._bind()(query, newest, found, found_lse.t())
        elif newest.max_query_len <= FEW_QUERIES:
            self._attend_newest(query, newest, output, lse)
            return
        else:
            found, found_lse = self._of.prefill.attend_blocks(
                query, *self._k_and_v(), newest, self.window, self._of.sinks
            )
        merge_attn_states(output, output, lse, found, found_lse)

    def warm_up(self, query: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, step: Step) -> None:
        """Run the kernel of `attend` for the requests of `step`, which have no tokens."""
        if self._of.prefill is not None:
            self._attend_newest(query, Blocks(step.block_table, step.seq_lens, step.query_start_loc, 1), output, lse)

    def _attend_newest(self, query: torch.Tensor, newest: Blocks, output: torch.Tensor, lse: torch.Tensor) -> None:
        # Triton may be missing where no GPU is.
        from sawkv.kernels.triton.recent import attend_newest

        of = self._of
        attend_newest(
            query,
            *self._k_and_v(),
            newest.block_table,
            newest.seq_lens,
            newest.cu_seqlens_q,
            newest.max_query_len,
            output,
            lse,
            window=self.window,
            softmax_scale=of.scale,
            logit_softcap=of.logits_soft_cap,
            sinks=of.sinks,
        )

    def _k_and_v(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_blocks, RECENT_PAGE_SIZE, num_kv_heads, head_size] each, as vLLM's FlashAttention has them."""
        blocks, head_size = self.kv_cache.transpose(1, 2), self._of.head_size
        return blocks[..., :head_size], blocks[..., head_size:]

    def _bind(self) -> ops.Attention:
        if self._bound is None or self._bound[0] is not self.kv_cache:
            of, layout = self._of, self.layout(self.kv_cache.shape[2])
            pages = self.kv_cache.view(torch.uint8).view(layout.pages_shape(self.kv_cache.shape[0]))
            attention = ops.Attention(
                PagedKVCache(pages, layout),
                num_q_heads=of.num_heads,
                softmax_scale=of.scale,
                sliding_window=self.window,
                logit_softcap=of.logits_soft_cap,
                sinks=of.sinks,
            )
            self._bound = self.kv_cache, attention
        return self._bound[1]


def _least_page_size(impl: SawAttentionImpl, dtype: Any) -> int:
    return least_page_size(impl.layout(RECENT_PAGE_SIZE).format.codec, impl.head_size, FLOAT_CODECS[dtype])


def not_kept(vllm_config: VllmConfig, impl: SawAttentionImpl) -> list[str]:
    """Why a layer's newest tokens cannot be kept."""
    config = vllm_config
    layers = config.compilation_config.static_forward_context.values()
    others: list[Any] = [layer.impl for layer in layers if getattr(getattr(layer, "impl", None), "num_recent", 0)]
    shapes, cache_config = {(other.num_kv_heads, other.head_size) for other in others}, config.cache_config
    least = _least_page_size(impl, config.model_config.dtype)
    kinds = (
        (impl.prefill is not None and impl.head_size > MAX_FLASH_HEAD_DIM, f"head_dim {impl.head_size} on a GPU"),
        (impl.sliding_window, WINDOWS),
        (impl.kv_sharing_target_layer_name, "layers that read the pages of others"),
        (shapes - {(impl.num_kv_heads, impl.head_size)}, UNLIKE),
        (config.model_config.is_hybrid, RECURRENT),
        (config.speculative_config, SPECULATION),
        (config.kv_transfer_config, "KV connectors"),
        (
            cache_config.user_specified_block_size and cache_config.block_size < least,
            f"--block-size {cache_config.block_size} (expected {least} or more)",
        ),
        (cache_config.kv_cache_dtype_skip_layers, "--kv-cache-dtype-skip-layers"),
        (config.scheduler_config.disable_hybrid_kv_cache_manager, "--disable-hybrid-kv-cache-manager"),
    )
    return no_newest_tokens(impl.num_recent, kinds)


@cache  # vLLM tells the backends of layers apart by their classes
def recent_backend(backend: type[SawAttentionBackend]) -> type[AttentionBackend]:
    """The backend of `RecentTokens` beside layers of `backend`."""
    base: Any = backend

    class RecentBackend(base):  # type: ignore[misc]
        @staticmethod
        def get_builder_cls() -> type[RecentMetadataBuilder]:
            return RecentMetadataBuilder

        @classmethod
        def supports_block_size(cls, block_size: int | None) -> bool:
            """For a model with two backends vLLM asks none for its preference, and takes 16 if both support that."""
            return block_size is None or block_size >= backend.page_size

    return RecentBackend
