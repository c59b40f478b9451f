"""The GPU backends against the reference: `pytest -m gpu tests/gpu`. With SAWKV_DRY_RUN=1, the CPU backend instead, on
smaller shapes. Over 400 lines: everything that kernels are held to on a card, by one fixture.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sawkv import Attention, CacheFormat, PagedKVCache, PageLayout, Schedule, append
from sawkv.format.constants import BUCKET_SIZE
from sawkv.format.counters import COLUMNS, new_counters
from sawkv.kernels import cuda, unsupported_reason
from tests.conftest import Batch, make_batch, random_vectors
from tests.kernel_checks import (
    BUCKET_OPTIONS,
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

DRY_RUN = bool(os.environ.get("SAWKV_DRY_RUN"))
DEVICE = "cpu" if DRY_RUN else "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY_RUN and not torch.cuda.is_available(), reason="no CUDA device"),
]

LONG = 3000 if DRY_RUN else 20_000
SEQ_LENS = [0, 1, 15, 16, 17, 1000, LONG]


@pytest.fixture(params=["cpu"] if DRY_RUN else ["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def skip_unless_supported(backend: str, format_name: str, head_dim: int, page_size: int = 16) -> None:
    """The CUDA backend leaves some layouts to the Triton one, which takes all of this file."""
    device = torch.device(DEVICE, 0 if DEVICE == "cuda" else None)
    reason = unsupported_reason(backend, device, PageLayout(CacheFormat.parse(format_name), 2, head_dim, page_size))
    if reason is not None and backend == "cuda":
        pytest.skip(reason)
    assert reason is None


@pytest.mark.skipif(
    not DRY_RUN and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="older than Hopper",
)
def test_the_backends_are_there(backend: str) -> None:
    """All else here would be vacuous if they were passed over."""
    layout = PageLayout(CacheFormat("int4"), 8, 128, 16)
    assert unsupported_reason(backend, torch.device(DEVICE, 0 if DEVICE == "cuda" else None), layout) is None


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256, 512])
@pytest.mark.parametrize("format_name", ["int4", "int8", "bf16", "fp16-k16-v16", "int4-k0-v16"])
def test_append(backend: str, format_name: str, head_dim: int) -> None:
    skip_unless_supported(backend, format_name, head_dim, 32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_append(
            backend,
            DEVICE,
            format_name,
            head_dim,
            dtype=dtype,
            centered=dtype == torch.float16,
            gained=dtype != torch.float32,
        )


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256, 512])
@pytest.mark.parametrize("feedback", ["k", "v", "kv"])
def test_append_with_feedback(backend: str, feedback: str, head_dim: int) -> None:
    skip_unless_supported(backend, "int4", head_dim, 32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        prepared = dtype != torch.float32
        check_append(
            backend, DEVICE, "int4", head_dim, dtype=dtype, centered=prepared, gained=prepared, feedback=feedback
        )


@pytest.mark.parametrize("num_tokens", [3000, 7000])
@pytest.mark.parametrize(("format_name", "head_dim"), [("int4", 64), ("int4", 128), ("int3v2", 128), ("int4", 256)])
def test_many_tokens_with_feedback(backend: str, format_name: str, head_dim: int, num_tokens: int) -> None:
    """More than CUDA's blocks take at once, and more than they take in one turn."""
    skip_unless_supported(backend, format_name, head_dim, 32)
    for buckets in (1, 3):
        check_append(
            backend,
            DEVICE,
            format_name,
            head_dim,
            centered=True,
            gained=True,
            feedback="kv",
            buckets=buckets,
            num_tokens=num_tokens,
        )


def test_rows_with_feedback_are_counted(backend: str) -> None:
    layout = PageLayout(CacheFormat("int4"), 3, 128, 16)
    feedback = random_feedback(3, 128, DEVICE)
    vectors = random_vectors(layout, DEVICE, buckets=2) | {"k_feedback": feedback, "v_feedback": feedback}
    caches = [
        PagedKVCache.allocate(layout, 600, DEVICE, **vectors, counters=new_counters(torch.device(DEVICE)))
        for _ in range(2)
    ]
    k, v = torch.randn(2, 9000, 3, 128, device=DEVICE).bfloat16()
    k[7, 1, 5], v[11] = math.nan, math.inf
    k[13, 0] *= 1e9
    slots = (torch.randperm(10000)[:9000] - 200).to(DEVICE)  # some are out of range on either side
    slots[[7, 11, 13]] = slots[[7, 11, 13]].clamp(0, 9599)
    positions = torch.arange(9000, device=DEVICE)
    for cache, name in zip(caches, (backend, "reference"), strict=True):
        cache.pages.fill_(0xAB)
        for part in torch.arange(9000, device=DEVICE).split([8000, 999, 1]):
            append(k[part], v[part], cache, slots[part], positions[part], backend=name)
    assert torch.equal(caches[0].pages, caches[1].pages)
    got, want = (cache.counters for cache in caches)
    assert want is not None
    assert (want[:, COLUMNS.index("sampled_rows")] > 8).all()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_wrong_feedback_is_noticed(backend: str) -> None:
    check_wrong_feedback_is_noticed(backend, DEVICE)


def test_feedback_ends_where_scales_saturate(backend: str) -> None:
    skip_unless_supported(backend, "int4-k0-v0", 64)
    check_feedback_ends_where_scales_saturate(backend, DEVICE)


@pytest.mark.parametrize(
    ("format_name", "head_dim"),
    [
        *(("int4", d) for d in (64, 80, 96, 112, 128, 192, 256, 512)),
        ("int8", 128),
        ("int8", 80),
        ("bf16", 128),
        ("fp16-k16-v16", 64),
    ],
)
def test_attention(backend: str, format_name: str, head_dim: int) -> None:
    """Ragged lengths, and every query length from 1 to 8."""
    skip_unless_supported(backend, format_name, head_dim)
    check_attention(backend, DEVICE, format_name, SEQ_LENS, [1] * 7, head_dim=head_dim)
    for query_lens in ([1, 1, 8, 3, 2, 5, 7], [0, 1, 4, 6, 1, 0, 3]):
        check_attention(
            backend,
            DEVICE,
            format_name,
            SEQ_LENS,
            query_lens,
            head_dim=head_dim,
            centered=True,
            gained=True,
            max_query_len=8,
        )


@pytest.mark.parametrize("head_dim", [128, 512])
@pytest.mark.parametrize("group", [1, 4, 5, 7, 8, 12, 16])
def test_query_shapes(backend: str, group: int, head_dim: int) -> None:
    for query_lens, most in (([1, 1, 1, 1], 1), ([2, 2, 1, 2], 2), ([4, 8, 3, 8], 8)):
        options = {"group": group, "head_dim": head_dim, "max_query_len": most, "gained": most == 8}
        check_attention(backend, DEVICE, "int4", [33, 1000, 9, 4000], query_lens, **options)


@pytest.mark.parametrize(
    ("page_size", "head_dim"),
    [(32, 128), (48, 128), (64, 128), (128, 128), (128, 64), (64, 256), (32, 512), (64, 512), (256, 512)],
)
def test_page_sizes(backend: str, page_size: int, head_dim: int) -> None:
    skip_unless_supported(backend, "int4", head_dim, page_size)
    check_attention(
        backend,
        DEVICE,
        "int4",
        SEQ_LENS,
        [1, 1, 2, 1, 3, 1, 1],
        page_size=page_size,
        head_dim=head_dim,
        max_query_len=8,
    )


@pytest.mark.parametrize("query_lens", [[1] * 7, [1, 1, 8, 3, 2, 5, 7]])
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 5},
        {"sliding_window": 700},
        {"logit_softcap": 2.0},
        {"sinks": True},
        {"logit_softcap": 2.0, "sinks": True, "sliding_window": 700},
        {"softmax_scale": 0.02},
    ],
    ids=str,
)
def test_options(backend: str, query_lens: list[int], options: dict[str, object]) -> None:
    """Of plain pages, of centered ones, and of those with all there is."""
    kinds = ((False, False), (True, False), (True, True))
    check_options(backend, SEQ_LENS, query_lens, options, kinds, dtype=torch.float16)


def check_options(
    backend: str,
    seq_lens: list[int],
    query_lens: list[int],
    options: dict[str, object],
    kinds: Sequence[tuple[bool, bool]] = ((False, False), (True, True)),
    **more: Any,
) -> None:
    """Of pages with or without centers and gains, by `kinds`. Sinks, if asked for, are random ones."""
    if "sinks" in options:
        options = options | {"sinks": torch.randn(8, device=DEVICE).bfloat16()}
    for centered, gained in kinds:
        check_attention(
            backend, DEVICE, "int4", seq_lens, query_lens, centered=centered, gained=gained, **more, **options
        )


def skip_unless_it_extends(backend: str) -> None:
    if backend == "triton":
        pytest.skip("takes up to 8 query tokens")


@pytest.mark.parametrize(
    "query_lens", [[1, 16, 16, 16, 0, 5, 16], [1, 17, 32, 9, 30, 0, 32], [1, 64, 70, 64, 16, 3, 100]]
)
@pytest.mark.parametrize(("head_dim", "page_size"), [(128, 16), (128, 64), (64, 16), (64, 128), (96, 16)])
def test_turns(backend: str, head_dim: int, page_size: int, query_lens: list[int]) -> None:
    """More query tokens than decode takes, some more than their sequence has; head_dim 96 is decode's all the same."""
    skip_unless_it_extends(backend)
    for prepared in (False, True):
        check_attention(
            backend,
            DEVICE,
            "int4",
            SEQ_LENS,
            query_lens,
            head_dim=head_dim,
            page_size=page_size,
            centered=prepared,
            gained=prepared,
        )


@pytest.mark.parametrize("group", [1, 5, 7, 8, 16])
def test_query_shapes_of_turns(backend: str, group: int) -> None:
    skip_unless_it_extends(backend)
    check_attention(backend, DEVICE, "int4", [9000, 77, 200], [40, 12, 3], group=group, dtype=torch.float16)


@pytest.mark.parametrize("most", [16, 100])
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 50},
        {"sliding_window": 700},
        {"logit_softcap": 2.0},
        {"sinks": True},
        {"logit_softcap": 2.0, "sinks": True, "sliding_window": 700},
        {"softmax_scale": -0.05},
        {"softmax_scale": 0.0},
    ],
    ids=str,
)
def test_options_of_turns(backend: str, most: int, options: dict[str, object]) -> None:
    skip_unless_it_extends(backend)
    check_options(backend, [9000, 77, 200, 3000], [most, 12, 3, 10], options)


@pytest.mark.parametrize("most", [16, 40])
def test_scores_that_jump(backend: str, most: int) -> None:
    """From tile to tile by more than fp16 and fp32 hold as powers of two; weights are relative to an old maximum. Keys
    in fp16 give scores of 200 to about 0.01.
    """
    skip_unless_it_extends(backend)
    factors = torch.tensor(
        [[0, 1, 3, 30, 29, 180, 0, 181, -200, 200], [200, 0, -200, 100, 120, 140, 199, 201, 205, 90]]
    )
    length = 64 * factors.shape[1]
    batch = make_batch("int4", [length, length], device=DEVICE)
    heads = torch.nn.functional.normalize(torch.randn(2, 128, device=DEVICE), dim=-1)
    for factor, pages in zip(factors.to(DEVICE), batch.block_table, strict=True):
        at = torch.arange(length, device=DEVICE)
        k = factor.repeat_interleave(64)[:, None, None] * heads + 0.3 * torch.randn(length, 2, 128, device=DEVICE)
        append(k.bfloat16(), torch.randn_like(k).bfloat16(), batch.cache, pages[at // 16].long() * 16 + at % 16)
    starts = starts_of([most, most], DEVICE)
    q = (heads.repeat_interleave(4, 0) + 0.03 * torch.randn(2 * most, 8, 128, device=DEVICE)).bfloat16()
    got, want = (attend(batch, q, starts, name, softmax_scale=1.0) for name in (backend, "reference"))
    compare_attention(got, want, starts, 5e-2, 3e-2)


@pytest.mark.parametrize("most", [16, 40])
def test_what_turns_leave_alone(backend: str, most: int) -> None:
    """Pages behind a window, which hold another request's tokens or NaN, and sequences of negative length."""
    skip_unless_it_extends(backend)
    batch = make_batch("int4", [5000, 900, 64], device=DEVICE)
    starts, window = starts_of([most, 12, 9], DEVICE), 300
    q = torch.randn(int(starts[-1]), 8, 128, device=DEVICE).bfloat16()
    want = attend(batch, q, starts, "reference", sliding_window=window)
    for i, (length, query_len) in enumerate(((5000, most), (900, 12))):
        behind = (length - query_len - window + 1) // 16
        batch.cache.pages[batch.block_table[i, :behind].long()] = 0xFF
    compare_attention(attend(batch, q, starts, backend, sliding_window=window), want, starts, 2e-2)
    if DRY_RUN:
        return
    options = {"num_q_heads": 8, "sliding_window": window}
    schedule = Schedule(
        batch.cache.layout, batch.cache.pages.device, max_num_seqs=3, max_query_len=most, backend=backend, **options
    )
    out, lengths = torch.full_like(q, -7), batch.seq_lens.clone()
    lengths[1] = -1
    attention = Attention(batch.cache, softmax_scale=128**-0.5, backend=backend, **options)
    attention(q, schedule.update(batch.block_table, lengths, starts), out)
    left_out = (torch.arange(len(q), device=DEVICE) >= most) & (torch.arange(len(q), device=DEVICE) < most + 12)
    assert (out == -7).flatten(1).all(1).equal(left_out)


@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize(
    "options",
    [{"logit_softcap": 5.0}, {"sinks": True}, {"logit_softcap": 5.0, "sinks": True, "sliding_window": 700}],
    ids=str,
)
def test_options_of_wide_heads(backend: str, head_dim: int, options: dict[str, object]) -> None:
    """As Gemma 2 has them: a soft-cap, and registers that are all in use."""
    check_options(backend, SEQ_LENS, [1, 1, 2, 1, 2, 2, 1], options, head_dim=head_dim, max_query_len=2)


def test_many_sequences(backend: str) -> None:
    """More than the schedule takes at once, one far longer than the others, some empty."""
    seq_lens = (torch.rand(1500 if not DRY_RUN else 150) * 40).int().tolist()
    seq_lens[70] = LONG
    check_attention(backend, DEVICE, "int4", seq_lens, [1] * len(seq_lens), group=2, head_dim=64)
    window = {"head_dim": 64, "group": 8, "sliding_window": 100}
    for format_name, options in (("int3", {}), ("int2", {"centered": True, "buckets": 2}), ("int4", window)):
        check_attention(backend, DEVICE, format_name, seq_lens, [1] * len(seq_lens), num_kv_heads=4, **options)


def test_nothing_to_do(backend: str) -> None:
    """Empty batches, and batches of empty sequences."""
    check_attention(backend, DEVICE, "int4", [0, 0], [1, 0])
    batch = make_batch("int4", [40], device=DEVICE)
    nothing = Batch(batch.cache, [], [], batch.block_table[:0], batch.seq_lens[:0])
    q = torch.zeros(3, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    out, _ = attend(nothing, q, torch.zeros(1, dtype=torch.int32, device=DEVICE), backend, max_query_len=1)
    assert out.isnan().all()
    before = batch.cache.pages.clone()
    append(
        *torch.zeros(2, 0, 2, 128, device=DEVICE),
        batch.cache,
        torch.zeros(0, dtype=torch.int64, device=DEVICE),
        backend=backend,
    )
    append(*torch.ones(2, 4, 2, 128, device=DEVICE), batch.cache, torch.full((4,), -1, device=DEVICE), backend=backend)
    assert torch.equal(batch.cache.pages, before)


@pytest.mark.parametrize(("query_len", "head_dim"), [(1, 128), (3, 128), (3, 512)])
def test_one_graph_serves_any_lengths(backend: str, query_len: int, head_dim: int) -> None:
    """Captured once with its schedule, replayed with other lengths, queries and pages."""
    batches = [
        make_batch("int4", seq_lens, head_dim=head_dim, device=DEVICE)
        for seq_lens in ([3, 3, 3, 3], [LONG, 70, 4, 1000], [5, 0, LONG // 2, 64], [2500, 3, 3, 8])
    ]
    most_pages = max(batch.cache.pages.shape[0] for batch in batches)
    cache = PagedKVCache.allocate(batches[0].cache.layout, most_pages, DEVICE)
    table = torch.zeros(4, max(batch.block_table.shape[1] for batch in batches), dtype=torch.int32, device=DEVICE)
    seq_lens, starts = torch.zeros(4, dtype=torch.int32, device=DEVICE), starts_of([query_len] * 4, DEVICE)
    q = torch.zeros(4 * query_len, 8, head_dim, dtype=torch.bfloat16, device=DEVICE)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=DEVICE)
    options = {"num_q_heads": 8, "max_num_seqs": 4, "max_query_len": query_len}
    schedule = Schedule(cache.layout, cache.pages.device, backend=backend, **options)
    attention = Attention(cache, num_q_heads=8, softmax_scale=0.1, backend=backend)

    def step() -> None:
        attention(q, schedule.update(table, seq_lens, starts), out, lse)

    replay = step
    if not DRY_RUN:
        step()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    for batch in batches:
        cache.pages.fill_(0xFF)[: batch.cache.pages.shape[0]] = batch.cache.pages
        table.fill_(2**30)[:, : batch.block_table.shape[1]] = batch.block_table
        seq_lens.copy_(batch.seq_lens)
        q.normal_()
        for x in (out, lse):
            x.fill_(math.nan)
        replay()
        replay()
        compare_attention((out, lse), attend(batch, q, starts, "reference", softmax_scale=0.1), starts)


@pytest.mark.parametrize("head_dim", [128, 512])
def test_results_do_not_change_from_run_to_run(backend: str, head_dim: int) -> None:
    batch = make_batch("int4", SEQ_LENS, head_dim=head_dim, device=DEVICE)
    q, starts = torch.randn(7, 8, head_dim, device=DEVICE).bfloat16(), starts_of([1] * 7, DEVICE)
    first, _ = attend(batch, q, starts, backend)
    for _ in range(5):
        again, _ = attend(batch, q, starts, backend)
        torch.testing.assert_close(again, first, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("format_name", "head_dim"),
    [
        ("int4", 64),
        ("int4", 96),
        ("int4", 128),
        ("int4", 80),
        ("int4", 192),
        ("int4", 256),
        ("int4", 512),
        ("int4-k256-v256", 256),
        ("int4-k16-v32", 128),
        ("int8", 112),
        ("bf16", 64),
    ],
)
def test_gather(backend: str, format_name: str, head_dim: int) -> None:
    skip_unless_supported(backend, format_name, head_dim)
    for gained in (False, True):
        lengths = [5, 0, 33, 16, 1000, 0, 2, 700]
        check_gather(backend, DEVICE, format_name, lengths, head_dim=head_dim, gained=gained, exact=backend != "cuda")


@pytest.mark.parametrize(("format_name", "head_dim"), [("int4", 128), ("int4", 96), ("int4", 512), ("int8", 80)])
def test_pages_with_centers_of_buckets(backend: str, format_name: str, head_dim: int) -> None:
    skip_unless_supported(backend, format_name, head_dim, 32)
    for feedback in ("", "kv") if format_name == "int4" else ("",):
        check_append(backend, DEVICE, format_name, head_dim, centered=True, gained=True, feedback=feedback, buckets=3)
    lengths = [BUCKET_SIZE - 1, BUCKET_SIZE, 0, 3 * BUCKET_SIZE + 1]
    for page_size in (16, 64):
        check_gather(
            backend,
            DEVICE,
            format_name,
            lengths,
            head_dim=head_dim,
            page_size=page_size,
            gained=True,
            buckets=2,
            exact=backend != "cuda",
        )
    if format_name == "int4":
        check_gather_of_tails(backend, DEVICE, head_dim, 64)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "group", "query_lens"),
    [
        (128, 16, 4, (1, 1, 1, 1, 1, 1)),
        (128, 64, 1, (1, 1, 1, 1, 1, 1)),
        (128, 16, 8, (1, 2, 4, 4, 3, 4)),
        (128, 128, 5, (1, 8, 5, 8, 8, 8)),
        (64, 16, 4, (1, 4, 1, 3, 2, 8)),
        (256, 16, 4, (1, 1, 2, 1, 2, 2)),
        (512, 64, 8, (1, 1, 1, 1, 1, 1)),
        (512, 16, 4, (1, 4, 1, 3, 2, 8)),
        (128, 64, 4, (1, 16, 16, 9, 16, 16)),
        (128, 16, 4, (1, 100, 16, 9, 64, 100)),
        (64, 64, 4, (1, 70, 32, 20, 9, 70)),
    ],
)
def test_attention_with_centers_of_buckets(
    backend: str, head_dim: int, page_size: int, group: int, query_lens: tuple[int, ...]
) -> None:
    if max(query_lens) > 8:
        skip_unless_it_extends(backend)
    options = [*BUCKET_OPTIONS, {"softmax_scale": -0.05}]
    check_buckets(
        backend,
        DEVICE,
        head_dim=head_dim,
        page_size=page_size,
        group=group,
        query_lens=query_lens,
        options=options[::4] if DRY_RUN else options,
    )


@pytest.mark.parametrize(("query_len", "head_dim"), [(1, 128), (8, 128), (16, 128), (100, 128), (8, 512)])
def test_chunks_of_many_buckets(backend: str, query_len: int, head_dim: int) -> None:
    """On one block, which takes chunks of more buckets than it prepares queries for at once."""
    if query_len > 8:
        skip_unless_it_extends(backend)
    lengths = [9000, 5] if DRY_RUN else [90_000, 5, 3 * BUCKET_SIZE]
    options = {"head_dim": head_dim, "centered": True, "gained": True, "buckets": 44}
    batch = make_batch("int4", lengths, **options, device=DEVICE)
    starts = starts_of([query_len] * len(lengths), DEVICE)
    q = torch.randn(int(starts[-1]), 8, head_dim, device=DEVICE).bfloat16() / 2
    attention = Attention(batch.cache, num_q_heads=8, softmax_scale=head_dim**-0.5, backend=backend)
    schedule = Schedule(
        batch.cache.layout,
        batch.cache.pages.device,
        num_q_heads=8,
        max_num_seqs=len(lengths),
        max_query_len=query_len,
        backend=backend,
    )
    if backend == "cuda":
        schedule.kernel.num_blocks = 1  # type: ignore[attr-defined]
    out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:2], math.nan, device=DEVICE)
    for _ in range(2):  # the count of claimed chunks is 0 again
        attention(q, schedule.update(batch.block_table, batch.seq_lens, starts), out, lse)
        want = attend(batch, q, starts, "reference")
        compare_attention((out, lse), want, starts, 2e-2)


WAIT = "__device__ inline void wait(u64* barrier, u32 parity) {"
LATE_WAIT = f"""__device__ inline void wait_only(u64* barrier, u32 parity);
{WAIT}
  wait_only(barrier, parity);
  if (threadIdx.x / 32 == LATE_WARP) asm volatile("nanosleep.u32 20000;");
}}
{WAIT.replace("wait", "wait_only")}"""


def with_a_late_warp(sources: dict[str, str]) -> dict[str, str]:
    """Sources of a kernel whose warp LATE_WARP sleeps after each wait for a barrier."""
    assert WAIT in sources["ptx.cuh"]
    return sources | {"ptx.cuh": sources["ptx.cuh"].replace(WAIT, LATE_WAIT)}


@pytest.mark.parametrize(
    ("query_len", "head_dim", "page_size", "late"),
    [
        *((1, 128, 16, warp) for warp in (0, 8, 9, 10, 11)),  # a consumer, two producers, scheduler, merge
        (1, 256, 64, 9),
        *((40, 128, 64, warp) for warp in (0, 1, 3)),  # of `extend.cu`: producer, scheduler, scaler
    ],
)
def test_a_warp_may_be_late(
    backend: str, query_len: int, head_dim: int, page_size: int, late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others are then as far ahead of it as barriers let them. Each of two blocks takes many chunks, most of them
    of one tile, of which one of two producers has none. Without an order that is needed, results are wrong or the
    kernel hangs.
    """
    if backend != "cuda":
        pytest.skip("its warps have no roles of their own")
    read_sources = cuda.runtime.read_sources
    monkeypatch.setattr(
        cuda.runtime,
        "read_sources",
        lambda file: with_a_late_warp(read_sources(file)) if file in ("decode.cu", "extend.cu") else read_sources(file),
    )
    monkeypatch.setitem(cuda.DEBUG_DEFINES, "LATE_WARP", late)
    lengths = [query_len + i * 37 % (23 if i % 3 else 200) for i in range(30)] + [query_len + 2000]
    batch = make_batch("int4", lengths, head_dim=head_dim, page_size=page_size, device=DEVICE)
    starts = starts_of([query_len] * len(lengths), DEVICE)
    q = torch.randn(int(starts[-1]) + 1, 8, head_dim, device=DEVICE).bfloat16()
    schedule = Schedule(
        batch.cache.layout,
        batch.cache.pages.device,
        num_q_heads=8,
        max_num_seqs=len(lengths),
        max_query_len=query_len,
        backend=backend,
    )
    schedule.kernel.num_blocks = 2  # type: ignore[attr-defined]
    attention = Attention(batch.cache, num_q_heads=8, softmax_scale=head_dim**-0.5, backend=backend)
    out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:2], math.nan, device=DEVICE)
    attention(q, schedule.update(batch.block_table, batch.seq_lens, starts), out, lse)
    compare_attention((out, lse), attend(batch, q, starts, "reference"), starts, 2e-2)


@pytest.mark.skipif(DRY_RUN, reason="takes 5 GB")
def test_offsets_beyond_32_bits(backend: str) -> None:
    """The last pages of a cache of more than 4 GiB hold what a small cache does."""
    small = make_batch("int4", [700, 33], num_kv_heads=8, device=DEVICE)
    layout = small.cache.layout
    pages = torch.empty(layout.pages_shape(4_600_000_000 // (8 * layout.span_bytes)), dtype=torch.uint8, device=DEVICE)
    moved_by = pages.shape[0] - small.cache.pages.shape[0]
    pages[moved_by:] = 0xFF
    table = torch.where(small.block_table < 2**30, small.block_table + moved_by, 2**30).int()
    big = Batch(PagedKVCache(pages, layout), small.k, small.v, table, small.seq_lens)
    position = torch.cat([torch.arange(700), torch.arange(33)]).to(DEVICE)
    rows = torch.cat([table[0, position[:700] // 16], table[1, position[700:] // 16]]).long()
    append(torch.cat(small.k), torch.cat(small.v), big.cache, rows * 16 + position % 16, backend=backend)
    assert torch.equal(pages[moved_by:], small.cache.pages)
    q, starts = torch.randn(2, 32, 128, device=DEVICE).bfloat16(), starts_of([1, 1], DEVICE)
    compare_attention(attend(big, q, starts, backend), attend(small, q, starts, "reference"), starts)


def test_a_broken_page_is_noticed(backend: str) -> None:
    """The control: one page of twenty has its nibbles swapped."""
    batch = make_batch("int4", [320], device=DEVICE)
    q, starts = torch.randn(1, 8, 128, device=DEVICE).bfloat16(), starts_of([1], DEVICE)
    want = attend(batch, q, starts, "reference")
    page = batch.cache.pages[int(batch.block_table[0, 7])]
    page[:] = page >> 4 | page << 4
    with pytest.raises(AssertionError):
        compare_attention(attend(batch, q, starts, backend), want, starts)
