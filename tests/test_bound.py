"""Objects that hold what stays from call to call: they see what changes in place, keep nothing alive, and check as
fully as ever.
"""

from __future__ import annotations

import gc
import weakref
from copy import copy, deepcopy
from types import SimpleNamespace

import pytest
import torch

from sawkv import (
    Attention,
    CacheFormat,
    LayoutError,
    PagedKVCache,
    PageLayout,
    Schedule,
    UnsupportedError,
    append,
    prefixes,
)
from sawkv.kernels import Layer, Step, cuda
from tests.conftest import make_batch


def schedule_of(cache: PagedKVCache, num_q_heads: int = 4, max_num_seqs: int = 2) -> Schedule:
    return Schedule(cache.layout, "cpu", num_q_heads=num_q_heads, max_num_seqs=max_num_seqs, max_query_len=1)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_changes_in_place_is_seen(backend: str) -> None:
    """Sinks in 16 bits, which a backend converts, and gains, whose inverse `refresh` makes again."""
    batch = make_batch("int4", [40, 9], gained=True)
    sinks, q = torch.zeros(4, dtype=torch.bfloat16), torch.randn(2, 4, 128)
    attention = Attention(batch.cache, num_q_heads=4, softmax_scale=0.1, sinks=sinks, backend=backend)
    schedule = Schedule(batch.cache.layout, "cpu", num_q_heads=4, max_num_seqs=2, max_query_len=1, backend=backend)
    step = schedule.update(batch.block_table, batch.seq_lens, torch.arange(3, dtype=torch.int32))
    before = attention(q, step)
    sinks.fill_(9.0)
    after = attention(q, step)
    assert (after - before).abs().max() > 0.1
    assert batch.cache.v_gain is not None
    batch.cache.v_gain.mul_(2)
    assert torch.equal(attention(q, step), after)
    batch.cache.refresh()
    torch.testing.assert_close(attention(q, step), after / 2)


def test_pages_are_freed_at_once_and_copies_are_bound_anew() -> None:
    """No cycle keeps pages until garbage is collected, and a copy does not write to the tensors of its original."""
    cache = PagedKVCache.allocate(PageLayout(CacheFormat("int4"), 2, 64, 16), 2)
    rows = torch.randn(2, 5, 2, 64)
    cache.pages.zero_()
    append(rows[0], rows[1], cache, torch.arange(5))
    assert cache.bound
    other = deepcopy(cache)
    assert not other.bound
    assert not copy(cache).bound
    append(rows[0] + 1, rows[1], other, torch.arange(5))
    assert not torch.equal(cache.pages, other.pages)
    pages = weakref.ref(cache.pages)
    gc.disable()
    try:
        del cache
        assert pages() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": torch.zeros(3, 2, 128)},
        {"k": torch.zeros(3, 2, 64, dtype=torch.float64)},
        {"v": torch.zeros(4, 2, 64)},
        {"v": torch.zeros(3, 2, 64, dtype=torch.float16)},
        {"k": torch.zeros(3, 2, 64, device="meta")},
        {"k": torch.zeros(3, 64, 2).transpose(1, 2)},
        {"slot_mapping": torch.zeros(4, dtype=torch.int64)},
        {"slot_mapping": torch.zeros(3, dtype=torch.int32)},
        {"slot_mapping": torch.zeros(6, dtype=torch.int64)[::2]},
    ],
    ids=str,
)
def test_each_call_of_append_is_checked(wrong: dict[str, torch.Tensor]) -> None:
    cache = PagedKVCache.allocate(PageLayout(CacheFormat("int4"), 2, 64, 16), 2)
    attention = Attention(cache, num_q_heads=4, softmax_scale=0.1)
    right = {
        "k": torch.zeros(3, 2, 64),
        "v": torch.zeros(3, 2, 64),
        "slot_mapping": torch.zeros(3, dtype=torch.int64).fill_(-1),
    }
    attention.append(**right)
    with pytest.raises(LayoutError):
        attention.append(**(right | wrong))


def test_gradients_are_refused_where_they_would_be_computed() -> None:
    batch = make_batch("int4", [2])
    attention, starts = Attention(batch.cache, num_q_heads=4, softmax_scale=0.1), torch.tensor([0, 2]).int()
    step, slots = schedule_of(batch.cache).update(batch.block_table, batch.seq_lens, starts), torch.tensor([-1, -1])
    q, k, trained = torch.zeros(2, 4, 128), torch.zeros(2, 2, 128), torch.zeros(2, 2, 128, requires_grad=True)
    for name, call in {
        "q": lambda: attention(q.clone().requires_grad_(), step),
        "k": lambda: attention.append(trained, k, slots),
        "v": lambda: attention.append(k, trained, slots),
    }.items():
        with pytest.raises(UnsupportedError, match=rf"{name}: expected torch.no_grad\(\)"):
            call()
        with torch.no_grad():
            call()


def test_each_call_of_attention_and_gather_is_checked() -> None:
    batch = make_batch("int4", [40, 9])
    attention, schedule = Attention(batch.cache, num_q_heads=4, softmax_scale=0.1), schedule_of(batch.cache)
    starts = torch.arange(3, dtype=torch.int32)
    step = schedule.update(batch.block_table, batch.seq_lens, starts)
    attention(torch.zeros(2, 4, 128), step)
    for q in (
        torch.zeros(2, 6, 128),
        torch.zeros(2, 4, 64),
        torch.zeros(2, 4, 128, dtype=torch.float64),
        torch.zeros(4, 128),
    ):
        with pytest.raises(LayoutError, match="q: expected"):
            attention(q, step)
    for out in (torch.zeros(3, 4, 128), torch.zeros(2, 4, 128).half(), torch.zeros(2, 128, 4).transpose(1, 2)):
        with pytest.raises(LayoutError, match="out: expected"):
            attention(torch.zeros(2, 4, 128), step, out)
    with pytest.raises(LayoutError, match="lse: expected"):
        attention(torch.zeros(2, 4, 128), step, None, torch.zeros(2, 3))
    other = schedule_of(batch.cache, num_q_heads=8).update(batch.block_table, batch.seq_lens, starts)
    with pytest.raises(LayoutError, match="schedule: expected one made for"):
        attention(torch.zeros(2, 4, 128), other)
    for lengths in ((batch.block_table[:1], batch.seq_lens), (batch.block_table, batch.seq_lens.long())):
        with pytest.raises(LayoutError):
            schedule.update(*lengths, starts)
        with pytest.raises(LayoutError):
            prefixes(*lengths, starts)
    with pytest.raises(LayoutError, match="k_out: expected"):
        attention.gather(prefixes(batch.block_table, batch.seq_lens, starts), *torch.zeros(2, 9, 2, 64))


def test_a_wrong_field_of_a_launch_is_an_error() -> None:
    with pytest.raises(AttributeError, match="num_token"):
        cuda.AppendParams().num_token = 1


def test_a_layer_keeps_kernels_for_the_schedules_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes and turns alternate in every step. Older schedules are given up with their memory."""
    kernel = SimpleNamespace(read_constant=lambda name: 0, launch=lambda *a, **b: None)
    loads: list[str] = []
    monkeypatch.setattr(cuda.runtime, "load", lambda source, name, *a: loads.append(name) or kernel)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    batch = make_batch("int4", [40, 9])
    layer = cuda.Attention(Layer(batch.cache, 4, 0.1, 0, 0.0, None))
    q, out = torch.randn(2, 4, 128), torch.empty(2, 4, 128)

    def step() -> Step:
        words = torch.zeros(8, dtype=torch.int32)
        schedule = object.__new__(cuda.Schedule)
        queries = cuda.QueryShape.of(2, 1, 128, False)
        vars(schedule).update(header=words, chunks=words, splits=words, partials=words, partial_stats=words)
        vars(schedule).update(queries=queries, num_blocks=1, units_per_seq=1)
        return Step(batch.block_table, batch.seq_lens, torch.arange(3, dtype=torch.int32), schedule)

    steps = [step() for _ in range(cuda.MAX_SCHEDULES)]
    for _ in range(3):
        for one in steps:
            layer(q, one, out, None)
    assert len(loads) == 2 * len(steps)  # decode and merge
    layer(q, step(), out, None)
    assert {key[0] for key in layer._variants} >= {one.schedule for one in steps[1:]}
    assert steps[0].schedule not in {key[0] for key in layer._variants}
