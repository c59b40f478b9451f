"""What a cache must survive, as checks of any backend on any device: tests/test_faults.py runs them on the CPU,
tests/gpu on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from sawkv import Attention, CacheFormat, PagedKVCache, PageLayout, Schedule, append, decode_attention, gather
from sawkv.format.constants import BUCKET_SIZE
from sawkv.format.counters import COLUMNS, new_counters
from sawkv.format.rotation import rotate
from sawkv.kernels import load_backend
from tests.conftest import Batch, make_batch, relative_error
from tests.kernel_checks import MAX_ERROR, check_buckets, check_gather_of_tails

Check = Callable[[str, str], None]
"""Called with a backend and a device."""

CHECKS: list[Check] = []


def check(function: Check) -> Check:
    """Add a function to `CHECKS`."""
    CHECKS.append(function)
    return function


def attend(batch: Batch, q: torch.Tensor, query_lens: list[int], backend: str, **options: object) -> torch.Tensor:
    """Attention of each sequence's last `query_lens` tokens; rows of no sequence are NaN."""
    starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(q.device)
    out = torch.full_like(q, math.nan)
    arguments: dict[str, object] = {
        "softmax_scale": q.shape[-1] ** -0.5,
        "max_query_len": max(query_lens),
        "out": out,
    } | options
    # type: ignore[arg-type]
    return decode_attention(q, batch.cache, batch.block_table, batch.seq_lens, starts, backend=backend, **arguments)


def slot_of(batch: Batch, sequence: int, position: int) -> torch.Tensor:
    """[1] int64, the slot of one token."""
    size = batch.cache.layout.page_size
    return batch.block_table[sequence, position // size].long()[None] * size + position % size


@check
def non_finite_rows_stay_in_their_token_and_head(backend: str, device: str) -> None:
    """Every output that does not see the row keeps its bits; every one that does is NaN in all channels."""
    for poison in (math.nan, math.inf, -math.inf):
        for which in (0, 1):
            batch = make_batch("int4", [20, 3000, 7], device=device, backend=backend)
            q = torch.randn(12, 8, 128, device=device)
            clean = attend(batch, q, [6, 4, 2], backend)
            rows = torch.randn(2, 1, 2, 128, device=device)
            rows[which, 0, 1, 77] = poison
            # Queries at 14..19: two see it not, four do.
            append(*rows, batch.cache, slot_of(batch, 0, 16), backend=backend)
            dirty = attend(batch, q, [6, 4, 2], backend)
            assert dirty[2:6, 4:].isnan().all()
            dirty[2:6] = clean[2:6] = 0  # the other head's row is new too
            assert torch.equal(dirty, clean)


@check
def bytes_never_written_are_never_used(backend: str, device: str) -> None:
    """Fresh pages, page tails, entries of the block table past a sequence, and a padded batch: bits do not depend on
    them.
    """
    batch = make_batch("int4", [1, 15, 17, 0, 130, 0], device=device, backend=backend)
    q = torch.randn(9, 4, 128, device=device)
    lens = [1, 1, 1, 0, 3, 0]  # sequences of no tokens pad the batch, as under CUDA graphs; rows 6.. pad the tokens
    written = torch.zeros(batch.cache.num_slots, dtype=torch.bool)
    for i, length in enumerate(batch.seq_lens.tolist()):
        written[[int(slot_of(batch, i, position)) for position in range(length)]] = True
    outputs = []
    for fill in (0xFF, 0x00, 0x7C):  # NaN, zero, and infinity or huge values, as fp16
        fresh = PagedKVCache(torch.full_like(batch.cache.pages, fill), batch.cache.layout)
        k, v = (torch.cat(x) for x in (batch.k, batch.v))
        slots = torch.cat([slot_of(batch, i, p) for i, n in enumerate(batch.seq_lens.tolist()) for p in range(n)])
        append(k, v, fresh, slots, backend=backend)
        table = batch.block_table.clone()
        table[batch.block_table == 2**30] = {0xFF: 2**31 - 1, 0x00: -1, 0x7C: 0}[fill]
        outputs.append(attend(Batch(fresh, batch.k, batch.v, table, batch.seq_lens), q, lens, backend))
        keys = torch.full((2, 163, 2, 128), -7.0, device=device)
        gather(
            fresh,
            table,
            batch.seq_lens,
            torch.tensor([0, 1, 16, 33, 33, 163, 163], dtype=torch.int32, device=device),
            *keys,
            backend=backend,
        )
        assert keys.isfinite().all()
    assert outputs[0][:6].isfinite().all()
    assert outputs[0][6:].isnan().all(), "rows of no sequence are left as they are"
    assert torch.equal(outputs[0][:6], outputs[1][:6])
    assert torch.equal(outputs[0][:6], outputs[2][:6])


@check
def padding_of_a_captured_step_is_ignored(backend: str, device: str) -> None:
    """One CUDA graph (on the CPU: one function) serves steps of 1 to 8 sequences; what pads them is NaN, slot -1 and
    length 0.

    Of pages with centers of two buckets and gains, and attention with sinks, which has to know what centers took from
    scores. One sequence comes to its second bucket.
    """
    lengths = [5, 33, 695, BUCKET_SIZE - 2, 2, 18, 2001, 66]
    batch = make_batch("int4", lengths, centered=True, gained=True, buckets=2, device=device, backend=backend)
    spare = set(range(batch.cache.pages.shape[0])) - set(batch.block_table.flatten().tolist())
    batch.block_table[3, BUCKET_SIZE // batch.cache.layout.page_size] = spare.pop()
    copied = replace(batch.cache, pages=batch.cache.pages.clone())
    mirror = Batch(copied, batch.k, batch.v, batch.block_table, batch.seq_lens.clone())
    sinks = torch.randn(8, device=device)
    k, v = torch.zeros(2, 8, 2, 128, device=device)
    q = torch.zeros(8, 8, 128, device=device)
    slots, positions = torch.full((2, 8), -1, device=device)
    seq_lens = torch.zeros(8, dtype=torch.int32, device=device)
    starts = torch.zeros(9, dtype=torch.int32, device=device)
    out = torch.zeros_like(q)
    layout = batch.cache.layout
    attention = Attention(batch.cache, num_q_heads=8, softmax_scale=0.1, sinks=sinks, backend=backend)
    schedule = Schedule(
        layout, batch.cache.pages.device, num_q_heads=8, max_num_seqs=8, max_query_len=1, backend=backend
    )

    def step() -> None:
        attention.append(k, v, slots, positions)
        attention(q, where, out)

    where = schedule.update(batch.block_table, seq_lens, starts)
    run = capture(step) if device == "cuda" else step
    for count in (8, 1, 5, 8, 2):
        for x in (k, v, q):
            x.fill_(math.nan)[:count] = torch.randn(count, *x.shape[1:], device=device)
        slots.fill_(-1)[:count] = torch.cat([slot_of(mirror, i, int(mirror.seq_lens[i])) for i in range(count)])
        positions.fill_(2**62)[:count] = mirror.seq_lens[:count]
        mirror.seq_lens[:count] += 1
        seq_lens.zero_()[:count] = mirror.seq_lens[:count]
        starts.copy_(torch.arange(9).clamp(max=count))
        schedule.update(batch.block_table, seq_lens, starts)
        run()
        append(k[:count], v[:count], mirror.cache, slots[:count], positions[:count], backend="reference")
        want = attend(mirror, q[:count], [1] * count + [0] * (8 - count), "reference", softmax_scale=0.1, sinks=sinks)
        assert torch.equal(batch.cache.pages, mirror.cache.pages)
        assert relative_error(out[:count], want) < MAX_ERROR


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """The replay of a CUDA graph of one call, after a warm-up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@check
def bad_slots_write_nothing(backend: str, device: str) -> None:
    """The pages lie between guard pages; no byte of either changes, whatever the slot, and good slots of the same call
    are written.
    """
    layout = PageLayout(CacheFormat.parse("int4"), 2, 128, 16)
    memory = torch.full(layout.pages_shape(12), 0xAB, dtype=torch.uint8, device=device)
    cache = PagedKVCache(memory[4:8], layout)
    bad = [-1, -16, -(2**31), -(2**40), -(2**63), 64, 65, 127, 2**31 - 1, 2**31, 2**32, 2**32 + 5, 2**40, 2**63 - 1]
    k, v = torch.randn(2, len(bad) + 2, 2, 128, device=device)
    append(k, v, cache, torch.tensor(bad, device=device), backend=backend)
    assert (memory == 0xAB).all()
    append(k, v, cache, torch.tensor([*bad, 3, 63], device=device), backend=backend)
    assert (memory[:4] == 0xAB).all()
    assert (memory[8:] == 0xAB).all()
    changed = (memory[4:8] != 0xAB).flatten(1).any(1)
    assert changed.tolist() == [True, False, False, True]


EXTREME_ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda x: x,
    "zeros": lambda x: x * 0,
    "constant": lambda x: x * 0 + 3.25,
    "denormal": lambda x: x * 1e-40,
    "tiny": lambda x: x * 1e-7,
    "large": lambda x: x * 1e4,
    "channel-0 outlier": lambda x: torch.cat([x[..., :1] * 0 + 1000, x[..., 1:]], -1),
    "negative channel-0 outlier": lambda x: torch.cat([x[..., :1] * 0 - 1000, x[..., 1:]], -1),
    "one huge outlier": lambda x: torch.cat([x[..., :77], x[..., 77:78] * 0 + 1e5, x[..., 78:]], -1),
    "far from zero": lambda x: x + 500,
}


@check
def extreme_rows_keep_the_error_bound(backend: str, device: str) -> None:
    """Half a scale in each rotated channel, the scale being what docs/format.md says, worked out here in fp64."""
    layout = PageLayout(CacheFormat.parse("int4"), 2, 128, 16)
    for name, make in EXTREME_ROWS.items():
        x = make(torch.randn(64, 2, 128, device=device))
        cache = PagedKVCache.allocate(layout, 4, device)
        cache.pages.fill_(0xFF)
        append(x, -x, cache, torch.arange(64, device=device), backend=backend)
        read = torch.empty(2, 64, 2, 128, device=device)
        table, length = (
            torch.arange(4, dtype=torch.int32, device=device)[None],
            torch.tensor([64], dtype=torch.int32, device=device),
        )
        gather(
            cache,
            table,
            length,
            torch.tensor([0, 64], dtype=torch.int32, device=device),
            *read,
            rotated=True,
            backend=backend,
        )
        for got, want in zip(read.double(), (rotate(x, 128).double(), rotate(-x, 128).double()), strict=True):
            low, high, peak = want.amin(-1), want.amax(-1), want.abs().amax(-1)
            scale = (
                torch.maximum(torch.maximum((high - low) / 15, peak / 1024), torch.full_like(peak, 2.0**-24))
                * (1 + 2**-10)
                + 2**-24
            )
            assert ((got - want).abs().amax(-1) <= scale / 2 * 1.001 + peak * 1e-6).all(), name
            if name in ("as it is", "large"):
                assert relative_error(got, want) < 0.11, name


@check
def offsets_beyond_2_31_bytes(backend: str, device: str) -> None:
    """A cache of 5 GB, of which only the used pages are touched, holds what a small one does."""
    small = make_batch("int4", [40, 100], device=device, backend=backend)
    layout = small.cache.layout
    pages = torch.empty(
        layout.pages_shape(5 * 10**9 // (layout.num_kv_heads * layout.span_bytes)), dtype=torch.uint8, device=device
    )
    big = PagedKVCache(pages, layout)
    offset = pages.shape[0] - small.cache.pages.shape[0]
    assert offset * layout.num_kv_heads * layout.span_bytes > 2**32
    table = torch.where(small.block_table < 2**20, small.block_table + offset, small.block_table).int()
    moved = Batch(big, small.k, small.v, table, small.seq_lens)
    for i, (k, v) in enumerate(zip(small.k, small.v, strict=True)):
        append(k, v, big, torch.cat([slot_of(moved, i, position) for position in range(len(k))]), backend=backend)
    q = torch.randn(2, 8, 128, device=device)
    assert torch.equal(attend(moved, q, [1, 1], backend), attend(small, q, [1, 1], backend))
    starts = torch.tensor([0, 40, 140], dtype=torch.int32, device=device)
    read, want = torch.empty(2, 2, 140, 2, 128, device=device)
    gather(big, table, small.seq_lens, starts, *read, backend=backend)
    gather(small.cache, small.block_table, small.seq_lens, starts, *want, backend=backend)
    assert torch.equal(read, want)


@check
def splits_that_see_nothing(backend: str, device: str) -> None:
    """A long sequence is cut in parts; a window, or a short neighbour, leaves some of them empty."""
    batch = make_batch("int4", [1, 9000, 2, 0, 5000], device=device, backend=backend)
    q = torch.randn(10, 4, 128, device=device)
    for window in (0, 1, 7, 1500):
        out, want = (attend(batch, q, [1, 4, 2, 1, 2], name, sliding_window=window) for name in (backend, "reference"))
        assert not out[7].any(), "a query of an empty sequence gives zeros"
        assert relative_error(out, want) < MAX_ERROR


@check
def each_bucket_has_its_own_center(backend: str, device: str) -> None:
    """Of positions: attention of sequences that end within buckets, at their borders and behind the last."""
    check_buckets(backend, device, head_dim=64)
    check_gather_of_tails(backend, device)


@check
def contexts_of_one_and_of_200k_tokens(backend: str, device: str) -> None:
    """Against the reference on the same bytes, together and alone."""
    batch = make_batch("int4", [1, 200_000], head_dim=64, num_kv_heads=1, device=device, backend=backend)
    q = torch.randn(2, 4, 64, device=device) * 2
    together = attend(batch, q, [1, 1], backend)
    assert relative_error(together, attend(batch, q, [1, 1], "reference")) < MAX_ERROR
    for i in range(2):
        alone = Batch(batch.cache, batch.k, batch.v, batch.block_table[i : i + 1], batch.seq_lens[i : i + 1])
        assert relative_error(attend(alone, q[i : i + 1], [1], backend), together[i : i + 1]) < MAX_ERROR


@check
def faults_are_counted(backend: str, device: str) -> None:
    """The counters equal the reference's."""
    if not load_backend(backend).counts:
        return
    layout = PageLayout(CacheFormat.parse("int4"), 2, 128, 16)
    k, v = torch.randn(2, 8192, 2, 128, device=device)
    k[5, 1, 3], v[6, 0, 0], v[7] = math.nan, math.inf, 1e8 * torch.randn(2, 128, device=device)
    slots = torch.randperm(8192 + 100, device=device)[:8192] - 50
    slots[:8] = torch.tensor([-1, 2**40, -7, 8200, -1, 1, 17, 34], device=device)
    slots[8:][torch.isin(slots[8:], slots[:8])] = -1
    results = []
    for name in (backend, "reference"):
        cache = PagedKVCache(
            torch.empty(layout.pages_shape(512), dtype=torch.uint8, device=device),
            layout,
            counters=new_counters(device),
        )
        for part in torch.arange(8192, device=device).split(1000):
            append(k[part], v[part], cache, slots[part], backend=name)
        results.append(cache.counters)
    torch.testing.assert_close(*results, rtol=1e-4, atol=0)
    assert results[0] is not None
    found = dict(zip(COLUMNS, results[0].sum(0).tolist(), strict=True))
    assert (found["non_finite_rows"], found["saturated_rows"]) == (2, 2)
