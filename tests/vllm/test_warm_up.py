"""What is compiled before an engine serves: everything that any step may call. On the CPU, with stand-ins for compilers
and GPUs.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sawkv import CacheFormat, PageLayout
from sawkv.kernels import Turns

# Of torch.jit, as vLLM is imported.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Flash4:
    """The kernels that FlashAttention 4 (vLLM 0.33) compiles on a GPU with 132 processors, by its own rules."""

    def __init__(self, tile: int, tiles_per_block: int) -> None:
        self._tile, self._tiles_per_block = tile, tiles_per_block
        self.compiled: set[tuple[Any, ...]] = set()

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, num_splits: int = 0, **options: Any
    ) -> None:
        assert q.shape == out.shape
        num_seqs, num_kv_heads, group = len(options["cu_seqlens_q"]) - 1, k.shape[1], q.shape[1] // k.shape[1]
        rows = options["max_seqlen_q"] * group
        stages = self._tiles_per_block if rows > self._tile else 1
        blocks = num_seqs * num_kv_heads * -(-rows // (stages * self._tile))
        tiles = -(-options["max_seqlen_k"] // 64)
        splits = num_splits or (1 if tiles <= 4 else max(1, min(132 // blocks, 128, tiles)))
        is_short = rows <= stages * self._tile and splits == 1
        self.compiled.add(("forward", stages, splits > 1, is_short, num_seqs > 256))
        if splits > 1:
            self.compiled.add(("combine", max((splits - 1).bit_length(), 4 if q.shape[2] <= 64 else 5)))


def flash_prefill(flash: Any, version: int, head_dim: int, num_kv_heads: int) -> Any:
    from sawkv.integrations.vllm.prefill import FlashPrefill

    prefill: Any = object.__new__(FlashPrefill)
    prefill.capacity, prefill.dtype = 40_000, torch.bfloat16
    prefill.shape, prefill._sinks, prefill._flash_attention = (prefill.capacity, num_kv_heads, head_dim), None, flash
    prefill._options = {"fa_version": version}
    prefill.workspace = lambda: torch.zeros(2, 16, num_kv_heads, head_dim, dtype=torch.bfloat16).unbind()
    return prefill


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "tile", "tiles_per_block"),
    [(512, 16, 2, 64, 1), (512, 32, 4, 64, 1), (128, 32, 8, 128, 2), (64, 64, 8, 128, 2), (64, 8, 8, 192, 1)],
)
@pytest.mark.parametrize("most_seqs", [64, 1024])
def test_flash_attention_4_compiles_nothing_later(
    head_dim: int, heads: int, kv_heads: int, tile: int, tiles_per_block: int, most_seqs: int
) -> None:
    """Prompts of all lengths, alone and with others, over contexts of all lengths."""
    flash = Flash4(tile, tiles_per_block)
    prefill = flash_prefill(flash, 4, head_dim, kv_heads)
    prefill.warm_up(heads, most_seqs)
    compiled = set(flash.compiled)
    q, k = torch.zeros(2, heads, head_dim), torch.zeros(2, kv_heads, head_dim)
    for query_len in (*range(1, 300), 1000, 16384):
        for num_seqs in {1, 2, 5, 40, 256, 257, most_seqs} & set(range(most_seqs + 1)):
            for context in (query_len, query_len + 300, query_len + 5000, 40_000):
                starts = torch.zeros(num_seqs + 1, dtype=torch.int32)
                prefill._attend(q, k, k, q, starts, starts, query_len, context)
    assert flash.compiled == compiled
    assert {kernel[0] for kernel in compiled} == {"forward", "combine"}


def test_older_flash_attention_comes_compiled() -> None:
    flash = Flash4(128, 1)
    flash_prefill(flash, 3, 128, 8).warm_up(32, 1024)
    assert not flash.compiled


def make_builder(layout: PageLayout, window: int, device: str, version: int = 3) -> tuple[Any, Any]:
    """Of two layers with 32 query heads, unprepared, and one of the layers."""
    from sawkv.integrations.vllm.backend import SawAttentionImpl, SawMetadataBuilder
    from sawkv.prepare.calibration import LayerCalibration

    impl: Any = object.__new__(SawAttentionImpl)
    impl.num_heads, impl.num_kv_heads, impl.head_size, impl.sliding_window = 32, 8, layout.head_dim, window
    impl.alike, impl.scale, impl.logits_soft_cap, impl.sinks = (32, 8, window), 0.1, 0.0, None
    impl._format, impl._attention, impl._kv_cache, impl.reader, impl.recent = layout.format, None, None, None, None
    impl.unprepared, impl.num_buckets, impl._layer_calibration = True, 3, LayerCalibration()
    impl.prefill = flash_prefill(None, version, layout.head_dim, 8)
    impl.prefill.workspace = lambda: torch.zeros(
        2, 64, 8, layout.head_dim, dtype=torch.bfloat16, device=device
    ).unbind()
    builder: Any = object.__new__(SawMetadataBuilder)
    builder.device, builder.layer_names, builder._max_num_seqs = torch.device(device), ["a", "b"], 64
    builder._impls, builder._schedules, builder._reader = [impl, impl], {}, None
    builder._turns = {impl.alike: Turns((16, 128), ((16, 1024), (128, 8192)))}
    builder.kv_cache_spec = SimpleNamespace(block_size=layout.page_size)
    builder._decode_query_len = lambda: 1
    layer = SimpleNamespace(
        impl=impl, kv_cache=torch.zeros(layout.pages_shape(4), dtype=torch.uint8, device=builder.device)
    )
    builder.vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"a": layer, "b": layer}),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
    )
    return builder, layer


@pytest.mark.parametrize("format_name", ["int4", "int3v2"])
@pytest.mark.parametrize("window", [0, 1024])
def test_every_cuda_kernel_of_a_layer(format_name: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """append, gather, decode and extend for both numbers of rows, and what they add."""
    from sawkv.kernels import cuda

    loaded: list[tuple[str, str, int]] = []

    def load(
        source_file: str, name: str, defines: dict[str, Any], device: torch.device, family: str = ""
    ) -> SimpleNamespace:
        def launch(*_: Any, **__: Any) -> None:
            loaded.append((source_file, name, defines.get("CHUNK_ROWS", 0)))

        return SimpleNamespace(launch=launch, read_constant=lambda _: 64)

    monkeypatch.setattr(cuda.runtime, "load", load)
    monkeypatch.setattr(cuda, "_stream", lambda _: 0)
    monkeypatch.setattr("sawkv.ops.select_backend", lambda *_: cuda)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    )
    builder, layer = make_builder(PageLayout(CacheFormat(format_name), 8, 128, 64), window, "cpu")
    warmed: list[tuple[int, int]] = []
    layer.impl.prefill.warm_up = lambda *arguments: warmed.append(arguments)
    builder.warm_up()
    turns = {("extend.cu", name, rows) for name in ("sawkv_extend", "sawkv_merge") for rows in (64, 128)}
    assert set(loaded) == turns | {
        ("append.cu", "sawkv_append", 0),
        ("gather.cu", "sawkv_gather", 0),
        ("schedule.cu", "sawkv_schedule", 0),
        ("decode.cu", "sawkv_decode", 8),
        ("decode.cu", "sawkv_merge", 8),
    }
    assert warmed == [(32, 64)], "once for layers of one kind"
    assert not layer.kv_cache.any()


def test_layers_count_after_the_warm_up() -> None:
    """The warm-up is the first to bind a layer to its pages."""
    from sawkv.integrations.vllm.metrics import CountedLayer, CounterReader

    layout = PageLayout(CacheFormat("int4"), 8, 128, 64)
    builder, layer = make_builder(layout, 0, "cpu")
    layer.impl.prefill, layer.impl.reader_place = None, 0
    builder._turns = {layer.impl.alike: None}
    builder._reader = layer.impl.reader = CounterReader(layout.rows, [CountedLayer("a")], torch.device("cpu"), None)
    builder.warm_up()
    counters = layer.impl._attention.cache.counters
    assert counters is not None
    assert not counters.any(), "the warm-up counts nothing"
    assert counters.data_ptr() == builder._reader.counters.data_ptr()


def test_a_worker_warms_up_before_vllm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from sawkv.integrations.vllm import warm_up

    order: list[str] = []

    class Worker:
        def compile_or_warm_up_model(self) -> str:
            order.append("vllm")
            return "times"

    class Wrapper:  # vLLM's, which passes on what it lacks
        def __init__(self, worker: Any) -> None:
            self.worker = worker

        def __getattr__(self, name: str) -> Any:
            return getattr(self.worker, name)

    monkeypatch.setattr(warm_up, "warm_up", lambda _: order.append("sawkv"))
    for worker in (Worker(), Wrapper(Worker())):
        warm_up.arrange(worker)
        assert functools.partial(getattr(worker, "compile_or_warm_up_model"))() == "times"  # noqa: B009
    assert order == ["sawkv", "vllm"] * 2
