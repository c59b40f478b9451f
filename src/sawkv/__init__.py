"""A 4-bit KV cache for vLLM and Transformers. Implements SAW-INT4, arXiv 2604.19157."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sawkv.cache import PagedKVCache
    from sawkv.errors import FormatError, LayoutError, SawkvError, UnsupportedError
    from sawkv.format.layout import PageLayout
    from sawkv.format.spec import CacheFormat
    from sawkv.ops import Attention, Pages, Schedule, append, decode_attention, gather, prefixes

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "CacheFormat",
    "FormatError",
    "LayoutError",
    "PageLayout",
    "PagedKVCache",
    "Pages",
    "SawkvError",
    "Schedule",
    "UnsupportedError",
    "append",
    "decode_attention",
    "gather",
    "prefixes",
]

_HOMES = {
    "sawkv.cache": ("PagedKVCache",),
    "sawkv.errors": ("FormatError", "LayoutError", "SawkvError", "UnsupportedError"),
    "sawkv.format.layout": ("PageLayout",),
    "sawkv.format.spec": ("CacheFormat",),
    "sawkv.ops": ("Attention", "Pages", "Schedule", "append", "decode_attention", "gather", "prefixes"),
}


def __getattr__(name: str) -> object:
    """Import public names at their first use, so that `sawkv --help` and vLLM's list of plugins do not import torch."""
    for home, names in _HOMES.items():
        if name in names:
            value: object = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
