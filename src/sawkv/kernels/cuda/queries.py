"""How decode.cu and extend.cu split query rows, and the shapes for which extend.cu was measured to be faster."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.format.layout import PageLayout
from sawkv.format.spec import MAX_ROW_DIM

EXTEND_CAPABILITY = (9, 0)
EXTEND_HEAD_DIMS = (64, 128)
MAX_DECODE_QUERY_LEN = 8
SHORT_WINDOW = 1024
"""Tokens of a sliding window up to which chunks of several units were measured to be faster in INT4 too."""
MAX_DECODE_ROWS = 32
"""Query rows per KV head up to which decode.cu is faster than extend.cu."""
TURNS = {64: 1024, 512: 4096, 1024: 16_384}
"""Query rows per KV head up to which extend.cu was measured to be faster than gather.cu and FlashAttention-3, and from
how many tokens in the cache on, with 4 and 8 query heads per KV head. A consumer group has 64 rows. From 8 query heads
on 64 rows are at most MAX_DECODE_QUERY_LEN tokens, which decode.cu serves.
"""


def can_extend(layout: PageLayout, device: torch.device) -> bool:
    """Whether extend.cu runs on the device, which must have warpgroup products."""
    properties = torch.cuda.get_device_properties(device)
    return layout.head_dim in EXTEND_HEAD_DIMS and (properties.major, properties.minor) == EXTEND_CAPABILITY


@dataclass(frozen=True)
class QueryShape:
    """How the query rows of one (sequence, KV head) are split: into groups that each read the pages, row blocks for
    different warps, and tiles of 8 rows. Also how the kernel that serves them is scheduled.

    Attributes:
        chunk_rows: rows of a group.
        units: most of a chunk. A unit is a group of rows and all tokens of its (sequence, KV head).
        kernel: "decode" or "extend".
        max_chunks_per_block: chunks per block if there is much work, in units of unlike lengths.
        tiles_per_chunk: tiles per chunk if blocks get few chunks.
    """

    group: int
    rows: int
    column_tiles: int
    row_blocks: int
    row_groups: int
    chunk_rows: int
    units: int
    kernel: str
    max_chunks_per_block: int
    tiles_per_chunk: int

    @property
    def defines(self) -> dict[str, int]:
        """Macros of attention.cuh and decode.cu."""
        names = ("group", "chunk_rows", "row_groups", "units", "rows", "column_tiles", "row_blocks")
        return {name.upper(): getattr(self, name) for name in names[: 4 if self.kernel == "extend" else None]}

    def max_split_chunks(self, num_blocks: int) -> int:
        """Most chunks of units that schedule.cu cuts into several, whatever their lengths. The shares of all units add
        up to `max_chunks_per_block` for each block at most. Rounding to nearest adds a third of a share at most: one
        below 1.5 is a whole chunk, which does not count.
        """
        return num_blocks * self.max_chunks_per_block * 4 // 3

    @classmethod
    def of(
        cls, group: int, max_query_len: int, head_dim: int, extends: bool, has_short_units: bool = False
    ) -> QueryShape:
        """
        Args:
            extends: whether extend.cu can run.
            has_short_units: whether chunks of several units were measured to be faster.
        """
        total = group * max_query_len
        if extends and max_query_len > MAX_DECODE_QUERY_LEN and total > MAX_DECODE_ROWS:
            rows = 64 if total <= 64 else 128
            return cls(group, rows, 1, 1, -(-total // rows), rows, 1, "extend", 2, 32)
        column_tiles = 1 if total <= 8 or head_dim > 128 else 2
        columns = 8 * column_tiles
        most = 8 if head_dim <= MAX_ROW_DIM else 4  # eight consumer warps, or pairs with half a head each
        row_blocks = 1
        while row_blocks < most and row_blocks * columns < total:
            row_blocks *= 2
        chunk_rows = row_blocks * columns
        row_groups = -(-total // chunk_rows)
        units = 1
        if has_short_units and chunk_rows == 8 and head_dim <= 128:
            units = 4 if total <= 4 else 2  # queries of more would take shared memory from tiles
        return cls(group, min(total, columns), column_tiles, row_blocks, row_groups, chunk_rows, units, "decode", 8, 50)
