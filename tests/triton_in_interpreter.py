"""The Triton kernels in Triton's interpreter, on the CPU. `test_triton_backend.py` runs this file with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import sawkv.kernels.triton as triton_backend
from sawkv import Attention, CacheFormat, LayoutError, PagedKVCache, PageLayout, Schedule, append
from sawkv.format.constants import BUCKET_SIZE
from sawkv.format.counters import is_sampled, new_counters
from sawkv.kernels import unsupported_reason
from tests import faults
from tests.conftest import make_batch
from tests.kernel_checks import (
    attend,
    check_append,
    check_attention,
    check_buckets,
    check_feedback_ends_where_scales_saturate,
    check_gather,
    check_gather_of_tails,
    check_wrong_feedback_is_noticed,
    compare_attention,
    random_feedback,
    starts_of,
)
from tests.newest_checks import check_newest

# numpy warns of what GPUs do silently
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

SEQ_LENS = [1, 0, 16, 17, 130]
QUERY_LENS = [1, 1, 8, 2, 5]


@pytest.fixture(autouse=True)
def _fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds for each, whatever its size."""
    for name in ("ROTATE_TOKENS", "COPY_TOKENS", "FEEDBACK_TOKENS", "PREPARE_ROWS"):
        monkeypatch.setattr(triton_backend, name, 64)
    monkeypatch.setattr(triton_backend, "CHUNKS_PER_SM", 8)


def test_the_kernels_are_interpreted() -> None:
    """All else here would be vacuous if they were not."""
    assert unsupported_reason("triton", torch.device("cpu"), PageLayout(CacheFormat("int4"), 1, 128, 16)) is None


@pytest.mark.parametrize(
    ("format_name", "head_dim"),
    [
        *itertools.product(("int4", "int8", "bf16"), (64, 80, 96, 128, 192)),
        ("fp16-k16-v16", 128),
        ("int4-k0-v16", 64),
        ("int4-k0-v16", 192),
        ("int3", 64),
        ("int3v2", 96),
        ("int2", 80),
        ("int2", 128),
        ("int4v3-k64-v0", 192),
    ],
)
def test_append(format_name: str, head_dim: int) -> None:
    check_append("triton", "cpu", format_name, head_dim, centered=head_dim == 96, gained=head_dim in (80, 96))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_append_of_other_dtypes(dtype: torch.dtype) -> None:
    check_append("triton", "cpu", "int4", 128, page_size=16, dtype=dtype, centered=True, gained=True)


@pytest.mark.parametrize(
    ("format_name", "head_dim", "dtype", "feedback"),
    [
        ("int4", 64, torch.float32, "k"),
        ("int4", 80, torch.bfloat16, "v"),
        ("int3v2", 96, torch.float32, "kv"),
        ("int4", 112, torch.bfloat16, "kv"),
        ("int4", 128, torch.bfloat16, "kv"),
        ("int2", 128, torch.float16, "v"),
        ("int4", 192, torch.float32, "k"),
        ("int4", 256, torch.bfloat16, "kv"),
    ],
)
def test_append_with_feedback(format_name: str, head_dim: int, dtype: torch.dtype, feedback: str) -> None:
    check_append(
        "triton",
        "cpu",
        format_name,
        head_dim,
        dtype=dtype,
        centered=head_dim == 96,
        gained=head_dim >= 112,
        feedback=feedback,
        buckets=3,
    )


def test_a_center_per_bucket() -> None:
    """The window leaves out most tiles, which take long here."""
    options = [{"sliding_window": 70, "sinks": True}]
    lengths = [1, BUCKET_SIZE + 30]
    check_buckets("triton", "cpu", head_dim=64, group=2, seq_lens=lengths, query_lens=[1, 3], options=options)
    check_gather_of_tails("triton", "cpu")


def test_wrong_feedback_is_noticed() -> None:
    check_wrong_feedback_is_noticed("triton", "cpu")


def test_feedback_ends_where_scales_saturate() -> None:
    check_feedback_ends_where_scales_saturate("triton", "cpu")


@pytest.mark.parametrize("head_dim", [80, 128])
def test_the_error_that_is_counted_is_that_of_moved_codes(head_dim: int) -> None:
    layout, feedback = PageLayout(CacheFormat("int4"), 2, head_dim, 16), random_feedback(2, head_dim, "cpu")
    slots = torch.arange(1200 * 16)
    slots = slots[is_sampled(slots)]
    k, v = torch.randn(2, len(slots), 2, head_dim)
    k[0, 1, 3], v[1, 0, 5] = torch.nan, 1e9
    counters = []
    for backend, used in (("triton", feedback), ("reference", feedback), ("reference", None)):
        pages = torch.zeros(layout.pages_shape(1200), dtype=torch.uint8)
        cache = PagedKVCache(pages, layout, k_feedback=used, v_feedback=used, counters=new_counters("cpu"))
        append(k, v, cache, slots, backend=backend)
        counters.append(cache.counters)
    got, want, without = counters
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert (want[:, 3] > 2 * without[:, 3]).all(), "the control"


@pytest.mark.parametrize(
    ("format_name", "head_dim"),
    [
        ("int4", 64),
        ("int4", 112),
        ("int8", 112),
        ("bf16", 64),
        ("fp16-k16-v16", 112),
        ("int4v3", 64),
        ("int3", 96),
        ("int2", 64),
    ],
)
def test_attention(format_name: str, head_dim: int) -> None:
    check_attention(
        "triton",
        "cpu",
        format_name,
        SEQ_LENS,
        QUERY_LENS,
        head_dim=head_dim,
        centered=head_dim == 64,
        gained=format_name != "int8",
    )


@pytest.mark.parametrize(
    ("format_name", "head_dim", "page_size"),
    [
        ("int4", 80, 32),
        ("int3v2", 96, 128),
        ("int4", 128, 64),
        ("int2", 192, 16),
        ("int4", 256, 48),
        ("int4", 512, 32),
    ],
)
def test_attention_of_other_shapes(format_name: str, head_dim: int, page_size: int) -> None:
    options = {"head_dim": head_dim, "page_size": page_size}
    check_attention("triton", "cpu", format_name, [5, 150], [1, 2], **options, centered=True, gained=True)


@pytest.mark.parametrize(("group", "query_len"), [(1, 1), (5, 1), (7, 2), (12, 1), (16, 5)])
def test_query_shapes(group: int, query_len: int) -> None:
    check_attention("triton", "cpu", "int4", [150, 9], [query_len, query_len], group=group)


@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1], [1, 1, 4, 3]])
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 5},
        {"sliding_window": 70},
        {"logit_softcap": 2.0},
        {"sinks": True},
        {"logit_softcap": 2.0, "sinks": True},
    ],
)
def test_window_softcap_and_sinks(query_lens: list[int], options: dict[str, object]) -> None:
    if "sinks" in options:
        options = options | {"sinks": torch.randn(8).bfloat16()}
    check_attention(
        "triton", "cpu", "int4", [1, 0, 40, 300], query_lens, dtype=torch.float16, centered=True, gained=True, **options
    )


def test_long_sequences_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into several chunks; with more sequences, and more chunks, than the schedule and the merge take at once."""
    monkeypatch.setattr(triton_backend, "SCHEDULE_BLOCK", 4)
    monkeypatch.setattr(triton_backend, "MERGE_ELEMENTS", 128)
    monkeypatch.setattr(triton_backend, "MIN_TILES_PER_CHUNK", 1)
    check_attention("triton", "cpu", "int4", [3, 900, 64, 0, 400, 1, 65], [1, 2, 1, 1, 1, 0, 1], group=1, head_dim=64)


def test_one_schedule_serves_batches_of_any_lengths() -> None:
    layout = PageLayout(CacheFormat.parse("int4-k64-v64"), 2, 64, 16)
    schedule = Schedule(layout, "cpu", num_q_heads=8, max_num_seqs=3, max_query_len=2, backend="triton")
    for seq_lens, query_lens in (([300, 2, 40], [1, 2, 2]), ([0, 700], [0, 1]), ([5], [2])):
        batch, starts = make_batch("int4", seq_lens, head_dim=64), starts_of(query_lens, "cpu")
        q = torch.randn(int(starts[-1]), 8, 64).bfloat16()
        attention = Attention(batch.cache, num_q_heads=8, softmax_scale=64**-0.5, backend="triton")
        step, lse = schedule.update(batch.block_table, batch.seq_lens, starts), torch.full((len(q), 8), math.nan)
        got = attention(q, step, torch.full_like(q, math.nan), lse), lse
        compare_attention(got, attend(batch, q, starts, "reference"), starts)
    with pytest.raises(LayoutError, match="at most 3 sequences"):
        schedule.update(
            torch.ones(4, 1, dtype=torch.int32), torch.ones(4, dtype=torch.int32), torch.arange(5, dtype=torch.int32)
        )
    for other in (
        Attention(batch.cache, num_q_heads=8, softmax_scale=0.1, sliding_window=9, backend="triton"),
        Attention(batch.cache, num_q_heads=8, softmax_scale=0.1, backend="cpu"),
    ):
        with pytest.raises(LayoutError, match="expected one made for this layout"):
            other(q, step)


def test_a_broken_page_is_noticed() -> None:
    """The control: one swapped pair of nibbles in the cache."""
    batch = make_batch("int4", [40], head_dim=64)
    starts, q = starts_of([1], "cpu"), torch.randn(1, 8, 64).bfloat16()
    want = attend(batch, q, starts, "reference")
    page = batch.cache.pages[int(batch.block_table[0, 1])]
    page[:] = page >> 4 | page << 4
    with pytest.raises(AssertionError):
        compare_attention(attend(batch, q, starts, "triton"), want, starts)


@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_stays_in_its_own_token_and_head(which: str) -> None:
    batch = make_batch("int4", [20, 300], head_dim=64)
    k, v = torch.randn(2, 1, 2, 64)
    (k if which == "k" else v)[0, 1, 3] = torch.nan
    append(k, v, batch.cache, torch.tensor([int(batch.block_table[0, 1]) * 16]), backend="triton")  # token 16 of 20
    starts = starts_of([6, 3], "cpu")
    out, _ = attend(batch, torch.randn(9, 4, 64).bfloat16(), starts, "triton")
    bad = out.isnan().any(-1)
    assert torch.equal(bad, out.isnan().all(-1))
    assert bad[2:6, 2:].all()
    bad[2:6, 2:] = False
    assert not bad.any()


def test_faults_are_counted() -> None:
    faults.faults_are_counted("triton", "cpu")


@pytest.mark.parametrize(
    ("format_name", "head_dim"),
    [
        ("int4", 80),
        ("int4", 128),
        ("int8", 80),
        ("bf16", 128),
        ("fp16-k16-v16", 128),
        ("int3", 128),
        ("int3v2", 96),
        ("int2", 80),
    ],
)
def test_gather(format_name: str, head_dim: int) -> None:
    check_gather("triton", "cpu", format_name, [5, 0, 70, 16, 0], head_dim=head_dim, gained=head_dim == 80)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"softcap": 2.0}),
        (torch.bfloat16, {"has_sinks": True}),
        (torch.float16, {"softcap": 2.0, "has_sinks": True}),
        (torch.float32, {"softcap": 2.0, "has_sinks": True}),
    ],
)
def test_newest_tokens(dtype: torch.dtype, options: dict[str, Any]) -> None:
    check_newest("cpu", dtype=dtype, **options)
    check_newest("cpu", dtype=dtype, seq_lens=[4, 0, 300, 64, 19, 5], query_lens=[4, 0, 4, 1, 3, 2], **options)


@pytest.mark.parametrize(
    ("window", "head_dim", "group"), [(16, 80, 40), (48, 96, 5), (128, 128, 8), (240, 192, 12), (496, 256, 1)]
)
def test_newest_tokens_of_other_shapes(window: int, head_dim: int, group: int) -> None:
    shape = {"window": window, "head_dim": head_dim, "group": group}
    check_newest("cpu", seq_lens=[3, 700, window + 1], query_lens=[3, 2, 1], **shape)


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 31},
        {"window": 33},  # reads NaN
        {"softmax_scale": 0.15},
        {"logit_softcap": 2.0},
        {"sinks": torch.zeros(8)},
    ],
)
def test_a_wrong_argument_is_noticed(wrong: dict[str, Any]) -> None:
    """The control."""
    with pytest.raises(AssertionError):
        check_newest("cpu", wrong=wrong)
