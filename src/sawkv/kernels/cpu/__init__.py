"""C++ kernels for CPUs, built at first use. Any format, head_dim and query length; see kernels.cpp."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

import torch

from sawkv.cache import Constants, PagedKVCache
from sawkv.errors import UnsupportedError
from sawkv.format.layout import PageLayout
from sawkv.kernels import Layer, Prefixes, Schedule, Step
from sawkv.kernels.cpu.build import load_library

__all__ = ["Attention", "Pages", "Schedule", "counts", "name", "unsupported_reason"]

name = "cpu"
counts = True

MAX_GROUP = 128
_CODECS = ("int4", "int8", "bf16", "fp16", "fp32")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported_reason(device: torch.device, layout: PageLayout) -> str | None:
    """Builds the kernels if that has not been done."""
    if device.type != "cpu":
        return f"expected device cpu, got {device.type}"
    if layout.format.codec not in _CODECS:
        return f"expected {', '.join(_CODECS)}, got {layout.format.codec}"
    try:
        load_library()
    except UnsupportedError as error:
        return str(error)
    return None


class _Cache(Structure):
    _fields_ = (
        ("pages", c_void_p),
        *((field, c_int64) for field in ("page_stride", "num_pages")),
        *((field, c_int32) for field in ("codec", "num_kv_heads", "head_dim", "page_size", "row_bytes", "meta_bytes")),
        *((field, c_int32) for field in ("k_order", "v_order", "swizzle_multiplier", "swizzle_period")),
        *((f"{which}_{field}", c_void_p) for which in "kv" for field in Constants._fields),
    )


class _Append(Structure):
    _fields_ = (
        ("cache", _Cache),
        *((field, c_void_p) for field in ("k", "v")),
        *((field, c_int64) for field in ("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride")),
        *((field, c_void_p) for field in ("slots", "counters")),
        ("num_slots", c_int64),
        *((field, c_int32) for field in ("dtype", "num_threads")),
    )


class _Attention(Structure):
    _fields_ = (
        ("cache", _Cache),
        *((field, c_void_p) for field in ("q", "out")),
        *((field, c_int64) for field in ("q_token_stride", "q_head_stride", "out_token_stride", "out_head_stride")),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        *((field, c_void_p) for field in ("seq_lens", "query_start", "lse", "sinks")),
        *((field, c_int32) for field in ("num_seqs", "num_q_heads", "sliding_window", "dtype", "num_threads")),
        *((field, c_float) for field in ("softmax_scale", "softcap")),
    )


class _Gather(Structure):
    _fields_ = (
        ("cache", _Cache),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        *((field, c_void_p) for field in ("seq_lens", "starts", "k", "v")),
        ("max_tokens", c_int64),
        *((field, c_int32) for field in ("num_seqs", "dtype", "num_threads", "rotated")),
    )


class Pages:
    """See `sawkv.ops.Pages`."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache, self._described, self._library = cache, _describe(cache), load_library()

    def append(self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """See `sawkv.ops.append`."""
        slots = slot_mapping.contiguous()
        arguments = _Append(
            self._described,
            k.data_ptr(),
            v.data_ptr(),
            *_byte_strides(k),
            *_byte_strides(v),
            slots.data_ptr(),
            _address(self._cache.counters),
            slots.shape[0],
            _DTYPES.index(k.dtype),
            torch.get_num_threads(),
        )
        self._library.sawkv_append(ctypes.byref(arguments))

    def gather(self, prefixes: Prefixes, k_out: torch.Tensor, v_out: torch.Tensor, rotated: bool) -> None:
        """See `sawkv.ops.gather`."""
        seq_lens, cu_seq_lens = prefixes.seq_lens.contiguous(), prefixes.cu_seq_lens.contiguous()
        arguments = _Gather(
            self._described,
            prefixes.block_table.data_ptr(),
            prefixes.block_table.stride(0),
            seq_lens.data_ptr(),
            cu_seq_lens.data_ptr(),
            k_out.data_ptr(),
            v_out.data_ptr(),
            k_out.shape[0],
            seq_lens.shape[0],
            _DTYPES.index(k_out.dtype),
            torch.get_num_threads(),
            rotated,
        )
        self._library.sawkv_gather(ctypes.byref(arguments))


class Attention:
    """See `sawkv.ops.Attention`. Results depend on no other sequence of the batch, to the last bit."""

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
        arguments = _Attention(
            self._described,
            q.data_ptr(),
            out.data_ptr(),
            *_byte_strides(q),
            *_byte_strides(out),
            step.block_table.data_ptr(),
            step.block_table.stride(0),
            seq_lens.data_ptr(),
            query_start_loc.data_ptr(),
            _address(lse_out),
            _address(sinks),
            seq_lens.shape[0],
            layer.num_q_heads,
            layer.sliding_window,
            _DTYPES.index(q.dtype),
            torch.get_num_threads(),
            layer.softmax_scale,
            layer.logit_softcap,
        )
        self._library.sawkv_attention(ctypes.byref(arguments))
        if lse is not None and lse_out is not None and lse_out is not lse:
            lse.copy_(lse_out)


def _describe(cache: PagedKVCache) -> _Cache:
    layout = cache.layout
    return _Cache(
        cache.pages.data_ptr(),
        cache.pages.stride(0),
        cache.pages.shape[0],
        _CODECS.index(layout.format.codec),
        layout.num_kv_heads,
        layout.head_dim,
        layout.page_size,
        layout.row_bytes,
        layout.meta_bytes,
        layout.k_rotation_order,
        layout.v_rotation_order,
        *layout.swizzle_factors,
        *(_address(x) for constants in cache.constants for x in constants),
    )


def _byte_strides(x: torch.Tensor) -> tuple[int, int]:
    return x.stride(0) * x.element_size(), x.stride(1) * x.element_size()


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
