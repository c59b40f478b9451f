"""What a GPU's steps read where the newest tokens are kept in 16 bits, on the CPU: our kernels are the CPU's, and
vLLM's FlashAttention and its write are stand-ins, which do what the GPU's do to rows that nobody should see. So is the
kernel of the newest tokens. tests/gpu/test_recent.py runs the same with the real ones.
Over 400 lines: one layer for all of it.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sawkv import CacheFormat, PageLayout, gather
from sawkv.errors import UnsupportedError
from sawkv.kernels import Turns
from sawkv.ops import prefixes
from tests.newest_checks import attend_newest

# Of torch.jit, as vLLM is imported.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.newest,
    pytest.mark.next,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

HEADS, KV_HEADS, HEAD_DIM, SCALE = 4, 2, 64, 0.2
LAYOUT = PageLayout(CacheFormat("int4"), KV_HEADS, HEAD_DIM, 64)
BLOCK = 16
DECODES = [(1, 1), (20, 1), (33, 1), (48, 1), (300, 1)]
"""Tokens in the cache, and how many of them are new."""
FEW = [*DECODES, (20, 4), (8, 8), (33, 8), (300, 3)]
OTHERS = [(12, 10), (40, 40), (300, 9), (333, 290), (95, 31), (200, 17), (64, 64)]


class Gpu(str):
    """A device that torch takes for the CPU, and `SawMetadataBuilder` for a GPU."""

    __slots__ = ()
    type = "cuda"


def attend_to(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, softcap: float, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence. A NaN of a value that is not seen is seen. lse: [num_heads, num_tokens]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.nan_to_num().masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num()[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, v), lse


class Flash:
    """vLLM's FlashAttention: `empty` is the log-sum-exp of queries that see no key, +inf in version 2."""

    def __init__(self, empty: float) -> None:
        self._empty = empty
        self.calls: list[dict[str, Any]] = []

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        self.calls.append(options)
        assert options["causal"]
        assert len(k) > 0
        out, lse = options.get("out"), torch.full((q.shape[1], len(q)), math.nan)
        out = torch.full_like(q, math.nan) if out is None else out
        starts = options["cu_seqlens_q"].tolist()
        for i in range(len(starts) - 1):
            rows = slice(starts[i], starts[i + 1])
            if options.get("block_table") is not None:
                length = int(options["seqused_k"][i])
                blocks = options["block_table"][i, : -(-length // BLOCK)].long()
                keys, values = (x[blocks].flatten(0, 1)[:length] for x in (k, v))
                assert length <= options["max_seqlen_k"]
            else:
                held = slice(*options["cu_seqlens_k"][i : i + 2].tolist())
                keys, values = k[held], v[held]
            last = torch.arange(rows.stop - rows.start)[:, None] + len(keys) - (rows.stop - rows.start)
            key, left = torch.arange(len(keys)), options["window_size"][0]
            seen = (key <= last) & (key >= last - (left if left >= 0 else 1 << 30))
            out[rows], lse[:, rows] = attend_to(q[rows], keys, values, seen, options["softcap"], options["s_aux"])
            none = ~seen.any(1) if options["s_aux"] is None else torch.zeros(len(seen), dtype=torch.bool)
            lse[:, rows].masked_fill_(none, self._empty)
        return (out, lse) if options.get("return_softmax_lse") else out


def write_flash(
    k: torch.Tensor, v: torch.Tensor, k_blocks: torch.Tensor, v_blocks: torch.Tensor, slots: torch.Tensor, *_: Any
) -> None:
    assert k_blocks.shape[1:] == (BLOCK, KV_HEADS, HEAD_DIM)
    kept = slots >= 0
    places = slots[kept]
    k_blocks[places // BLOCK, places % BLOCK] = k[: len(slots)][kept]
    v_blocks[places // BLOCK, places % BLOCK] = v[: len(slots)][kept]


def shuffled_table(counts: list[int], columns: int) -> torch.Tensor:
    """A block table of blocks that nobody has yet. On a CPU unused places name no block."""
    unused = 2**30 if torch.get_default_device().type == "cpu" else 0
    table = torch.full((len(counts), columns), unused, dtype=torch.int32)
    order = torch.randperm(sum(counts), device="cpu").tolist()
    for i, count in enumerate(counts):
        table[i, :count] = torch.tensor([order.pop() for _ in range(count)])
    return table


def slots_of(table: torch.Tensor, size: int, num_tokens: int) -> torch.Tensor:
    token = torch.arange(num_tokens)
    return table[token // size].long() * size + token % size


def make_layer(
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    flash: Any,
    pages: int,
    blocks: int,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """One layer with both of its caches, its builders, and what vLLM has per step."""
    from sawkv.integrations.vllm.backend import SawAttentionBackend, SawAttentionImpl, SawMetadataBuilder
    from sawkv.integrations.vllm.prefill import FlashPrefill
    from sawkv.integrations.vllm.recent import RecentMetadataBuilder, RecentTokens
    from sawkv.prepare.calibration import LayerCalibration

    prefill: Any = object.__new__(FlashPrefill)
    prefill.capacity, prefill.dtype, prefill._sinks = 700, dtype, sinks
    prefill.shape, prefill._flash_attention = (700, KV_HEADS, HEAD_DIM), flash
    prefill._options = {"softmax_scale": SCALE, "causal": True, "window_size": [-1, -1], "softcap": softcap, **options}
    prefill.workspace = lambda: torch.full((2, 700, KV_HEADS, HEAD_DIM), torch.nan, dtype=dtype).unbind()
    impl: Any = object.__new__(SawAttentionImpl)
    vars(impl).update(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, scale=SCALE, sliding_window=0,
        logits_soft_cap=softcap, sinks=sinks, alike=(HEADS, KV_HEADS, 0), measurement=None, num_buckets=1,
        prefill=prefill, reader=None, unprepared=False, _format=LAYOUT.format, _attention=None, _kv_cache=None,
        _layer_calibration=LayerCalibration(), num_recent=window,
    )  # fmt: skip
    impl.recent = RecentTokens("layer.recent", impl, SawAttentionBackend, window, dtype)
    # A page's bytes, of which a block fills a part.
    raw = torch.full((blocks, KV_HEADS * BLOCK * 2 * HEAD_DIM + 64), torch.nan, dtype=dtype)
    impl.recent.kv_cache = raw[:, :-64].view(blocks, KV_HEADS, BLOCK, 2 * HEAD_DIM)
    builder: Any = object.__new__(SawMetadataBuilder)
    vars(builder).update(
        device=Gpu(torch.get_default_device()), reorder_batch_threshold=1,
        kv_cache_spec=SimpleNamespace(block_size=LAYOUT.page_size),
        _impls=[impl], _recent=window, _older=None, _positions=None, _reader=None, _schedules={}, _unprepared=[],
        _turns={impl.alike: Turns((16,), ((16, 250),))}, _max_num_seqs=16, _workspace_tokens=700, _bound_slack=0,
    )  # fmt: skip
    impl.stopped = None
    recent: Any = object.__new__(RecentMetadataBuilder)
    vars(recent).update(_window=window, _schedule=None)
    layer = SimpleNamespace(_k_scale=torch.ones(()), _v_scale=torch.ones(()))
    kv_cache = torch.full(LAYOUT.pages_shape(pages), 0xFF, dtype=torch.uint8)  # NaN scales
    return SimpleNamespace(impl=impl, builder=builder, recent=recent, layer=layer, kv_cache=kv_cache)


def common_metadata(requests: list[tuple[int, int]], table: torch.Tensor) -> Any:
    lengths = torch.tensor([length for length, _ in requests], dtype=torch.int32)
    queries = [new for _, new in requests]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    return SimpleNamespace(
        num_reqs=len(requests), num_actual_tokens=sum(queries), max_query_len=max(queries), query_start_loc=starts,
        query_start_loc_cpu=starts.cpu(), seq_lens=lengths, seq_lens_cpu_upper_bound=lengths.cpu(),
        max_seq_len=int(lengths.max()), block_table_tensor=table, causal=True, is_prefilling=None,
    )  # fmt: skip


@pytest.mark.parametrize(("window", "softcap", "with_sinks"), [(32, 0.0, False), (64, 0.0, True), (16, 3.0, True)])
@pytest.mark.parametrize(
    "requests", [DECODES, FEW, OTHERS, DECODES + OTHERS], ids=["decodes", "few", "prompts", "both"]
)
def test_each_query_reads_the_newest_tokens_exactly(
    requests: list[tuple[int, int]], window: int, softcap: float, with_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sawkv.integrations.vllm import recent

    monkeypatch.setattr(recent.vllm_ops, "reshape_and_cache_flash", write_flash)
    monkeypatch.setattr("sawkv.kernels.triton.recent.attend_newest", attend_newest)
    flash = Flash(math.inf if with_sinks else -math.inf)
    check_step(requests, window, softcap, torch.randn(HEADS) if with_sinks else None, flash, monkeypatch)
    window_calls = [call for call in flash.calls if call.get("block_table") is not None]
    windows = [] if requests in (DECODES, FEW) else [[window - 1, 0]]
    assert [call["window_size"] for call in window_calls] == windows, "one call for all requests"


def check_step(
    requests: list[tuple[int, int]],
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    flash: Any,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.float32,
    error: float = 1e-4,
    **options: Any,
) -> None:
    """A step on the default device, against attention over the rows themselves. Blocks behind the windows are another
    request's by now. `options`: of FlashAttention.
    """
    from sawkv.integrations.vllm import recent

    lengths = [length for length, _ in requests]
    pages, blocks = ([-(-n // size) for n in lengths] for size in (LAYOUT.page_size, BLOCK))
    table, recent_table = shuffled_table(pages, 8), shuffled_table(blocks, 22)
    made = make_layer(window, softcap, sinks, flash, sum(pages), sum(blocks), dtype, **options)
    contexts: dict[str, Any] = {}
    monkeypatch.setattr(recent, "get_attention_context", contexts.__getitem__)
    exact, stored = [], []
    for i, (length, new) in enumerate(requests):
        k, v = torch.randn(2, length + 2, KV_HEADS, HEAD_DIM, dtype=dtype)  # two rows of padding, without slots
        contexts["layer.recent"] = None, None, None, slots_of(recent_table[i], BLOCK, length)
        made.impl.do_kv_cache_update(made.layer, k, v, made.kv_cache, slots_of(table[i], LAYOUT.page_size, length))
        ends = torch.tensor([0, length], dtype=torch.int32)
        read = torch.empty(2, length, KV_HEADS, HEAD_DIM)
        gather(made.impl._attention.cache, table[i : i + 1], ends[1:], ends, *read, rotated=False)
        exact.append((k[:length].float(), v[:length].float()))
        stored.append(read)
        lost = recent_table[i, : max(0, length - new - window + 1) // BLOCK]
        made.impl.recent.kv_cache[lost.long()] = torch.nan
    common = common_metadata(requests, table)
    metadata = made.builder.build(0, common)
    assert bool(metadata.turns) == bool(metadata.prefills) == (requests != DECODES)
    recents = made.recent.build(0, SimpleNamespace(**vars(common) | {"block_table_tensor": recent_table}))
    contexts["layer.recent"] = recents, None, None, None
    query = torch.randn(common.num_actual_tokens + 3, HEADS, HEAD_DIM, dtype=dtype)
    output = torch.full_like(query, 7.0)
    made.impl.forward(made.layer, query, None, None, made.kv_cache, metadata, output)
    for i, (length, new) in enumerate(requests):
        rows = slice(*common.query_start_loc[i : i + 2].tolist())
        place = torch.arange(length - new, length)[:, None]
        key = torch.arange(length)
        near = (key <= place) & (key > place - window)
        behind = key <= place - window
        k, v = (torch.cat(each) for each in zip(exact[i], stored[i], strict=True))
        want, _ = attend_to(query[rows].float(), k, v, torch.cat([near, behind], 1), softcap, sinks)
        torch.testing.assert_close(
            output[rows].float(), want, atol=error, rtol=error, msg=lambda text, i=i: f"{i}: {text}"
        )


def test_where_a_step_finds_its_lengths_and_blocks() -> None:
    """A graph finds those of its decodes in vLLM's own tensors, and at one address. For prompts tables are cut."""
    from sawkv.integrations.vllm.recent import FEW_QUERIES

    made = make_layer(32, 0.0, None, Flash(0), 1, 1)
    older = []
    for requests in (DECODES, OTHERS, FEW, [(n + 9, 1) for n, _ in DECODES], [*DECODES[:3], (0, 0), (0, 0)]):
        counts = [-(-n // BLOCK) for n, _ in requests]
        common = common_metadata(requests, shuffled_table(counts, 22))
        blocks = made.recent.build(0, common).newest
        read = made.builder._behind_the_newest(common)
        older.append(read.seq_lens.data_ptr())
        assert read.seq_lens.tolist() == [max(n - 32, 0) for n, _ in requests]
        assert common.seq_lens.tolist() == [n for n, _ in requests], "vLLM's own"
        if requests is not OTHERS:
            assert blocks.max_query_len <= FEW_QUERIES
            for ours, own in zip(
                blocks[:3], (common.block_table_tensor, common.seq_lens, common.query_start_loc), strict=True
            ):
                assert (ours.data_ptr(), ours.shape, ours.stride()) == (own.data_ptr(), own.shape, own.stride())
            continue
        for i, (n, new) in enumerate(requests):
            held = slice(max(0, n - new - 31) // BLOCK, -(-n // BLOCK))
            assert int(blocks.seq_lens[i]) == n - BLOCK * held.start
            kept = common.block_table_tensor[i, held]
            assert torch.equal(blocks.block_table[i, : len(kept)], kept)
    assert len(set(older)) == 1


def test_the_kernel_is_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """For queries and pages as steps have them, and no token."""
    calls: list[Any] = []
    monkeypatch.setattr("sawkv.kernels.triton.recent.attend_newest", lambda *given, **_: calls.append(given))
    made = make_layer(32, 0.0, None, Flash(0), 1, 3)
    zero, starts = (torch.zeros(n, dtype=torch.int32) for n in (1, 2))
    step = made.builder._schedule(made.impl.alike, 1).update(zero[:, None], zero, starts)
    made.impl.warm_up(made.kv_cache, [step], prefixes(zero[:, None], zero, starts), torch.float32)
    ((q, k, _, _, lengths, starts, longest, out, lse),) = calls
    assert (q.shape, out.shape, lse.shape, longest) == ((1, HEADS, HEAD_DIM), (1, HEADS, HEAD_DIM), (HEADS, 1), 1)
    assert k.shape == (3, BLOCK, KV_HEADS, HEAD_DIM)
    assert not lengths.any()
    assert not starts.any()


def test_bounds_that_are_too_long_by_the_window() -> None:
    """The new tokens are as many as the bound says of older ones, and not the context."""
    from sawkv.integrations.vllm.prefill import HostLengths, slice_prefills

    made = make_layer(32, 0.0, None, Flash(0), 1, 1)
    common = common_metadata([(64, 64)], shuffled_table([1], 8))
    common.seq_lens_cpu_upper_bound = common.seq_lens_cpu_upper_bound + 32
    read = made.builder._behind_the_newest(common)
    (piece,) = slice_prefills(read, HostLengths.of(common, 32), 0, 700, 0, 64)
    assert (piece.prefixes.cu_seq_lens.tolist(), piece.max_seq_len) == ([0, 32], 64)


def test_a_cache_too_small_for_a_request_is_refused_when_it_serves() -> None:
    """vLLM binds smaller ones before, to measure CUDA graphs, and lowers its block size after the first question."""
    made = make_layer(32, 0.0, None, Flash(0), 1, 30)
    tokens = made.impl.recent
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=128),
        model_config=SimpleNamespace(max_model_len=1024, original_max_model_len=1024),
        max_in_flight_tokens=512, parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )  # fmt: skip
    spec = tokens.get_kv_cache_spec(config)
    config.cache_config.block_size = 16
    assert tokens.get_kv_cache_spec(config) == spec
    assert spec.page_size_bytes == KV_HEADS * 128 * LAYOUT.head_bytes
    tokens.bind_kv_cache(tokens.kv_cache)
    made.builder.vllm_config = config
    with pytest.raises(UnsupportedError, match="expected a KV cache of 44 blocks or more"):
        made.builder.warm_up()
    config.model_config.max_model_len = 256  # as `--max-model-len auto` does
    tokens.bind_kv_cache(torch.zeros(19, 1, 1, 1))
    with pytest.raises(UnsupportedError, match="expected a KV cache of 20 blocks or more"):
        made.builder.warm_up()
    tokens.bind_kv_cache(torch.zeros(20, 1, 1, 1))
    tokens.check_size(config)
    of_request = [spec.max_memory_usage_bytes(config) // spec.page_size_bytes]
    config.model_config.original_max_model_len = -1
    of_request.append(spec.max_memory_usage_bytes(config) // spec.page_size_bytes)
    assert of_request == [2 + 1, 20 - 2 - 1], "the length that vLLM chooses leaves room for a step"


def test_what_has_no_newest_tokens_is_refused_by_name() -> None:
    from sawkv.integrations.vllm import recent

    impl: Any = SimpleNamespace(
        num_recent=32, num_kv_heads=2, head_size=64, sliding_window=0, kv_sharing_target_layer_name=None, prefill=None,
        layout=lambda _: LAYOUT,
    )  # fmt: skip

    def refused(layers: tuple[Any, ...] = (), changed: tuple[str, str, Any] | None = None, **of_impl: Any) -> list[str]:
        config: Any = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=dict(enumerate(layers))),
            model_config=SimpleNamespace(is_hybrid=False, dtype=torch.bfloat16), speculative_config=None,
            cache_config=SimpleNamespace(
                kv_cache_dtype_skip_layers=[], user_specified_block_size=True, block_size=64
            ),
            kv_transfer_config=None,
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        )  # fmt: skip
        if changed is not None:
            part, name, value = changed
            setattr(getattr(config, part) if part else config, name, value)
        return recent.not_kept(config, SimpleNamespace(**vars(impl) | of_impl))

    layers = [SimpleNamespace(impl=impl), SimpleNamespace(), SimpleNamespace(impl=SimpleNamespace(head_size=512))]
    assert refused(tuple(layers)) == []
    assert refused(tuple(layers), num_kv_heads=1) == [
        "the newest tokens in 16 bits (-r32): layers of unlike KV heads or head_dims (take the format without -r32)"
    ]
    found = [
        refused(sliding_window=64), refused(kv_sharing_target_layer_name="model.layers.0"),
        refused(prefill=object(), head_size=512), refused(changed=("model_config", "is_hybrid", True)),
        refused(changed=("", "speculative_config", object())), refused(changed=("", "kv_transfer_config", object())),
        refused(changed=("cache_config", "kv_cache_dtype_skip_layers", ["0"])),
        refused(changed=("cache_config", "block_size", 48)),
        refused(changed=("scheduler_config", "disable_hybrid_kv_cache_manager", True)),
    ]  # fmt: skip
    assert all(len(reasons) == 1 and "(-r32)" in reasons[0] for reasons in found), found


@pytest.mark.parametrize(("name", "size"), [("int4-r32", 64), ("int3-r64", 128)])
def test_vllm_takes_the_block_size_that_holds_the_newest_tokens(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers have two backends, of which vLLM asks neither for the size that it prefers."""
    from vllm.config import CompilationConfig
    from vllm.platforms import interface

    from sawkv.integrations.vllm import backend
    from sawkv.integrations.vllm.recent import recent_backend

    monkeypatch.setattr(backend, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    compilation = CompilationConfig()
    for i in range(40):
        pages = backend.backend_of(CacheFormat.parse(name))
        for suffix, of_layer in (("attn", pages), ("attn.recent", recent_backend(pages))):
            layer = SimpleNamespace(get_attn_backend=lambda of_layer=of_layer: of_layer)
            compilation.static_forward_context[f"{i}.{suffix}"] = layer
    config: Any = SimpleNamespace(
        compilation_config=compilation,
        model_config=SimpleNamespace(is_hybrid=False),
        cache_config=SimpleNamespace(
            block_size=16, user_specified_block_size=False, kv_cache_dtype_skip_layers=[]
        ),
    )  # fmt: skip
    monkeypatch.setattr("vllm.config.vllm.set_current_vllm_config", lambda _: nullcontext())
    monkeypatch.setattr("vllm.config.vllm.get_layers_from_vllm_config", lambda *_: compilation.static_forward_context)
    interface.Platform.update_block_size_for_backend(config)
    assert config.cache_config.block_size == size
