"""Byte offsets within a page. docs/format.md specifies them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sawkv.errors import FormatError
from sawkv.format.constants import SEGMENT_BYTES
from sawkv.format.spec import CODEC_BITS, MAX_ROW_DIM, CacheFormat, ResolvedFormat

PAGE_SIZE_MULTIPLE = 16
ENGINE_PAGE_SIZE = 64
"""The page size that engines are asked for: docs/decisions/0009-page-size.md."""
RECENT_PAGE_SIZE = PAGE_SIZE_MULTIPLE
"""Tokens in 16 bits that take the place of a page, where a format keeps the newest ones."""
GPU_PAGE_SIZES = (16, 32, 64, 128, 256)
"""Page sizes that the fastest GPU kernels take. Engines cut larger blocks into these."""


@dataclass(frozen=True, init=False)
class PageLayout:
    """Shape and byte offsets of the pages of one layer.

    Attributes:
        format: the constructor takes any `CacheFormat`, and resolves it.
        num_kv_heads: KV heads on this rank.
        head_dim: channels per head.
        page_size: tokens per page, a multiple of 16.

    Raises:
        FormatError: the values do not fit together.
    """

    format: ResolvedFormat
    num_kv_heads: int
    head_dim: int
    page_size: int

    def __init__(self, format: CacheFormat, num_kv_heads: int, head_dim: int, page_size: int) -> None:
        resolved = format.resolve(head_dim)
        if format.recent:
            raise FormatError(
                f"pages: expected a format without -r{format.recent}, as they hold all tokens, got {format}"
            )
        if page_size <= 0 or page_size % PAGE_SIZE_MULTIPLE:
            raise FormatError(f"page_size: expected a positive multiple of {PAGE_SIZE_MULTIPLE}, got {page_size}")
        if num_kv_heads <= 0:
            raise FormatError(f"num_kv_heads: expected at least 1, got {num_kv_heads}")
        vars(self).update(format=resolved, num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size)

    @property
    def k_rotation_order(self) -> int:
        return self.format.k_rotation_order

    @property
    def v_rotation_order(self) -> int:
        return self.format.v_rotation_order

    @cached_property
    def parts(self) -> int:
        """Rows per head: 1, or 2 at head_dim 512."""
        return -(-self.head_dim // MAX_ROW_DIM)

    @cached_property
    def rows(self) -> PageLayout:
        """The layout of the same bytes, with one head per row. Part p of head h is head h * parts + p."""
        if self.parts == 1:
            return self
        return PageLayout(self.format, self.num_kv_heads * self.parts, self.head_dim // self.parts, self.page_size)

    @cached_property
    def k_row_bytes(self) -> int:
        """Bytes of the codes of one row of K."""
        return self.head_dim // self.parts * CODEC_BITS[self.format.k_codec] // 8

    @cached_property
    def v_row_bytes(self) -> int:
        """Bytes of the codes of one row of V."""
        return self.head_dim // self.parts * CODEC_BITS[self.format.v_codec] // 8

    @cached_property
    def meta_bytes(self) -> int:
        """Bytes of one row's scale and zero point: 4, or 0 for formats without them."""
        return 4 if self.format.quantized else 0

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one row of K and one of V."""
        return self.k_row_bytes + self.v_row_bytes + 2 * self.meta_bytes

    @cached_property
    def head_bytes(self) -> int:
        """Bytes of K and V of one token and one KV head."""
        return self.parts * self.token_bytes

    @cached_property
    def k_meta_offset(self) -> int:
        return self.page_size * self.k_row_bytes

    @cached_property
    def v_codes_offset(self) -> int:
        return self.page_size * (self.k_row_bytes + self.meta_bytes)

    @cached_property
    def v_meta_offset(self) -> int:
        return self.v_codes_offset + self.page_size * self.v_row_bytes

    @cached_property
    def span_bytes(self) -> int:
        """Bytes of one KV head in one page, or of one part of a head."""
        return self.page_size * self.token_bytes

    @cached_property
    def swizzle_factors(self) -> tuple[int, int]:
        """`(multiplier, period)` of the order of V's segments: `swizzle(t) = (t * multiplier // 8) % period`. Period 1
        keeps their order.
        """
        segments, rest = divmod(self.v_row_bytes, SEGMENT_BYTES)
        if rest:
            return 0, 1
        period = min(segments & -segments, 8)
        return segments // (segments & -segments) * period, period

    def swizzle(self, offset: int) -> int:
        """The number that V's segment index is XORed with, for the token at `offset` of a page."""
        multiplier, period = self.swizzle_factors
        return (offset * multiplier // 8) % period

    def pages_shape(self, num_pages: int) -> tuple[int, int, int, int]:
        """Shape of the uint8 tensor that holds `num_pages` pages."""
        return num_pages, self.num_kv_heads * self.parts, self.page_size, self.token_bytes


def least_page_size(codec: str, head_dim: int, kept_in: str) -> int:
    """Fewest tokens of a page in whose bytes `RECENT_PAGE_SIZE` tokens fit as the codec `kept_in` stores them."""
    own, kept = (PageLayout(CacheFormat(each), 1, head_dim, PAGE_SIZE_MULTIPLE).head_bytes for each in (codec, kept_in))
    return PAGE_SIZE_MULTIPLE * -(-kept * RECENT_PAGE_SIZE // (own * PAGE_SIZE_MULTIPLE))


def engine_page_size(cache_format: CacheFormat) -> int:
    """The page size that engines are asked for, whatever the head_dim is."""
    if not cache_format.recent:
        return ENGINE_PAGE_SIZE
    least = max(least_page_size(cache_format.codec, head_dim, "bf16") for head_dim in (64, MAX_ROW_DIM))
    return next(size for size in GPU_PAGE_SIZES if size >= max(ENGINE_PAGE_SIZE, least))
