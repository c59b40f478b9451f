"""What `append` counts: against what was written, counted independently, and alike on every backend."""

from __future__ import annotations

import math

import pytest
import torch

from sawkv import CacheFormat, LayoutError, PagedKVCache, PageLayout, append, gather
from sawkv.format.constants import SAMPLE
from sawkv.format.counters import COLUMNS, is_sampled, new_counters
from sawkv.format.rotation import rotate
from tests.conftest import relative_error
from tests.kernel_checks import random_feedback

PAGES = 1200  # enough slots for some twenty sampled ones
BAD_SLOTS = torch.tensor([1, 17, 34, 51, 68])  # not sampled


def counting_cache(format_name: str, head_dim: int = 64, *, fed_back: bool = False) -> PagedKVCache:
    layout = PageLayout(CacheFormat.parse(format_name), 2, head_dim, 16)
    pages = torch.full(layout.pages_shape(PAGES), 0xFF, dtype=torch.uint8)
    center = torch.randn(2, head_dim)
    feedbacks = [random_feedback(2, head_dim, "cpu") if fed_back else None for _ in range(2)]
    return PagedKVCache(
        pages, layout, k_center=center, k_feedback=feedbacks[0], v_feedback=feedbacks[1], counters=new_counters("cpu")
    )


def column(cache: PagedKVCache, name: str) -> list[float]:
    """K's and V's."""
    assert cache.counters is not None
    values: list[float] = cache.counters[:, COLUMNS.index(name)].tolist()
    return values


def test_a_slot_in_1024_is_sampled_in_any_range_and_at_any_offset() -> None:
    for first in (0, 2**31 - 2**19, 2**40):
        sampled = is_sampled(torch.arange(first, first + 2**20))
        assert abs(int(sampled.sum()) - 2**20 / SAMPLE) < 40
    offsets = torch.arange(2**20)[is_sampled(torch.arange(2**20))] % 16
    assert offsets.bincount(minlength=16).min() > 32


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("format_name", "fed_back"), [("int4", False), ("int4", True), ("int8", False), ("fp16-k16-v16", False)]
)
def test_counts_are_those_of_the_rows_written(format_name: str, fed_back: bool, backend: str) -> None:
    cache = counting_cache(format_name, fed_back=fed_back)
    slots = torch.randperm(PAGES * 16 + 500)[: PAGES * 16] - 250  # some are out of range on either side
    k, v = torch.randn(2, PAGES * 16, 2, 64) + 2
    k[3, 0, 5], k[5, 1, 6], v[7] = math.nan, math.inf, -math.inf
    k[9], v[11, 1] = 1e8 * torch.randn(2, 64), 1e8 * torch.randn(64)
    slots[torch.isin(slots, BAD_SLOTS)] = -1
    slots[[3, 5, 7, 9, 11]] = BAD_SLOTS
    kept = (slots >= 0) & (slots < PAGES * 16)
    for part in torch.arange(PAGES * 16).split(7001):  # several calls add up
        append(k[part], v[part], cache, slots[part], backend=backend)
    assert column(cache, "rows") == [2 * int(kept.sum())] * 2
    if format_name == "fp16-k16-v16":  # what does not fit the type is stored as infinity
        assert column(cache, "non_finite_rows") == [4, 3]
        assert column(cache, "saturated_rows") == [0, 0]
    else:
        assert column(cache, "non_finite_rows") == [2, 2]
        assert column(cache, "saturated_rows") == [2, 1]

    # Independently: read all back, un-rotated, where squared errors and norms are the same.
    used = kept & is_sampled(slots)
    assert not torch.isin(slots[used], BAD_SLOTS).any()
    assert 8 < int(used.sum()) < 40
    assert column(cache, "sampled_rows") == [2 * int(used.sum())] * 2
    read = torch.empty(2, PAGES * 16, 2, 64)
    tables = torch.arange(PAGES, dtype=torch.int32)[None], torch.tensor([PAGES * 16], dtype=torch.int32)
    gather(cache, *tables, torch.tensor([0, PAGES * 16], dtype=torch.int32), *read, rotated=False, backend="reference")
    for line, (x, center) in enumerate(((k, cache.k_center), (v, 0))):
        error, norm = read[line][slots[used]] - x[used], x[used] - center  # type: ignore[operator]
        assert column(cache, "squared_error")[line] == pytest.approx(float(error.double().square().sum()), rel=1e-3)
        assert column(cache, "squared_norm")[line] == pytest.approx(float(norm.double().square().sum()), rel=1e-5)
        if fed_back:  # codes that are moved far err by more than half a scale
            assert column(cache, "squared_error")[line] > 0.1 * column(cache, "squared_norm")[line]


def test_the_sampled_error_is_that_of_the_format() -> None:
    cache = counting_cache("int4", 128)
    k = torch.randn(PAGES * 16, 2, 128) * torch.rand(128).add(0.1)
    append(k, k, cache, torch.arange(PAGES * 16))
    sampled = (column(cache, "squared_error")[1] / column(cache, "squared_norm")[1]) ** 0.5
    rows = rotate(k, 128)
    whole = relative_error(read_v(cache), rows)
    assert sampled == pytest.approx(whole, rel=0.05)


def read_v(cache: PagedKVCache) -> torch.Tensor:
    out = torch.empty(2, PAGES * 16, 2, cache.layout.head_dim)
    length = torch.tensor([PAGES * 16], dtype=torch.int32)
    gather(
        cache,
        torch.arange(PAGES, dtype=torch.int32)[None],
        length,
        torch.tensor([0, PAGES * 16], dtype=torch.int32),
        *out,
    )
    return out[1]


def test_counting_changes_no_byte_and_wrong_counters_are_refused() -> None:
    counted = counting_cache("int4")
    plain = PagedKVCache(counted.pages.clone(), counted.layout, k_center=counted.k_center)
    k, v = torch.randn(2, 300, 2, 64)
    for cache in (counted, plain):
        append(k, v, cache, torch.arange(300))
    assert torch.equal(counted.pages, plain.pages)
    assert counted.fingerprint() == plain.fingerprint()
    for wrong in (torch.zeros(2, 6), torch.zeros(6, 2, dtype=torch.float64).T, torch.zeros(2, 5, dtype=torch.float64)):
        with pytest.raises(LayoutError, match=r"counters: expected contiguous float64 \[2, 6\]"):
            PagedKVCache(plain.pages, plain.layout, counters=wrong)
