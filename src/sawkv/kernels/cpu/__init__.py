"""C++ kernels for CPUs, compiled at first use (`build`). They take any format, head_dim and query length."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from sawkv.cache import PagedKVCache
from sawkv.errors import UnsupportedError
from sawkv.format.codecs import CODECS, PassthroughCodec
from sawkv.format.layout import PageLayout
from sawkv.format.spec import CODEC_BITS, NARROWER_V
from sawkv.kernels import Layer, Prefixes, Schedule, Step, structs
from sawkv.kernels.cpu.build import MAX_GROUP, load_library, read_sources

__all__ = ["Attention", "Pages", "Schedule", "counts", "name", "unsupported_reason"]

name = "cpu"
counts = True

_CODECS = ("int4", "int3", "int2", *NARROWER_V, "int8", "bf16", "fp16", "fp32")
"""Formats that the kernels support, by the first part of their names."""
_CODEC_NUMBERS = {codec: number for number, codec in enumerate(CODEC_BITS)}
"""Values of the kernels' `enum Codec`."""
_DTYPES = tuple(codec.dtype for codec in CODECS.values() if isinstance(codec, PassthroughCodec))
"""Values of the kernels' `enum DType`."""
_SOURCE = "\n".join(read_sources().values())
Cache = structs.read(_SOURCE, "Cache")
AppendArguments = structs.read(_SOURCE, "AppendArguments")
AttentionArguments = structs.read(_SOURCE, "AttentionArguments")
GatherArguments = structs.read(_SOURCE, "GatherArguments")


def unsupported_reason(device: torch.device, layout: PageLayout) -> str | None:
    """Why the kernels cannot serve the layout, or None. Compiles them if needed."""
    if device.type != "cpu":
        return f"expected device cpu, got {device.type}"
    if layout.format.codec not in _CODECS:
        return f"expected {', '.join(_CODECS)}, got {layout.format.codec}"
    try:
        load_library()
    except UnsupportedError as error:
        return str(error)
    return None


class Pages:
    """See `sawkv.ops.Pages`."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache, self._described, self._library = cache, _describe(cache), load_library()

    def append(
        self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor, positions: torch.Tensor | None
    ) -> None:
        """See `sawkv.ops.append`."""
        slots = slot_mapping.contiguous()
        arguments = AppendArguments(cache=self._described, k=k.data_ptr(), v=v.data_ptr())
        arguments.k_token_stride, arguments.k_head_stride = _byte_strides(k)
        arguments.v_token_stride, arguments.v_head_stride = _byte_strides(v)
        arguments.slots, arguments.num_slots = slots.data_ptr(), slots.shape[0]
        positions = None if positions is None else positions.contiguous()
        arguments.positions = _address(positions)
        arguments.counters = _address(self._cache.counters)
        arguments.dtype, arguments.num_threads = _DTYPES.index(k.dtype), torch.get_num_threads()
        self._library.sawkv_append(ctypes.byref(arguments))

    def gather(self, prefixes: Prefixes, k_out: torch.Tensor, v_out: torch.Tensor, rotated: bool) -> None:
        """See `sawkv.ops.gather`."""
        seq_lens, cu_seq_lens = prefixes.seq_lens.contiguous(), prefixes.cu_seq_lens.contiguous()
        arguments = GatherArguments(cache=self._described, k=k_out.data_ptr(), v=v_out.data_ptr(), rotated=rotated)
        arguments.block_table, arguments.block_table_stride = _table(prefixes.block_table)
        arguments.seq_lens, arguments.starts = seq_lens.data_ptr(), cu_seq_lens.data_ptr()
        first_positions = None if prefixes.first_positions is None else prefixes.first_positions.contiguous()
        arguments.first_positions = _address(first_positions)
        arguments.k_added, arguments.v_added = map(_address, self._cache.added_by_gather(rotated))
        arguments.max_tokens, arguments.num_seqs = k_out.shape[0], seq_lens.shape[0]
        arguments.dtype, arguments.num_threads = _DTYPES.index(k_out.dtype), torch.get_num_threads()
        self._library.sawkv_gather(ctypes.byref(arguments))


class Attention:
    """See `sawkv.ops.Attention`. A sequence's result has the same bits in every batch."""

    def __init__(self, layer: Layer) -> None:
        num_kv_heads = layer.cache.layout.num_kv_heads
        if layer.num_q_heads > MAX_GROUP * num_kv_heads:
            raise UnsupportedError(
                f"cpu backend: expected at most {MAX_GROUP} query heads a KV head, got"
                f" {layer.num_q_heads // num_kv_heads}"
            )
        self._layer, self._described, self._library = layer, _describe(layer.cache), load_library()

    def __call__(self, q: torch.Tensor, step: Step, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """See `sawkv.ops.Attention.__call__`."""
        layer = self._layer
        seq_lens, query_start_loc = step.seq_lens.contiguous(), step.query_start_loc.contiguous()
        sinks = None if layer.sinks is None else layer.sinks.float().contiguous()
        lse_out = (
            None
            if lse is None
            else lse
            if lse.is_contiguous()
            else torch.empty_like(lse, memory_format=torch.contiguous_format).copy_(lse)
        )
        arguments = AttentionArguments(cache=self._described, q=q.data_ptr(), out=out.data_ptr())
        arguments.q_token_stride, arguments.q_head_stride = _byte_strides(q)
        arguments.out_token_stride, arguments.out_head_stride = _byte_strides(out)
        arguments.block_table, arguments.block_table_stride = _table(step.block_table)
        arguments.seq_lens, arguments.query_start = seq_lens.data_ptr(), query_start_loc.data_ptr()
        arguments.lse, arguments.sinks = _address(lse_out), _address(sinks)
        arguments.num_seqs, arguments.num_q_heads = seq_lens.shape[0], layer.num_q_heads
        arguments.sliding_window = layer.sliding_window
        arguments.softmax_scale, arguments.softcap = layer.softmax_scale, layer.logit_softcap
        arguments.dtype, arguments.num_threads = _DTYPES.index(q.dtype), torch.get_num_threads()
        self._library.sawkv_attention(ctypes.byref(arguments))
        if lse is not None and lse_out is not None and lse_out is not lse:
            lse.copy_(lse_out)


def _describe(cache: PagedKVCache) -> Any:
    """The `Cache` of the kernels. It holds addresses of the cache's tensors, so these must outlive it."""
    layout = cache.layout
    described = Cache(pages=cache.pages.data_ptr(), page_stride=cache.pages.stride(0), num_pages=cache.pages.shape[0])
    described.num_kv_heads, described.head_dim, described.page_size = (
        layout.num_kv_heads,
        layout.head_dim,
        layout.page_size,
    )
    described.meta_bytes = layout.meta_bytes
    described.swizzle_multiplier, described.swizzle_period = layout.swizzle_factors
    described.parts, described.num_buckets = layout.parts, cache.num_buckets
    for target, constants in zip((described.k, described.v), cache.constants, strict=True):
        for field, tensor in constants._asdict().items():
            setattr(target, field, _address(tensor))
    resolved = layout.format
    described.k.codec, described.v.codec = _CODEC_NUMBERS[resolved.k_codec], _CODEC_NUMBERS[resolved.v_codec]
    described.k.row_bytes, described.v.row_bytes = layout.k_row_bytes, layout.v_row_bytes
    described.k.order, described.v.order = layout.k_rotation_order, layout.v_rotation_order
    return described


def _table(block_table: torch.Tensor) -> tuple[int, int]:
    """Address, and entries per row."""
    return block_table.data_ptr(), block_table.stride(0)


def _byte_strides(x: torch.Tensor) -> tuple[int, int]:
    return x.stride(0) * x.element_size(), x.stride(1) * x.element_size()


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
