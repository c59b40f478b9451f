"""How K and V may be stored: in sawkv's pages, or by vLLM in 16 bits or fp8."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from sawkv.capacity.model import Attention, ModelShape
from sawkv.errors import FormatError, UnsupportedError
from sawkv.format.layout import PAGE_SIZE_MULTIPLE, PageLayout, engine_page_size
from sawkv.format.spec import CacheFormat
from sawkv.unserved import RECURRENT, SPECULATION, UNLIKE, WINDOWS, no_newest_tokens

LADDER: Final = ("int8", "int4", "int4v3", "int3", "int3v2", "int2")
"""Formats of `own_caches`: at equal bytes the one with the lower KL (docs/decisions/0027)."""


@dataclass(frozen=True)
class KVCache:
    """How K and V are stored: in `cache_format`, or by vLLM in elements of `element_bytes`.

    Attributes:
        block_size: tokens per block, unless `--block-size` or recurrent states need more.
    """

    name: str
    block_size: int = 16
    element_bytes: int = 0
    cache_format: CacheFormat | None = None

    @classmethod
    def of_format(cls, cache_format: CacheFormat, shape: ModelShape, speculates: bool = False) -> KVCache:
        """A cache in sawkv's pages.

        Raises:
            UnsupportedError: the format does not fit a layer's head_dim, or the model or speculation does not have the
                newest tokens in 16 bits.
        """
        kinds = (
            (any(layer.window for layer in shape.attention), WINDOWS),
            (len({(layer.num_kv_heads, layer.head_dim) for layer in shape.attention}) > 1, UNLIKE),
            (shape.states, RECURRENT),
            (speculates, SPECULATION),
        )
        if cache_format.recent and (reasons := no_newest_tokens(cache_format.recent, kinds)):
            raise UnsupportedError(f"sawkv cannot serve this model: {'; '.join(reasons)}")
        try:
            names = {str(cache_format.resolve(layer.head_dim)) for layer in shape.attention}
        except FormatError as error:
            raise UnsupportedError(f"sawkv cannot serve this model: {error}") from error
        name = names.pop() if len(names) == 1 and not cache_format.recent else str(cache_format)
        return cls(name, engine_page_size(cache_format), cache_format=cache_format)

    @property
    def recent(self) -> int:
        """Newest tokens of a request that are kept in 16 bits too."""
        return 0 if self.cache_format is None else self.cache_format.recent

    def token_bytes(self, layer: Attention, ranks: int) -> int:
        """Bytes of K and V of one token on each of `ranks` GPUs."""
        heads = max(1, layer.num_kv_heads // ranks)
        if self.cache_format is None:
            return heads * 2 * layer.head_dim * self.element_bytes
        cache_format = self.cache_format
        if layer.drafts and cache_format.feeds_back:  # it has the default format of the model's --kv-cache-dtype
            cache_format = CacheFormat("int4")
        of_pages = cache_format.resolve(layer.head_dim)
        return heads * PageLayout(of_pages, 1, layer.head_dim, PAGE_SIZE_MULTIPLE).head_bytes


def own_caches(shape: ModelShape) -> list[KVCache]:
    """Caches in sawkv's pages, most bits first, of the formats that fit all layers."""
    found = []
    for name in LADDER:
        with suppress(UnsupportedError):
            found.append(KVCache.of_format(CacheFormat(name), shape))
    return found


def engine_caches(shape: ModelShape) -> list[KVCache]:
    """vLLM's own caches: 16 bits and fp8."""
    decoder = shape.config.get_text_config(decoder=True)
    dtype = str(getattr(decoder, "dtype", None) or getattr(shape.config, "dtype", None))
    sixteen_bits = "fp16" if dtype in ("torch.float16", "float16") else "bf16"
    return [KVCache(sixteen_bits, element_bytes=2), KVCache("fp8", element_bytes=1)]
