"""`schedule.cu`, which cuts a batch into chunks, on a CPU (tests/emulator)."""

from __future__ import annotations

import ctypes
import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sawkv import CacheFormat, PageLayout
from sawkv.kernels import cuda
from sawkv.kernels.cuda import ScheduleParams
from sawkv.kernels.cuda.queries import TURNS, QueryShape
from tests import emulator

NUM_BLOCKS = 132


def schedule(
    lengths: Sequence[int],
    query_lens: Sequence[int] | int = 1,
    *,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    max_query_len: int = 1,
    window: int = 0,
    extends: bool = False,
    has_short_units: bool = False,
) -> list[int]:
    """Tiles of each chunk, in the order of the schedule. All tiles of all units are in one chunk each, and a unit's
    chunks are neighbours.
    """
    group, num_kv_heads = heads[0] // heads[1], heads[1]
    queries = QueryShape.of(group, max_query_len, head_dim, extends, has_short_units)
    query_lens = [query_lens] * len(lengths) if isinstance(query_lens, int) else query_lens
    starts = [sum(query_lens[:i]) for i in range(len(lengths) + 1)]
    most_splits = queries.max_split_chunks(NUM_BLOCKS)
    room = most_splits + len(lengths) * num_kv_heads * queries.row_groups + NUM_BLOCKS
    arrays = [
        (ctypes.c_int * len(values))(*values)
        for values in (lengths, starts, [-1] * 8, [-1] * 8 * room, [-1] * 8 * (most_splits // 2))
    ]
    kernel = emulator.load("schedule.cu", "sawkv_schedule", {"HEAD_DIM": head_dim})
    tile_tokens = kernel.read_constant("sawkv_tile_tokens")
    params = ScheduleParams(
        *map(ctypes.addressof, arrays),
        len(lengths),
        num_kv_heads,
        group,
        queries.chunk_rows,
        queries.row_groups,
        tile_tokens,
        queries.tiles_per_chunk,
        window,
        NUM_BLOCKS,
        queries.max_chunks_per_block,
        queries.units,
    )
    kernel.launch((1, 1, 1), 1024, 0, params)
    num_chunks, num_split_chunks, num_split_units, claimed, total = arrays[2][:5]
    assert claimed == 0
    assert num_split_chunks <= most_splits
    assert num_chunks + NUM_BLOCKS <= room
    assert num_split_units <= most_splits // 2
    chunks = [arrays[3][8 * i : 8 * i + 8] for i in range(num_chunks)]
    units, sizes = defaultdict(list), []
    for i, (sequence, unit, first, count, length, start, query_len, partial) in enumerate(chunks):
        assert (length, start, query_len) == (lengths[sequence], starts[sequence], query_lens[sequence])
        assert count > 0
        num_units = 1 if i < num_split_chunks else 1 << ~partial
        assert partial == i if i < num_split_chunks else num_units <= queries.units
        sizes.append(count * num_units)
        for n in range(unit, unit + num_units):
            units[sequence, n].append((first, count, i))
    wanted: dict[tuple[int, int], tuple[int, int]] = {}
    for sequence, (length, query_len) in enumerate(zip(lengths, query_lens, strict=True)):
        if query_len > 0 and length >= 0:
            begin = max(0, length - query_len - window + 1) // tile_tokens if window else 0
            end = max(begin + 1, -(-length // tile_tokens))
            groups = min(-(-query_len * group // queries.chunk_rows), queries.row_groups)
            wanted |= {(sequence, unit): (begin, end) for unit in range(num_kv_heads * groups)}
    assert set(units) == set(wanted)
    assert total == sum(end - begin for begin, end in wanted.values())
    splits = {}
    for i in range(num_split_units):
        unit, start, query_len, first_chunk, count = arrays[4][8 * i : 8 * i + 5]
        splits[first_chunk] = unit, start, query_len, count
    for (sequence, unit), (begin, end) in wanted.items():
        at = begin
        for first, count, _ in units[sequence, unit]:
            assert first == at
            at += count
        assert at == end
        numbers = [i for _, _, i in units[sequence, unit]]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        if len(numbers) > 1:
            assert splits.pop(numbers[0]) == (unit, starts[sequence], query_lens[sequence], len(numbers))
    assert not splits
    return sizes


@pytest.mark.parametrize(
    ("lengths", "options", "chunks"),
    [
        # What an H200 was fastest with, of 1 to 17 pieces per unit
        ([16384] * 32, {}, 256),
        ([16384] * 64, {}, 512),
        ([16384] * 32, {"heads": (16, 2)}, 128),
        ([16384] * 32, {"heads": (28, 4)}, 128),
        ([16384] * 8, {}, 128),
        ([131072], {}, 128),
        ([32768], {}, 128),
        ([1024] * 256, {}, 2048),
        ([1024] * 256, {"has_short_units": True}, 1024),  # of two units each
        ([256] * 512, {"has_short_units": True}, 1024),  # of four
        ([1024] * 256, {"has_short_units": True, "heads": (8, 1)}, 256),
        ([1024], {}, 16),
        ([16384] * 32, {"heads": (16, 2), "head_dim": 256}, 128),
        ([16384] * 32, {"heads": (16, 2), "head_dim": 512}, 128),
    ],
)
def test_equal_units_are_cut_into_few_pieces(lengths: list[int], options: dict[str, Any], chunks: int) -> None:
    assert len(schedule(lengths, **options)) == chunks


@pytest.mark.parametrize("num_seqs", [33, 34, 40, 47, 65, 100, 131, 200])
def test_equal_units_fill_the_blocks(num_seqs: int) -> None:
    """Blocks that take the chunks in order end within a sixth of the mean, though no two sequences may be equal."""
    tiles = schedule([16384 + 64 * (i % 9) for i in range(num_seqs)])
    ends = [0.0] * NUM_BLOCKS
    for count in tiles:
        first = min(range(NUM_BLOCKS), key=ends.__getitem__)
        ends[first] += count
    assert max(ends) < 1.17 * sum(ends) / NUM_BLOCKS


def test_unlike_units_are_cut_by_length() -> None:
    tiles = schedule([120_000, *[1000] * 127])
    assert max(tiles) < 1.5 * sum(tiles) / NUM_BLOCKS / 2


def test_batches_of_all_kinds() -> None:
    """Empty sequences, negative lengths, more than a block has threads, windows, several tokens."""
    draw = random.Random(0)
    schedule([])
    schedule([0, -5], [1, 1])
    schedule([500] * 400)
    for _ in range(8):
        count, most = draw.choice([1, 3, 40, 300]), draw.choice([100, 5000, 100_000])
        max_query_len = draw.choice([1, 4, 8, 16, 128])
        lengths = [draw.choice([0, -1, most, draw.randrange(most)]) for _ in range(count)]
        query_lens = [draw.randrange(max_query_len + 1) if length > 8 else 1 for length in lengths]
        schedule(
            lengths,
            query_lens,
            heads=draw.choice([(32, 8), (8, 8), (96, 8), (16, 1)]),
            head_dim=draw.choice([64, 128, 256, 512]),
            max_query_len=max_query_len,
            window=draw.choice([0, 0, 1000]),
            extends=True,
        )


@pytest.mark.parametrize(("max_query_len", "extends"), [(1, False), (8, False), (16, True), (128, True)])
def test_partial_results_have_room(max_query_len: int, extends: bool) -> None:
    """However many tiles a block gets: `schedule` compares the chunks with the memory for their partial results."""
    for length in (1024, 4096, 8192, 32_768):
        for num_seqs in (*range(1, 20), 32, 64):
            schedule([length] * num_seqs, max_query_len, max_query_len=max_query_len, extends=extends)


def test_the_room_for_partial_results_is_needed() -> None:
    """Units whose shares of the chunks are rounded up from 1.5 take nearly all of it."""
    room = QueryShape.of(4, 1, 128, False).max_split_chunks(NUM_BLOCKS)
    num_seqs = room // 2 // 8  # of 8 units with two chunks each
    lengths = [64 * tiles for tiles in (*[100] * (num_seqs - 2), 120)]  # one is longer, so they are not alike
    assert 0.98 * room < len(schedule(lengths)) <= room


@pytest.mark.parametrize(
    ("group", "query_lens"),
    [(1, (64, 1024)), (4, (16, 256)), (7, (9, 146)), (8, (8, 128)), (64, (1, 8, 16)), (128, (8,)), (2000, ())],
)
def test_turns_have_few_schedules(group: int, query_lens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all turns whose query rows are split alike."""
    emulator.install(monkeypatch)
    layout = PageLayout(CacheFormat("int4"), 2, 128, 64)
    turns = cuda.Schedule.turns(layout, torch.device("cuda", 0), 2 * group)
    assert turns is not None
    assert turns.query_lens == query_lens
    assert turns.limits == tuple((rows // group, least) for rows, least in TURNS.items() if rows >= group)
    for most, _ in turns.limits:
        own, shared = (QueryShape.of(group, n, 128, True) for n in (most, next(n for n in query_lens if n >= most)))
        assert (own.kernel, own.chunk_rows) == (shared.kernel, shared.chunk_rows)


def test_long_chunks_come_first() -> None:
    """Of short units several are a chunk, which is then no longer than those before."""
    tiles = schedule([300, 9000, 700, 40_000, 5000, 64, 12_000, 2000] * 8, has_short_units=True)
    whole = next(i for i in range(1, len(tiles)) if tiles[i] > tiles[i - 1] + 1)
    long = [count for count in tiles[whole:] if count > 32]
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(long))
    assert sorted(set(tiles[whole + len(long) :])) == [4, 20, 22, 32]
