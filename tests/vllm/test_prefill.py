"""What a GPU's prefill gathers, on the CPU: attention over it must be attention over the whole context."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sawkv import CacheFormat, PagedKVCache, PageLayout, Pages, append, gather, prefixes
from sawkv.errors import UnsupportedError
from sawkv.format.constants import BUCKET_SIZE
from sawkv.kernels import Turns

# Of torch.jit, as vLLM is imported.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LAYOUT = PageLayout(CacheFormat("int4"), 2, 64, 16)
CONTEXTS, QUERIES = (5, 40, 200, 333, 64, 500), (1, 40, 17, 300, 64, 9)
"""Tokens in the cache, and how many of them are new; the first is a decode."""


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Causal, aligned at the end, as FlashAttention's varlen function does it; every head its own keys. A NaN that is
    not seen is seen.
    """
    last = torch.arange(len(q))[:, None] + len(k) - len(q)
    key = torch.arange(len(k))
    seen = (key <= last) & ((key > last - window) if window else torch.ones(1, 1, dtype=torch.bool))
    scores = torch.einsum("qhd,khd->hqk", q, k).masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def slots(pages: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Of a sequence's tokens, in its pages."""
    token = torch.arange(num_tokens)
    return pages[token // LAYOUT.page_size].long() * LAYOUT.page_size + token % LAYOUT.page_size


@pytest.mark.parametrize("window", [0, 1, 30, 64, 1000])
@pytest.mark.parametrize("capacity", [700, 100_000])
@pytest.mark.parametrize("host_knows_lengths", [True, False])
def test_what_is_gathered(window: int, capacity: int, host_knows_lengths: bool) -> None:
    check(window, capacity, host_knows_lengths, begins_with=window)


@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("short_by", [0, 3])
@pytest.mark.parametrize("host_knows_lengths", [True, False])
def test_prompts_without_a_cached_prefix(window: int, short_by: int, host_knows_lengths: bool) -> None:
    check(window, 700, host_knows_lengths, begins_with=window, short_by=short_by, queries=CONTEXTS)


def turns_of(*limits: tuple[int, int]) -> Turns:
    return Turns(tuple(most for most, _ in limits), limits)


@pytest.mark.parametrize(("longest", "shortest"), [(16, 1), (17, 300), (64, 64), (300, 200), (300, 501)])
@pytest.mark.parametrize("window", [0, 300])
def test_turns_are_left_out(window: int, longest: int, shortest: int) -> None:
    check(window, 700, True, begins_with=window, turns=[turns_of((1, 0), (longest, shortest)), turns_of((1000, 0))])


def test_which_requests_are_turns() -> None:
    """From the first on, of few new tokens, with much to see, as every kind of layer has it."""
    from sawkv.integrations.vllm.prefill import HostLengths, find_turns

    common: Any = SimpleNamespace(
        num_reqs=5,
        query_start_loc_cpu=torch.tensor([0, 1, 101, 110, 120, 130]),
        seq_lens_cpu_upper_bound=torch.tensor([9000, 9000, 9000, 8000, 9000]),
        max_seq_len=9000,
    )
    few, more = turns_of((64, 8192)), turns_of((200, 8990))
    assert find_turns(HostLengths.of(common), 1, 0, [few]) == [False, False, True, False, True]
    assert find_turns(HostLengths.of(common), 0, 0, [few]) == [True, False, True, False, True]
    assert find_turns(HostLengths.of(common), 1, 0, [more]) == [False, True, True, False, True]
    assert find_turns(HostLengths.of(common), 1, 0, [turns_of((9, 8000), (64, 9001))]) == [i == 2 for i in range(5)]
    assert find_turns(HostLengths.of(common), 1, 0, [turns_of((10, 8000), (64, 9001))]) == [i > 1 for i in range(5)]
    assert find_turns(HostLengths.of(common), 1, 8185, [few]) == [False, False, True, False, True]
    assert find_turns(HostLengths.of(common), 1, 8000, [few]) == [False] * 5
    assert find_turns(HostLengths.of(common), 1, 0, [few, None]) == [False] * 5
    common.seq_lens_cpu_upper_bound = None
    assert find_turns(HostLengths.of(common), 1, 0, [few, more]) == [False, False, True, True, True]


def test_turns_are_scheduled_for_as_few_query_tokens_as_do() -> None:
    """Layers without a window read the pages of the third and the fifth request, those with one of none."""
    from sawkv.integrations.vllm.backend import SawMetadataBuilder
    from sawkv.integrations.vllm.prefill import HostLengths

    starts, lengths = torch.tensor([0, 1, 101, 110, 120, 130]).int(), torch.tensor([9000, 9000, 9000, 80, 9000]).int()
    common: Any = SimpleNamespace(
        num_reqs=5,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        block_table_tensor=torch.arange(10).view(5, 2),
    )
    whole, windowed = (32, 8, 0), (32, 8, 1000)
    made: list[tuple[Any, ...]] = []
    builder: Any = object.__new__(SawMetadataBuilder)
    builder.device = torch.device("cpu")
    builder._turns = dict.fromkeys((whole, windowed), Turns((4, 16, 64), ((64, 8192),)))

    def schedule(alike: Any, max_query_len: int) -> Any:
        made.append((alike, max_query_len))
        return SimpleNamespace(update=lambda *lengths: lengths)

    builder._schedule = schedule
    host = HostLengths.of(common)
    steps = builder._schedule_turns(common, host, 1, builder._find_turns(host, 1))
    assert made == [(whole, 16)]
    assert list(steps) == [whole]
    table, seq_lens, query_starts = steps[whole]
    assert table.tolist() == [[2, 3], [4, 5], [6, 7], [8, 9]]
    assert (seq_lens.tolist(), seq_lens.dtype) == ([-1, 9000, -1, 9000], torch.int32)
    assert query_starts.tolist() == [1, 101, 110, 120, 130]
    common.query_start_loc_cpu = torch.tensor([0, 1, 101, 201, 301, 401])
    host = HostLengths.of(common)
    assert builder._schedule_turns(common, host, 1, builder._find_turns(host, 1)) == {}


@pytest.mark.parametrize("window", [0, 30])
def test_bounds_that_a_draft_model_outgrew(window: int) -> None:
    check(window, 100_000, True, begins_with=window, short_by=3)
    with pytest.raises(AssertionError):
        check(window, 100_000, True, begins_with=window, short_by=3, slack=0)


def test_a_context_beyond_the_workspace_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="contexts of at most 499 tokens, got 500"):
        check(0, 499, True, begins_with=0)


def test_pages_behind_the_window_are_noticed() -> None:
    with pytest.raises(AssertionError, match="not close"):
        check(30, 100_000, True, begins_with=0)


@pytest.mark.parametrize("before", [0, 7])
def test_each_layer_reads_its_own_pages(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers share a step's slices and the workspace in them. Rows `before` a slice and behind it are of others."""
    from sawkv.integrations.vllm.prefill import FlashPrefill, PrefillSlice

    lengths, starts = torch.tensor([20, 30], dtype=torch.int32), torch.tensor([0, 20, 50], dtype=torch.int32)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    rows = slice(before, before + 50)
    piece = PrefillSlice(rows, starts, prefixes(table, lengths, starts), num_keys=50, max_query_len=30, max_seq_len=30)
    workspaces: list[torch.Tensor] = []

    def workspace(_: object) -> tuple[torch.Tensor, torch.Tensor]:
        workspaces.append(torch.full((2, 64, 2, 64), torch.nan))
        return workspaces[-1][0], workspaces[-1][1]

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, **options: Any) -> None:
        """Rows of `cu_seqlens_q` alone, as FlashAttention."""
        end = int(options["cu_seqlens_q"][-1])
        out[:end] = q[:end] + k[:end] + 2 * v[:end]

    monkeypatch.setattr(FlashPrefill, "workspace", workspace)
    prefill: Any = object.__new__(FlashPrefill)
    prefill.shape, prefill._options, prefill._sinks = (64, 2, 64), {}, None
    prefill._flash_attention = flash
    for _ in range(3):
        cache = PagedKVCache.allocate(LAYOUT, 4)
        q = torch.randn(before + 60, 2, 64)
        k, v = torch.randn(2, 50, 2, 64)
        append(k, v, cache, torch.cat([slots(table[0], 20), slots(table[1], 30)]))
        wanted = torch.empty(2, 50, 2, 64)
        gather(cache, table, lengths, starts, *wanted, rotated=False)
        output = torch.full_like(q, 9.0)
        prefill.attend(q, Pages(cache), piece, output)
        torch.testing.assert_close(output[rows], q[rows] + wanted[0] + 2 * wanted[1])
        assert (output[:before] == 9).all()
        assert (output[rows.stop :] == 9).all()
    assert len(workspaces) == 1


def test_sinks_on_flash_attention_2_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel takes no sinks, and would say so in the first request only."""
    from sawkv.integrations.vllm import prefill

    config: Any = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    monkeypatch.setattr(prefill, "get_flash_attn_version", lambda **_: 2)
    with pytest.raises(
        UnsupportedError, match="FlashAttention 3 or newer for a model with attention sinks, got FlashAttention 2"
    ):
        prefill.FlashPrefill(config, 64, 2, 0.125, 0, 0.0, torch.zeros(4))


def check(
    window: int,
    capacity: int,
    host_knows_lengths: bool,
    begins_with: int,
    short_by: int = 0,
    slack: int | None = None,
    turns: Sequence[Turns | None] = (None,),
    queries: Sequence[int] = QUERIES,
) -> None:
    """`begins_with`: the window that the slices are made for; `short_by`: tokens that the host's bounds lack, `slack`:
    as is said.
    """
    from sawkv.integrations.vllm.prefill import HostLengths, find_turns, slice_prefills

    size = LAYOUT.page_size
    pages = [-(-n // size) for n in CONTEXTS]
    table = torch.full((len(CONTEXTS), max(pages) + 2), 2**30, dtype=torch.int32)
    order = torch.randperm(sum(pages)).int()
    for i, (start, count) in enumerate(zip(torch.tensor([0, *pages]).cumsum(0).tolist(), pages, strict=False)):
        table[i, :count] = order[start : start + count]
    cache = PagedKVCache.allocate(LAYOUT, sum(pages))
    cache.pages.fill_(0xFF)  # NaN scales
    whole = []
    for i, n in enumerate(CONTEXTS):
        k, v = torch.randn(2, n, 2, 64)
        append(k, v, cache, slots(table[i], n))
        states = torch.empty(2, n, 2, 64)
        gather(
            cache,
            table[i : i + 1],
            torch.tensor([n], dtype=torch.int32),
            torch.tensor([0, n], dtype=torch.int32),
            *states,
            rotated=False,
        )
        whole.append(states)
        if window:  # pages behind the window are another request's by now
            cache.pages[table[i, : max(0, n - queries[i] - window + 1) // size].long()] = 0xFF
    q = torch.randn(sum(queries), 2, 64)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    lengths = torch.tensor(CONTEXTS, dtype=torch.int32)
    common: Any = SimpleNamespace(
        num_reqs=len(CONTEXTS),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths - short_by if host_knows_lengths else None,
        max_seq_len=max(CONTEXTS),
        block_table_tensor=table,
    )
    host = HostLengths.of(common)
    are_turns = find_turns(host, 1, begins_with, turns)
    slack = short_by if slack is None else slack
    slices = slice_prefills(common, host, 1, capacity, begins_with, size, slack, are_turns)
    left = iter([i for i in range(1, len(CONTEXTS)) if not are_turns[i]])
    for piece in slices:
        if queries == CONTEXTS and host_knows_lengths and not slack:
            assert piece.prefixes.cu_seq_lens is piece.cu_seqlens_q, "the device need not add them up"
        states = torch.full((2, piece.num_keys, 2, 64), torch.nan)
        Pages(cache).gather(piece.prefixes, states[0], states[1], rotated=False)
        assert int(piece.prefixes.seq_lens.max()) <= piece.max_seq_len
        for j in range(len(piece.prefixes.seq_lens)):
            rows, keys = (slice(*cu[j : j + 2].tolist()) for cu in (piece.cu_seqlens_q, piece.prefixes.cu_seq_lens))
            got = attend(q[piece.tokens][rows], *states[:, keys], window)
            i = next(left)
            if begins_with:
                assert int(piece.prefixes.first_positions[j] + piece.prefixes.seq_lens[j]) == CONTEXTS[i]
            want = attend(q[starts[i] : starts[i + 1]], *whole[i], window)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert next(left, None) is None
    if not any(are_turns) and (capacity > 700 or window == 0):
        assert (len(slices) > 1) == (capacity == 700)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_layers_that_measure_attend_exactly(softcap: float) -> None:
    """With a window, sinks and more queries than a block; prompts of one engine test have all but soft-caps."""
    from sawkv.integrations.vllm.exact import QUERY_BLOCK, attend_exactly

    tokens, window = QUERY_BLOCK + 30, 100
    q, k, v = torch.randn(tokens, 4, 32) * 3, torch.randn(tokens, 2, 32), torch.randn(tokens, 2, 32)
    sinks = torch.randn(4)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.2
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    weights = scores.masked_fill((age < 0) | (age >= window), -torch.inf).exp()
    weights = weights / (weights.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    want = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1))
    options: dict[str, Any] = {"softmax_scale": 0.2, "sliding_window": window, "sinks": sinks}
    got = attend_exactly(q, k, v, **options, logit_softcap=softcap)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    other = attend_exactly(q, k, v, **options, logit_softcap=2.0)
    assert (other - want).abs().max() > 0.01


@pytest.mark.newest
def test_host_time_of_a_layer_is_measured_without_a_gpu() -> None:
    """`benchmarks.host_time` runs the CUDA backend up to the launch, and so what Python does for each layer."""
    from benchmarks.host_time import BESIDE, LAYER

    command = [sys.executable, "-m", "benchmarks.host_time", "--worker"]
    done = subprocess.run(command, input="\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    turn = json.loads(done.stdout.splitlines()[-1])
    assert {*LAYER, *BESIDE} == turn.keys()
    assert all(0 < us < 1e5 for us in turn.values())


def test_positions_of_a_steps_tokens() -> None:
    """Decodes, chunks of prompts, requests that pad a graph's batch, and rows that pad its tokens."""
    from sawkv.integrations.vllm.backend import token_positions

    for query_lens, seq_lens, padding in (([1, 1, 4, 2], [7, 1, 4, 5000], 0), ([1, 1, 0, 0], [9, 3, 0, 0], 3)):
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        used = int(starts[-1])
        common: Any = SimpleNamespace(
            num_reqs=4,
            num_actual_tokens=used + padding,
            query_start_loc=starts,
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        )
        want = [p for n, length in zip(query_lens, seq_lens, strict=True) for p in range(length - n, length)]
        assert token_positions(common)[:used].tolist() == want


def test_layers_append_by_the_positions_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks of a prompt and a decode, over the border of a bucket, with padding; bytes equal the reference's."""
    from sawkv.integrations.vllm import backend

    k_center = 5 * torch.randn(2, 2, 64)
    layout = PageLayout(CacheFormat("int4"), 2, 64, 16)
    pages = torch.zeros(2, *layout.pages_shape(10), dtype=torch.uint8)
    cache, want = (PagedKVCache(each, layout, k_center=k_center) for each in pages)
    impl: Any = object.__new__(backend.SawAttentionImpl)
    counted = SimpleNamespace(name="a layer")
    vars(impl).update(measurement=None, recent=None, num_buckets=2, counted=counted, _bind=lambda _: Pages(cache))
    builder: Any = object.__new__(backend.SawMetadataBuilder)
    vars(builder).update(_impls=[impl], _positions=None, _max_num_tokens=64, device=torch.device("cpu"))
    slot, buffers = torch.randperm(160), []
    for query_lens, seq_lens in (([20, 1], [BUCKET_SIZE - 4, 9]), ([8, 1], [BUCKET_SIZE + 4, 10])):
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        used, lengths = int(starts[-1]), torch.tensor(seq_lens, dtype=torch.int32)
        common = SimpleNamespace(num_reqs=2, num_actual_tokens=used, query_start_loc=starts, seq_lens=lengths)
        buffers.append(builder._place_tokens(common))
        context = SimpleNamespace(positions=buffers[-1]), None, None, None
        monkeypatch.setattr(backend, "get_attention_context", {"a layer": context}.__getitem__)
        k, v = torch.randn(2, used + 3, 2, 64)  # rows of padding have no slots
        taken, slot = slot[:used], slot[used:]
        impl.do_kv_cache_update(None, k, v, None, torch.cat([taken, torch.full((2,), -1)]))
        places = [p for n, length in zip(query_lens, seq_lens, strict=True) for p in range(length - n, length)]
        append(k[:used], v[:used], want, taken, torch.tensor(places), backend="reference")
        assert torch.equal(*pages)
    assert buffers[0] is buffers[1], "a graph holds its address"
    assert len({int(p) // BUCKET_SIZE for p in places}) == 2
