"""sawkv: a 4-bit KV cache that serves faster than 16 bits. Implements SAW-INT4, arXiv 2604.19157."""

from sawkv.cache import PagedKVCache
from sawkv.errors import FormatError, LayoutError, SawkvError, UnsupportedError
from sawkv.format.layout import PageLayout
from sawkv.format.spec import CacheFormat
from sawkv.ops import append, decode_attention, gather, make_decode_plan

__version__ = "0.1.0"

__all__ = [
    "CacheFormat",
    "FormatError",
    "LayoutError",
    "PageLayout",
    "PagedKVCache",
    "SawkvError",
    "UnsupportedError",
    "append",
    "decode_attention",
    "gather",
    "make_decode_plan",
]
