"""The CUDA kernels' own sources on a CPU (tests/emulator), against the reference: permuted pages, poison, ragged
lengths, random orders of warps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sawkv.kernels import ScheduleShape, cuda
from sawkv.kernels.cuda.queries import QueryShape
from tests import emulator
from tests.conftest import make_batch
from tests.kernel_checks import (
    MAX_LSE_ERROR,
    attend,
    check_append,
    check_attention,
    check_buckets,
    check_gather,
    compare_attention,
    starts_of,
)

PREPARED = {"centered": True, "gained": True}
CAPPED = {"logit_softcap": 5.0, "sinks": torch.ones(8)}
GUARD, MARK = 1 << 20, 77


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Memory behind what a schedule gives kernels to fill. They must leave it as it is."""
    emulator.install(monkeypatch)
    found: list[torch.Tensor] = []
    init = cuda.Schedule.__init__

    def guarded(self: cuda.Schedule, shape: ScheduleShape) -> None:
        init(self, shape)
        for name in ("header", "chunks", "splits", "partials", "partial_stats"):
            own = getattr(self, name)
            memory = torch.cat([own.flatten(), own.new_full((GUARD,), MARK)])
            setattr(self, name, memory[:-GUARD].view(own.shape))
            found.append(memory[-GUARD:])

    monkeypatch.setattr(cuda.Schedule, "__init__", guarded)
    yield found
    assert are_whole(found)


def are_whole(guards: list[torch.Tensor]) -> bool:
    return all(bool((guard == MARK).all()) for guard in guards)


@pytest.mark.parametrize(
    ("format_name", "head_dim", "query_lens", "options"),
    [
        ("int4", 128, [1, 1, 1, 1], {}),
        ("int4", 128, [2, 1, 4, 3], {"page_size": 64, "sliding_window": 100, "group": 7, **PREPARED}),
        # 16 rows of queries
        ("int4", 128, [1, 1, 1, 1], {"page_size": 64, "group": 12}),
        ("int4", 128, [4, 0, 3, 4], {"page_size": 64, "group": 4, **CAPPED, **PREPARED}),
        ("int3v2", 128, [0, 3, 8, 8], {"page_size": 32, **CAPPED, **PREPARED}),
        ("int4v2", 64, [1, 0, 2, 2], {"group": 8}),
        ("int4", 256, [1, 1, 1, 1], {"page_size": 64, "sinks": torch.ones(8), **PREPARED}),
        ("int4", 512, [1, 1, 1, 1], {"logit_softcap": 5.0, **PREPARED}),
        # extend.cu, for the rows of one consumer group and of two
        ("int4", 128, [16, 9, 12, 16], {"sliding_window": 100, **PREPARED}),
        ("int4v2", 128, [3, 0, 17, 40], {"page_size": 64, **CAPPED, **PREPARED}),
        ("int4", 64, [40, 3, 9, 33], {"page_size": 256}),
    ],
)
def test_attention(
    format_name: str, head_dim: int, query_lens: list[int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest sequence is cut, so that its parts are merged, but for a window and for tiles of 128 tokens."""
    headers = cut_for_many_blocks(monkeypatch)
    check_attention("cuda", "cpu", format_name, [5, 0, 33, 1100], query_lens, head_dim=head_dim, **options)
    is_cut = [num_split_chunks > 0 for _, num_split_chunks, *_ in headers]
    assert is_cut == [head_dim > 64 and "sliding_window" not in options] * len(headers)


def cut_for_many_blocks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The header of each schedule that is made from now on."""
    emulator.install(monkeypatch, num_sms=16)
    headers: list[list[int]] = []
    watch_schedules(monkeypatch, lambda schedule: headers.append(schedule.header.tolist()))
    return headers


def watch_schedules(monkeypatch: pytest.MonkeyPatch, see: Callable[[cuda.Schedule], None]) -> None:
    """Call `see` with each schedule that is made from now on."""
    update = cuda.Schedule.update

    def updated(self: cuda.Schedule, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        update(self, seq_lens, query_start_loc)
        see(self)

    monkeypatch.setattr(cuda.Schedule, "update", updated)


@pytest.mark.parametrize("query_len", [1, 16])
def test_a_write_behind_the_partial_results_is_noticed(
    query_len: int, guards: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_for_many_blocks(monkeypatch)
    monkeypatch.setattr(QueryShape, "max_split_chunks", lambda self, num_blocks: 2)
    group = 3  # no other test's, whose schedule would be used again
    check_attention("cuda", "cpu", "int4", [5, 0, 33, 1100], [query_len] * 4, head_dim=128, group=group)
    assert not are_whole(guards)
    guards.clear()


@pytest.mark.parametrize(
    ("format_name", "num_kv_heads", "options"),
    [
        ("int4", 4, {"sliding_window": 1024, **PREPARED}),
        ("int4", 8, {"group": 8, "page_size": 64, "sliding_window": 70, "sinks": torch.ones(64)}),
        ("int3", 4, {"page_size": 32, **PREPARED}),
        ("int2", 6, {"buckets": 2, "logit_softcap": 5.0, **PREPARED}),
        ("int2", 4, {"head_dim": 64, "buckets": 2, "group": 3, **PREPARED}),
    ],
)
def test_short_units_share_chunks(
    format_name: str, num_kv_heads: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one, and of two or four KV heads, whose last tiles are not full."""
    units: list[int] = []

    def see(schedule: cuda.Schedule) -> None:
        partials = schedule.chunks[: int(schedule.header[0]), 7].tolist()
        units.extend(1 << ~partial for partial in partials if partial < 0)

    watch_schedules(monkeypatch, see)
    lengths = [1 + i * 53 % 150 for i in range(16)] + [300, 0, 700, 420, 9]
    check_attention("cuda", "cpu", format_name, lengths, [1] * 21, num_kv_heads=num_kv_heads, **options)
    assert max(units) == (2 if num_kv_heads == 6 or options.get("group") == 8 else 4), units


@pytest.mark.parametrize("query_len", [1, 16])
def test_centers_of_buckets(query_len: int) -> None:
    options = [{"sinks": True, "logit_softcap": 20.0}]
    check_buckets("cuda", "cpu", seq_lens=(60, 2100), query_lens=[query_len] * 2, options=options)


@pytest.mark.parametrize(
    ("format_name", "options"),
    [("int4", PREPARED), ("int4", {"feedback": "kv"}), ("int3v2", {"buckets": 3, **PREPARED})],
)
def test_append(format_name: str, options: dict[str, Any]) -> None:
    check_append("cuda", "cpu", format_name, 128, **options)


def test_gather() -> None:
    check_gather("cuda", "cpu", "int4", [5, 0, 33], head_dim=128, gained=True, exact=False)


def check_orders(query_len: int, num_orders: int, format_name: str = "int4", num_kv_heads: int = 3) -> None:
    """Each of two blocks takes many chunks of one tile, so that all rings go round; at fewer bits, of a tile of each of
    several heads. extend.cu has long ones too: only where they lead far do its dequantizers wait for consumers.
    """
    lengths = [query_len + i * 37 % (23 if i % 3 else 200) for i in range(24 if query_len == 1 else 6)]
    lengths += [] if query_len == 1 else [query_len + 600]
    batch = make_batch(format_name, lengths, num_kv_heads=num_kv_heads)
    starts = starts_of([query_len] * len(lengths), "cpu")
    q = torch.randn(int(starts[-1]) + 1, 4 * num_kv_heads, 128).bfloat16()
    want = attend(batch, q, starts, "reference")
    for _ in range(num_orders):
        compare_attention(attend(batch, q, starts, "cuda"), want, starts, 4 * MAX_LSE_ERROR)


@pytest.mark.parametrize(
    ("query_len", "num_orders", "format_name", "num_kv_heads"),
    [(1, 8, "int4", 3), (1, 8, "int2", 4), (16, 4, "int4", 2), (32, 4, "int4", 2)],
)
def test_orders_of_warps(query_len: int, num_orders: int, format_name: str, num_kv_heads: int) -> None:
    check_orders(query_len, num_orders, format_name, num_kv_heads)


@pytest.mark.parametrize(
    ("query_len", "file", "old", "new", "message"),
    [
        (1, "consumer.cuh", "ptx::wait(&s.tile_full[stage.slot()], stage.phase());", "", "."),
        (1, "consumer.cuh", "__syncwarp();", "", "query rows"),
        (1, "consumer.cuh", "token > last ||", "token > last + 1 ||", "query rows"),
        (1, "scheduler.cuh", "ptx::wait(&s.chunk_empty[slot], turn.phase() ^ 1);", "", "."),
        # docs/lab/2026-11.md, Two producers
        (1, "tiles.cuh", "producers > 1 || ONLY_WAITS", "ONLY_WAITS", "."),
        (1, "producer.cuh", "if ((u32)page >= p.num_pages) break;", "", "a prefetch of other memory"),
        (
            1,
            "merger.cuh",
            "ptx::arrive(&s.results_empty[result.slot()]);",
            "",
            "mbarrier, consumer.cuh:",
        ),
        (16, "dequantizer.cuh", "ptx::wait(&s.values_empty[slot], slot_phase ^ 1);", "", "."),
        (32, "dequantizer.cuh", "ptx::wait(&s.keys_empty[slot], slot_phase ^ 1);", "", "."),
        (16, "extend_consumer.cuh", "ptx::wait_warpgroup<0>();", "", "query rows"),
        (16, "extend_consumer.cuh", "ptx::fence_warpgroup();", "", "extend_consumer.cuh:.* without a fence"),
    ],
)
def test_a_broken_kernel_is_noticed(
    query_len: int, file: str, old: str, new: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_sources = cuda.runtime.read_sources
    assert old in read_sources(file)[file]

    def broken(source_file: str) -> dict[str, str]:
        sources = read_sources(source_file)
        if file in sources and source_file != "schedule.cu":
            sources[file] = sources[file].replace(old, new)
        return sources

    monkeypatch.setattr(cuda.runtime, "read_sources", broken)
    with pytest.raises((AssertionError, emulator.EmulationError), match=message):
        check_orders(query_len, 20)


def test_a_kernel_that_does_not_compile_is_not_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above takes no such error for a fault that was noticed."""
    monkeypatch.setattr(cuda.runtime, "read_sources", lambda file: {file: "none of C++"})
    with pytest.raises(RuntimeError, match=r"append\.cu"):
        emulator.load("append.cu", "sawkv_append", {})
