"""vLLM's attention backend over sawkv pages. Over 400 lines: vLLM's interface has three classes that belong together.

All attention reads the pages, new tokens included. So a token's output does not depend on how its prompt was cut into
chunks, on prefix-cache hits or on preemption, beyond rounding (docs/decisions/0002).

vLLM's words: block = page, head_size = head_dim, `[blocks, kv heads, block_size, content bytes]` = our page layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from sawkv import ops
from sawkv.cache import PagedKVCache
from sawkv.errors import CalibrationError, SawkvError, UnsupportedError
from sawkv.format.layout import ENGINE_PAGE_SIZE, GPU_PAGE_SIZES, PAGE_SIZE_MULTIPLE, PageLayout, engine_page_size
from sawkv.format.spec import HEAD_DIMS, CacheFormat, ResolvedFormat
from sawkv.integrations.vllm import announce, refusals
from sawkv.integrations.vllm.config import KV_CACHE_DTYPE_CODECS, VLLM_DTYPE_CODECS, SawConfig, dtype_codec, is_draft
from sawkv.integrations.vllm.contract import check_contract
from sawkv.integrations.vllm.measure import LayerMeasurement, Prompt, first_kv_head, layer_index, whole_prompts
from sawkv.integrations.vllm.metrics import CountedLayer, CounterReader
from sawkv.integrations.vllm.prefill import (
    FlashPrefill,
    HostLengths,
    PrefillSlice,
    find_turns,
    padded,
    slice_prefills,
    speculated_tokens,
)
from sawkv.integrations.vllm.prepare import is_installed, served_context
from sawkv.integrations.vllm.recent import RecentTokens, not_kept
from sawkv.integrations.vllm.windows import VLLM_SIZES_WINDOWS, pack_windows
from sawkv.kernels import Prefixes, Step, Turns, select_backend
from sawkv.prepare.calibration import Calibration, LayerCalibration, model_id
from sawkv.prepare.turning import MAX_BUCKETS, buckets_in
from sawkv.unserved import ALIBI, unlike_head_dims

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

LikeLayers = tuple[int, int, int]
"""num_heads, num_kv_heads and sliding_window, which layers with one schedule have in common."""

logger = init_logger(f"vllm.{__name__}")  # under vLLM's name, so that its log settings apply


@dataclass
class SawMetadata(AttentionMetadata):
    """What attention needs in one step, for all layers of a group.

    Attributes:
        steps: of requests with few new tokens, which read their pages, by `LikeLayers`; empty if there are none.
        turns: of those with more that read them too, alike.
        prefills: slices of all other requests, by the sliding window of the layers.
        prompts: prompts that lie in this step, while layers measure.
        positions: [max_num_tokens] int64, as of `append`, or None if no layer needs them.
    """

    steps: Mapping[LikeLayers, Step]
    turns: Mapping[LikeLayers, Step]
    prefills: Mapping[int, Sequence[PrefillSlice]]
    prompts: Sequence[Prompt] = ()
    positions: torch.Tensor | None = None


def token_positions(common: CommonAttentionMetadata) -> torch.Tensor:
    """Places of the step's tokens in their sequences, [num_actual_tokens] int32. Does not synchronize. The model's own
    positions would not do: those of a multimodal model may differ from the places by which attention knows keys.
    """
    ends, seq_lens = common.query_start_loc[1 : common.num_reqs + 1], common.seq_lens[: common.num_reqs]
    tokens = torch.arange(common.num_actual_tokens, dtype=torch.int32, device=ends.device)
    request = torch.searchsorted(ends, tokens, right=True).clamp_max_(common.num_reqs - 1)  # padding
    return tokens + (seq_lens - ends)[request]


class SawMetadataBuilder(AttentionMetadataBuilder[SawMetadata]):
    """Builds `SawMetadata` once per step.

    On a GPU, requests with few query tokens come first and are decoded from their pages, under CUDA graphs if the whole
    batch is. Of the others, short turns over long contexts read their pages too, and the rest are prefills. On a CPU
    one kernel serves all requests.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        refusals.refuse_subclass(type(self), SawMetadataBuilder)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = vllm_config.compilation_config.static_forward_context
        self._impls: list[SawAttentionImpl] = [layers[name].impl for name in layer_names]
        for name, impl in zip(layer_names, self._impls, strict=True):
            impl.check_page_size(kv_cache_spec)
            impl.take_name(name)
            impl.builder = self
        self._recent = self._impls[0].num_recent
        cache_config = vllm_config.cache_config
        layout = self._impls[0].layout(kv_cache_spec.block_size)
        announce.say_pages(kv_cache_spec, layout, cache_config.block_size if cache_config.enable_prefix_caching else 0)
        announce.say_kernels(layout, device)
        self._schedules: dict[tuple[LikeLayers, int], ops.Schedule] = {}
        block_size = kv_cache_spec.block_size
        self._turns = {impl.alike: ops.turns(impl.layout(block_size), device, impl.num_heads) for impl in self._impls}
        self._unprepared = self._impls
        self._positions: torch.Tensor | None = None
        self._older: torch.Tensor | None = None
        self._reader = self._make_reader(layers, vllm_config.parallel_config.rank)
        # The least: a draft model's layers have a configuration of their own.
        self._workspace_tokens = min(
            (impl.prefill.capacity for impl in self._impls if impl.prefill is not None), default=0
        )
        self._bound_slack = speculated_tokens(vllm_config)
        self._max_query_len = vllm_config.scheduler_config.max_num_batched_tokens  # on a CPU
        self._max_num_seqs = padded(vllm_config.scheduler_config.max_num_seqs, vllm_config)
        drafted = self._max_num_seqs * speculated_tokens(vllm_config)
        self._max_num_tokens = padded(self._max_query_len + drafted, vllm_config)

    def _place_tokens(self, common: CommonAttentionMetadata) -> torch.Tensor | None:
        """Positions of the step's tokens, if K has several centers in any layer."""
        if all(impl.num_buckets == 1 for impl in self._impls):
            return None
        # CUDA graphs need a fixed address. Made at first use: what is made at start-up does not outlive a sleep.
        if self._positions is None:
            self._positions = torch.zeros(self._max_num_tokens, dtype=torch.int64, device=self.device)
        self._positions[: common.num_actual_tokens] = token_positions(common)
        return self._positions

    def _behind_the_newest(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """What layers read from their pages: without the newest tokens, if they keep those elsewhere."""
        if not self._recent:
            return common
        if self._older is None:  # as `_positions`
            self._older = common.seq_lens.new_zeros(self._max_num_seqs)
        read, older = copy(common), self._older[: common.num_reqs]
        torch.sub(common.seq_lens[: common.num_reqs], self._recent, out=older)
        read.seq_lens = older.clamp_min_(0)
        return read

    def _make_reader(self, layers: Mapping[str, Any], rank: int) -> CounterReader | None:
        """Who reads what this group's layers count; None where the kernels count nothing."""
        layout = self._impls[0].layout(PAGE_SIZE_MULTIPLE).rows
        if not select_backend(self.device, layout).counts:
            return None
        first = self._first_impl(layers)
        writers = [impl for impl in self._impls if impl.kv_sharing_target_layer_name is None]
        if not writers:
            return None
        counted = [impl.counted for impl in writers]
        reader = writers[0].reader or CounterReader(
            layout, counted, self.device, rank if first in self._impls else None
        )
        for place, impl in enumerate(writers):
            impl.reader, impl.reader_place = reader, place
        return reader

    @staticmethod
    def _first_impl(layers: Mapping[str, Any]) -> SawAttentionImpl:
        """Of the process: what is said or counted once is so by the group that it is in."""
        impls: list[object] = [getattr(layer, "impl", None) for layer in layers.values()]
        return next(impl for impl in impls if isinstance(impl, SawAttentionImpl))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SawMetadata:
        common = common_attn_metadata
        if self._reader is not None:
            self._reader.poll()
        for impl in self._impls:
            if impl.stopped is not None:
                raise impl.stopped
        if common.causal is not True:
            raise UnsupportedError("sawkv: expected causal attention, got a request for non-causal attention")
        num_decodes, max_query_len = common.num_reqs, self._decode_query_len()
        if self.device.type != "cpu":
            num_decodes, _, _, _ = split_decodes_and_prefills(common, decode_threshold=max_query_len)
        read = self._behind_the_newest(common)
        lengths = read.seq_lens[:num_decodes], common.query_start_loc[: num_decodes + 1]
        block_table = common.block_table_tensor[:num_decodes]
        turns: Mapping[LikeLayers, Step] = {}
        prefills: Mapping[int, Sequence[PrefillSlice]] = {}
        if num_decodes < common.num_reqs:
            host = HostLengths.of(common, self._recent)
            found = self._find_turns(host, num_decodes)
            turns = self._schedule_turns(read, host, num_decodes, found)
            prefills = self._slice_prefills(read, host, num_decodes, found)
        return SawMetadata(
            steps={
                alike: self._schedule(alike, max_query_len).update(block_table, *lengths)
                for alike in (self._turns if num_decodes else ())
            },
            turns=turns,
            prefills=prefills,
            prompts=whole_prompts(common) if self._measures() else (),
            positions=self._place_tokens(common),
        )

    def warm_up(self) -> None:
        """Run each kernel of these layers, for one request without tokens in the cache."""
        if self._reader is not None:
            self._reader.poll()  # makes the counters, which layers bind with their pages, once
        if (recent := self._impls[0].recent) is not None:
            recent.check_size(self.vllm_config)
        layers = self.vllm_config.compilation_config.static_forward_context
        zero, starts = (torch.zeros(n, dtype=torch.int32, device=self.device) for n in (1, 2))
        table = zero[:, None]
        for alike, turns in self._turns.items():
            query_lens = (self._decode_query_len(), *(() if turns is None else turns.query_lens))
            steps = [self._schedule(alike, n).update(table, zero, starts) for n in query_lens]
            prefixes = ops.prefixes(table, zero, starts, zero if alike[2] else None)
            like = [layers[name] for name in self.layer_names if layers[name].impl.alike == alike]
            for layer in like:
                layer.impl.warm_up(layer.kv_cache, steps, prefixes, self.vllm_config.model_config.dtype)
            if like[0].impl.prefill is not None:
                like[0].impl.prefill.warm_up(like[0].impl.num_heads, self._max_num_seqs)

    def _decode_query_len(self) -> int:
        """Most new tokens of a request that the step's first kernel serves. Not final before vLLM warms up."""
        return self._max_query_len if self.device.type == "cpu" else self.reorder_batch_threshold or 1

    def _schedule(self, alike: LikeLayers, max_query_len: int) -> ops.Schedule:
        """The schedule of such layers. Made at first use, because the threshold of decodes is not final at start."""
        found = self._schedules.get((alike, max_query_len))
        if found is None:
            impl = next(impl for impl in self._impls if impl.alike == alike)
            found = self._schedules[alike, max_query_len] = ops.Schedule(
                impl.layout(self.kv_cache_spec.block_size),
                self.device,
                num_q_heads=impl.num_heads,
                max_num_seqs=self._max_num_seqs,
                max_query_len=max_query_len,
                sliding_window=impl.sliding_window,
            )
        return found

    def _find_turns(self, host: HostLengths, first: int) -> dict[int, list[bool]]:
        """By window, whether each request from `first` on reads its pages in all layers that have it."""
        by_window: dict[int, list[Turns | None]] = {}
        for (_, _, window), turns in self._turns.items():
            by_window.setdefault(window, []).append(turns)
        return {window: find_turns(host, first, window, turns) for window, turns in by_window.items()}

    def _schedule_turns(
        self, common: CommonAttentionMetadata, host: HostLengths, first: int, found: Mapping[int, Sequence[bool]]
    ) -> dict[LikeLayers, Step]:
        """Steps of the requests from `first` on that read their pages, `found` by window. `slice_prefills` leaves these
        out.
        """
        steps: dict[LikeLayers, Step] = {}
        if not any(itertools.chain.from_iterable(found.values())):
            return steps
        block_table, starts = common.block_table_tensor[first:], common.query_start_loc[first:]
        query_lens = host.queries[first:]
        for alike, turns in self._turns.items():
            are_turns = found[alike[2]][first:]
            if turns is None or not any(are_turns):
                continue
            longest = max(n for n, is_turn in zip(query_lens, are_turns, strict=True) if is_turn)
            seq_lens = common.seq_lens[first:]
            if not all(are_turns):  # a negative length leaves a sequence out
                seq_lens = torch.where(torch.tensor(are_turns).to(self.device, non_blocking=True), seq_lens, -1)
            schedule = self._schedule(alike, next(n for n in turns.query_lens if n >= longest))
            steps[alike] = schedule.update(block_table, seq_lens, starts)
        return steps

    def _measures(self) -> bool:
        self._unprepared = [impl for impl in self._unprepared if impl.unprepared]
        return any(impl.measurement is not None for impl in self._unprepared)

    def _slice_prefills(
        self, common: CommonAttentionMetadata, host: HostLengths, first: int, turns: Mapping[int, Sequence[bool]]
    ) -> dict[int, list[PrefillSlice]]:
        """Requests from `first` on, by the window of the layers that attend them."""
        page_size = self.kv_cache_spec.block_size
        capacity, slack = self._workspace_tokens, self._bound_slack
        return {
            window: slice_prefills(common, host, first, capacity, window, page_size, slack, are_turns)
            for window, are_turns in turns.items()
        }


class SawAttentionImpl(AttentionImpl[SawMetadata]):
    """One attention layer. Refuses at start what it cannot serve. Then appends new tokens, and attends."""

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
            raise UnsupportedError(
                f"sawkv: expected --kv-cache-dtype {' or '.join(KV_CACHE_DTYPE_CODECS)}, got {kv_cache_dtype}"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window or 0
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.kv_cache_dtype, self.attn_type, self.sinks = kv_cache_dtype, attn_type, sinks
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.alike: LikeLayers = (self.num_heads, self.num_kv_heads, self.sliding_window)
        self.builder: SawMetadataBuilder | None = None  # of the layer's group
        self.reader: CounterReader | None = None
        self.reader_place = 0
        self.counted = CountedLayer("")  # until the layer's name is known
        self.reloaded: Callable[[], None] | None = None  # called when weights have been loaded again
        self.stopped: UnsupportedError | None = None  # why no further step may run
        self._attention: ops.Attention | None = None
        self._kv_cache: torch.Tensor | None = None
        self._layer_calibration: LayerCalibration | None = LayerCalibration()
        self._format = _check_supported(
            vllm_config, config, head_size, attn_type, alibi_slopes is not None, other_arguments
        )
        self._layers = vllm_config.compilation_config.static_forward_context
        self.num_recent = config.format.recent
        self.recent: RecentTokens | None = None  # from when the layer's name is known
        if config.calibration is not None:
            _check_calibration(config.calibration, self, vllm_config)
            self._layer_calibration = None  # until the layer's name is known
        self._calibration = config.calibration
        context, given = served_context(vllm_config), 1
        if config.calibration is not None:
            given = config.calibration.num_buckets
            announce.warn_short(config.calibration, context)
        self.num_buckets = min(buckets_in(context), MAX_BUCKETS if config.prepares else given)
        if config.prepares and not is_installed():
            raise UnsupportedError(
                "sawkv: expected an engine that prepares its model, got one without: VLLM_PLUGINS leaves sawkv out, or"
                " see the log above"
            )
        self.unprepared = config.prepares
        self.measurement: LayerMeasurement | None = None
        # The first of its kind.
        if not any(self._is_like(getattr(layer, "impl", None)) for layer in self._layers.values()):
            device = torch.device(vllm_config.device_config.device_type)
            fingerprint = "" if config.calibration is None else config.calibration.fingerprint()
            announce.say_format(self._format, self.num_recent, head_size, self.num_kv_heads, device, fingerprint)
            if (
                self._format.feeds_back
                and config.calibration is None
                and not config.prepare
                and not is_draft(vllm_config)
            ):
                announce.warn_unprepared()
        self.prefill: FlashPrefill | None = None
        if vllm_config.device_config.device_type != "cpu":
            self.prefill = FlashPrefill(
                vllm_config, head_size, self.num_kv_heads, self.scale, self.sliding_window, self.logits_soft_cap, sinks
            )
        if self.num_recent:
            refusals.refuse(vllm_config, not_kept(vllm_config, self))

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM's first call after it has made the layer of this implementation, before it asks for page sizes; again at
        every reload.
        """
        if self.sliding_window and self._format.codec == "int4" and not VLLM_SIZES_WINDOWS:
            for layer in self._layers.values():
                if getattr(layer, "impl", None) is self:
                    pack_windows(layer)
        if self.num_recent and self.recent is None:
            name, layer = next(item for item in self._layers.items() if getattr(item[1], "impl", None) is self)
            self.recent = RecentTokens(f"{name}.recent", self, layer.get_attn_backend(), self.num_recent, act_dtype)
            self._layers[self.recent.name] = self.recent  # where vLLM looks for all layers with a cache
        if self.reloaded is not None:
            self.reloaded()

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Append the step's new tokens. vLLM pads: `key` may be longer than `slot_mapping`, whose padding is -1."""
        if self.measurement is None:
            positions = None
            if self.num_buckets > 1:
                metadata, *_ = get_attention_context(self.counted.name)
                positions = slot_mapping if metadata is None else metadata.positions  # profiling: slots are padding
            self._bind(kv_cache).append(key, value, slot_mapping, positions)
            if self.recent is not None:
                self.recent.append(layer, key, value)

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
        """Attend to the pages. `query`, `output`: [num_tokens, num_heads, head_size]. Rows from num_actual_tokens on
        are padding.
        """
        if attn_metadata is None:  # profiling
            if self.prefill is not None:
                self.prefill.workspace()
            return output.zero_()
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("sawkv: fused quantization of the attention output is not supported")
        if self.measurement is not None:
            return self.measurement.attend(self, query, key, value, attn_metadata.prompts, output)
        attention, lse, lse_of_rows = self._bind(kv_cache), None, None
        if self.recent is not None:
            lse = query.new_empty(self.num_heads, len(query), dtype=torch.float32)  # as vLLM has it
            lse_of_rows = lse.t()
        if attn_metadata.steps:
            attention(query, attn_metadata.steps[self.alike], output, lse_of_rows)
        if self.alike in attn_metadata.turns:
            attention(query, attn_metadata.turns[self.alike], output, lse_of_rows)
        if attn_metadata.prefills and self.prefill is not None:  # only a GPU's metadata has prefills
            for prefill in attn_metadata.prefills[self.sliding_window]:
                self.prefill.attend(query, attention, prefill, output, lse)
        if self.recent is not None and lse is not None:
            self.recent.attend(query, output, lse)
        return output

    def warm_up(self, kv_cache: torch.Tensor, steps: Sequence[Step], prefixes: Prefixes, dtype: torch.dtype) -> None:
        """Run each kernel of this layer: of no token, for the request of `steps` and `prefixes`.

        Args:
            kv_cache: pages of the layer.
            steps: of all schedules of such layers.
            prefixes: what gather reads.
            dtype: of queries, keys and values.
        """
        attention, device = self._bind(kv_cache), kv_cache.device
        query, key, value = (
            torch.zeros(1, heads, self.head_size, dtype=dtype, device=device)
            for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        )
        position = torch.zeros(1, dtype=torch.int64, device=device)
        attention.append(key, value, position - 1, position)
        lse = None
        if self.recent is not None:
            lse = query.new_empty(self.num_heads, 1, dtype=torch.float32)
            self.recent.warm_up(query, torch.empty_like(query), lse, steps[0])
            lse = lse.t()
        for step in steps:
            attention(query, step, lse=lse)
        if self.prefill is not None:
            k, v = self.prefill.workspace()
            attention.gather(prefixes, k, v, rotated=False)

    def _is_like(self, other: object) -> bool:
        return isinstance(other, SawAttentionImpl) and other.layout(PAGE_SIZE_MULTIPLE) == self.layout(
            PAGE_SIZE_MULTIPLE
        )

    def layout(self, block_size: int) -> PageLayout:
        return PageLayout(self._format, self.num_kv_heads, self.head_size, block_size)

    def check_page_size(self, spec: AttentionSpec) -> None:
        """Refuse pages of another size than this layer's format takes.

        Raises:
            UnsupportedError: vLLM's size differs. Pages would be read wrongly.
        """
        layout = self.layout(spec.block_size)
        expected = layout.rows.num_kv_heads * layout.span_bytes
        if spec.unpadded_page_size_bytes != expected:
            raise UnsupportedError(
                f"sawkv: expected pages of {expected} bytes for {spec.block_size} tokens and {self.num_kv_heads} KV"
                f" heads in {self._format}, got {spec.unpadded_page_size_bytes} of {type(spec).__name__}"
            )

    def take_name(self, layer_name: str) -> None:
        """Take this layer's and this rank's part of the calibration, once vLLM has given the layer's name.

        Raises:
            CalibrationError: the calibration has no such layer.
        """
        self.counted.name = layer_name
        if self._calibration is None or self._layer_calibration is not None:
            return
        index = layer_index(self.kv_sharing_target_layer_name or layer_name)  # whose pages this layer reads
        first = first_kv_head(self._calibration.num_kv_heads)
        self._layer_calibration = self._calibration.layer(
            index, slice(first, first + self.num_kv_heads), self.num_buckets
        )
        self.counted.energies = _energies(self._layer_calibration)

    def take_prepared(self, part: LayerCalibration, device: torch.device) -> None:
        """Write pages with `part` from now on. It is copied in place, so captured graphs use it."""
        self._written_with(device).fill(part)
        if self._attention is not None:
            self._attention.cache.refresh()
        self.counted.energies = _energies(part)
        self.unprepared = False

    def written_with(self, kv_cache: torch.Tensor) -> dict[str, Any]:
        """All that the bytes of this layer's pages depend on, besides K and V, by name."""
        layout = self.layout(PAGE_SIZE_MULTIPLE)
        pages = torch.empty(layout.pages_shape(1), dtype=torch.uint8, device=kv_cache.device)
        cache = PagedKVCache(pages, layout, **self._written_with(kv_cache.device).constants())
        return {
            "format": str(layout.format),
            "page size": kv_cache.shape[2],
            "KV heads": layout.num_kv_heads,
            "centers, gains and feedback": cache.fingerprint(),
        }

    def _written_with(self, device: torch.device) -> LayerCalibration:
        """Static tensors of this layer's pages. A layer that waits to be prepared gets tensors that change nothing
        until they are filled.
        """
        if self._layer_calibration is None:
            raise CalibrationError("sawkv calibration: vLLM runs a layer that it did not name at start-up")
        # Made here and not at start-up: vLLM's sleep mode discards what is allocated while it loads weights or makes
        # the cache.
        if self.unprepared and self._layer_calibration.k_center is None:
            layout = self.layout(PAGE_SIZE_MULTIPLE)
            self._layer_calibration = LayerCalibration.blank(layout, device, self.num_buckets)
        self._layer_calibration = self._layer_calibration.to(device)
        return self._layer_calibration

    def _bind(self, kv_cache: torch.Tensor) -> ops.Attention:
        """Attention over the pages that vLLM handed over: made at first use and again when they change (after a
        wake-up, say).
        """
        if self._attention is None or self._kv_cache is not kv_cache:
            parts = self._written_with(kv_cache.device).constants()
            counters = (
                None if self.reader is None or self.reader.counters is None else self.reader.counters[self.reader_place]
            )
            layout = self.layout(kv_cache.shape[2])
            pages = kv_cache.view(torch.uint8).view(layout.pages_shape(kv_cache.shape[0]))
            cache = PagedKVCache(pages, layout, **parts, counters=counters)
            self._attention = ops.Attention(
                cache,
                num_q_heads=self.num_heads,
                softmax_scale=self.scale,
                sliding_window=self.sliding_window,
                logit_softcap=self.logits_soft_cap,
                sinks=None if self.recent is not None else self.sinks,  # a sink takes part once
            )
            self._kv_cache = kv_cache
        return self._attention


class SawAttentionBackend(AttentionBackend):
    """The backend that `selection` gives our layers; on CUDA it is registered as CUSTOM.

    Attributes:
        codec: of the layers, in the subclasses that `backend_of` makes. Else vLLM's dtype names it.
    """

    codec: ClassVar[str | None] = None
    page_size: ClassVar[int] = ENGINE_PAGE_SIZE
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
        """Page sizes of kernels. vLLM cuts a larger block into the largest of these that divides it.

        Blocks of hybrid models have thousands of tokens, which CUDA kernels do not take as one page. On a CPU a block
        is a page, because vLLM's CPU runner (0.32) clears new blocks as if it were.
        """
        return [MultipleOf(PAGE_SIZE_MULTIPLE)] if current_platform.is_cpu() else list(GPU_PAGE_SIZES)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The block size without `--block-size`."""
        return cls.page_size

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Prefills are cut by the lengths that the host knows, which adaptive verification changes on the device. vLLM
        from 0.33.
        """
        return False

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
        """Tell vLLM our bytes per token and KV head. vLLM from 0.28."""
        codec = VLLM_DTYPE_CODECS.get(spec.kv_quant_mode.name.lower())
        if codec is None:
            return spec
        return replace(spec, state_content_bytes=token_bytes(cls.codec or codec, spec.head_size))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Layouts in which each span (page, KV head) is contiguous. vLLM from 0.29."""
        from vllm.v1.kv_cache_interface import KVCacheLayout  # type: ignore[attr-defined]  # not in the oldest vLLM

        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC


@cache  # vLLM groups layers by their backend's class
def backend_of(cache_format: CacheFormat) -> type[SawAttentionBackend]:
    """The backend of layers in a format. vLLM asks it for the size of pages, and names no more than a dtype."""
    if dtype_codec(cache_format) == cache_format.codec and not cache_format.recent:
        return SawAttentionBackend
    described = {"codec": cache_format.codec, "page_size": engine_page_size(cache_format)}
    return type(SawAttentionBackend.__name__, (SawAttentionBackend,), described)


def _energies(part: LayerCalibration) -> tuple[float, float] | None:
    """Energies of rows of K and of V in the calibration, mean over heads."""
    if part.k_energy is None or part.v_energy is None:
        return None
    return float(part.k_energy.mean()), float(part.v_energy.mean())


def token_bytes(codec: str, head_size: int) -> int:
    """Bytes of K and V of one token and one KV head."""
    return PageLayout(CacheFormat(codec), 1, head_size, PAGE_SIZE_MULTIPLE).head_bytes


def _check_supported(
    vllm_config: VllmConfig,
    config: SawConfig,
    head_size: int,
    attn_type: str,
    has_alibi: bool,
    other_arguments: dict[str, Any],
) -> ResolvedFormat:
    """The format with its rotation orders.

    Raises:
        UnsupportedError: the model or the configuration needs what sawkv lacks. The message names all of it.
    """
    reasons = refusals.of_format(config.format) + refusals.of_configuration(vllm_config)
    resolved = None
    try:
        resolved = config.format.resolve(head_size)
    except SawkvError as error:
        reasons.append(str(error))
    if attn_type != AttentionType.DECODER:
        reasons.append(f"attention type {attn_type} (only decoder self-attention)")
    if has_alibi:
        reasons.append(ALIBI)
    head_size_v = other_arguments.pop("head_size_v", head_size)
    if head_size_v != head_size:
        reasons.append(unlike_head_dims(head_size, head_size_v))
    reasons += [f"attention argument {name}={value!r}" for name, value in other_arguments.items() if value is not None]
    refusals.refuse(vllm_config, reasons)
    assert resolved is not None  # else there was a reason
    return resolved


def _check_calibration(calibration: Calibration, impl: SawAttentionImpl, vllm_config: VllmConfig) -> None:
    """Refuse a calibration of another model or format."""
    model_config = vllm_config.model_config
    calibration.check(
        cache_format=impl.layout(PAGE_SIZE_MULTIPLE).format,
        model=model_id(model_config.hf_text_config),
        num_layers=model_config.hf_text_config.num_hidden_layers,
        num_kv_heads=model_config.get_total_num_kv_heads(),
        head_dim=impl.head_size,
    )
