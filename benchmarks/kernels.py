# Over 400 lines: many shapes, and the peers whose kernels are called for each.
"""Decode attention, append and gather on a GPU, beside the kernels they replace: checked first, then timed.

    python -m benchmarks.kernels                  # all shapes and peers, appended to docs/results/decode.jsonl
    python -m benchmarks.kernels --shapes 64x16384 --kernels sawkv-cuda --no-write
    python -m benchmarks.kernels --kernels sawkv-cuda,sawkv-cuda+prepared --no-write  # of a prepared model too
    python -m benchmarks.kernels --kernels fa3_bf16,sawkv-cuda,sawkv-cuda:int3,sawkv-cuda:int2+prepared --no-write
    python -m benchmarks.kernels --shapes "*_dim 256*,*_dim 512*" --kernels fa3_bf16,fa4_bf16,triton_bf16,sawkv-triton
    python -m benchmarks.kernels --check          # correctness only
    PYTHONPATH=OTHER/src python -m benchmarks.kernels --kernels sawkv-cuda --no-write    # another build of the kernels

`ms` is the median of triton's do_bench, which empties the L2 cache by writing before each run; `graph_ms` is the replay
of a CUDA graph over several caches, so that none is in L2 when its turn comes. The schedule, made once a step and not
once a layer, is timed apart.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton.testing

from benchmarks.engines import git_head
from benchmarks.plots import RESULTS, append_record
from sawkv import Attention, CacheFormat, PagedKVCache, PageLayout, Schedule, append, decode_attention, gather
from sawkv.format.constants import BUCKET_SIZE, ERROR_STEPS, MAX_WEIGHT
from sawkv.format.feedback import Feedback, channel_blocks
from sawkv.format.layout import ENGINE_PAGE_SIZE
from sawkv.kernels import unsupported_reason

BACKENDS = ("cuda", "triton")
COLD_BYTES = 400_000_000  # caches of a graph hold more than this together, several times the L2 cache
MAX_ERROR = 5e-3
GATHER = "sawkv-gather+fa3"
"""Of `turns`: today's other way for what has too many query rows for the pages to be read directly."""


@dataclass(frozen=True)
class Shape:
    """A batch: `lengths` tokens in the cache of each sequence."""

    name: str
    lengths: tuple[int, ...]
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page: int = ENGINE_PAGE_SIZE
    query_len: int = 1
    shared_prefix: int = 0  # tokens, whole pages, that all sequences have in common
    in_order: bool = False  # pages follow each other, as a new engine hands them out; else they are permuted
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def layout(self, kernel: str) -> PageLayout:
        """Of the pages that a kernel of ours reads; INT4's for a peer's."""
        return PageLayout(CacheFormat(format_of(kernel)), self.kv_heads, self.head_dim, self.page)

    def useful_bytes(self, kernel: str) -> int:
        """Codes and meta that a decode step must read, shared pages once."""
        tokens = sum(self.lengths) - (len(self.lengths) - 1) * self.shared_prefix
        return tokens * self.kv_heads * self.layout(kernel).head_bytes

    @property
    def record(self) -> dict[str, Any]:
        lengths = set(self.lengths)
        return {
            "shape": self.name,
            "batch": len(self.lengths),
            "context": max(lengths),
            "ragged": len(lengths) > 1,
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "page": self.page,
            "query_len": self.query_len,
            **({"shared_prefix": self.shared_prefix} if self.shared_prefix else {}),
            **({"in_order": True} if self.in_order else {}),
        }


def uniform(batch: int, context: int, **changes: Any) -> Shape:
    suffix = "".join(f" {key}" if value is True else f" {key} {value}" for key, value in changes.items())
    return Shape(f"{batch}x{context}{suffix}", (context,) * batch, **changes)


def all_shapes() -> list[Shape]:
    generator = torch.Generator().manual_seed(0)
    log_uniform = (128 * 256 ** torch.rand(64, generator=generator)).int().tolist()
    short = torch.randint(128, 2000, (127,), generator=generator).tolist()
    main = [
        (64, 16384),
        (32, 16384),
        (128, 4096),
        (256, 1024),
        (8, 16384),
        (1, 131072),
        (1, 32768),
        (256, 256),
        (32, 512),
        (1, 1024),
    ]
    heads = [(64, 8), (96, 8), (40, 8), (16, 2), (28, 4), (32, 32)]
    return [
        *(uniform(*shape) for shape in main),
        *(uniform(32, 16384, q_heads=q, kv_heads=kv) for q, kv in heads),
        *(uniform(32, 16384, head_dim=d) for d in (64, 96, 256)),
        *(uniform(32, 16384, head_dim=d, q_heads=16, kv_heads=2) for d in (256, 512)),  # Qwen3.5 35B-A3B, Gemma 4 26B
        uniform(32, 16384, query_len=4),
        *(uniform(32, 16384, page=page) for page in (16, 32)),
        uniform(32, 16384, head_dim=64, page=16),
        uniform(48, 16640),
        uniform(48, 16640, in_order=True),
        uniform(20, 8192),
        uniform(64, 16384, shared_prefix=12288),
        Shape("64 log-uniform 128..32768", tuple(log_uniform)),
        Shape("120000 beside 127 short", (*short[:64], 120_000, *short[64:])),
    ]


def turns() -> list[Shape]:
    """Few new tokens over what is cached, as agents send them."""
    new = [uniform(8, 65536, query_len=n) for n in (9, 16, 32, 64, 128, 256, 512, 1024)]
    shorter = [uniform(32, context, query_len=n) for context in (1024, 2048, 4096, 8192) for n in (16, 64, 256)]
    return [*new, *shorter, uniform(8, 65536, query_len=64, q_heads=64), uniform(8, 65536, query_len=64, head_dim=64)]


def choose(patterns: Sequence[str], *lists: Sequence[Shape]) -> list[list[Shape]]:
    """Of each list, the shapes whose names match one of the patterns.

    Raises:
        ValueError: a pattern matches no shape.
    """
    for pattern in patterns:
        if not any(fnmatchcase(shape.name, pattern) for shape in chain(*lists)):
            raise ValueError(f"--shapes: expected names of shapes, such as {lists[0][0].name}; got {pattern!r}")
    return [[shape for shape in shapes if any(fnmatchcase(shape.name, p) for p in patterns)] for shapes in lists]


@dataclass
class Batch:
    """Device tensors of one shape."""

    q: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    block_table: torch.Tensor
    num_pages: int

    @classmethod
    def make(cls, shape: Shape) -> Batch:
        pages = [-(-length // shape.page) for length in shape.lengths]
        num_pages = sum(pages) + 1
        ids = (torch.arange if shape.in_order else torch.randperm)(num_pages, device="cuda", dtype=torch.int32)
        # A kernel that reads too far faults.
        table = torch.full((len(pages), max(pages)), 2**30, dtype=torch.int32, device="cuda")
        start = 0
        for i, count in enumerate(pages):
            table[i, :count] = ids[start : start + count]
            start += count
        shared = shape.shared_prefix // shape.page
        table[:, :shared] = table[0, :shared]
        batch, n = len(shape.lengths), shape.query_len
        return cls(
            torch.randn(batch * n, shape.q_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16) * 1.5,
            torch.tensor(shape.lengths, dtype=torch.int32, device="cuda"),
            torch.arange(0, batch * n + 1, n, dtype=torch.int32, device="cuda"),
            table,
            num_pages,
        )


def constants_of(kernel: str, kv_heads: int, head_dim: int, context: int) -> dict[str, Any]:
    """What pages of `sawkv-BACKEND+feedback`, `sawkv-BACKEND+prepared` and `sawkv-BACKEND+buckets` are written with, at
    random; the second's with all there is but one center of K for all positions, the last's with all.
    """
    found: dict[str, Any] = {}
    if kernel.endswith(("+feedback", "+prepared", "+buckets")):
        layout = PageLayout(CacheFormat(format_of(kernel)), kv_heads, head_dim, ENGINE_PAGE_SIZE).rows
        rows, channels = layout.num_kv_heads, layout.head_dim
        earlier, later = channel_blocks(channels), channel_blocks(channels)[:, None]
        weights = torch.randint(-MAX_WEIGHT, MAX_WEIGHT + 1, (rows, channels, channels)) * (earlier < later)
        feedback = Feedback(
            weights.to("cuda", torch.int8), torch.full((rows,), 1 / MAX_WEIGHT / ERROR_STEPS, device="cuda")
        )
        found |= {"k_feedback": feedback, "v_feedback": feedback}
    if kernel.endswith(("+prepared", "+buckets")):
        found |= {name: torch.randn(kv_heads, head_dim, device="cuda") for name in ("k_center", "v_center")}
        found |= {name: 0.5 + torch.rand(kv_heads, head_dim, device="cuda") for name in ("k_gain", "v_gain")}
    if kernel.endswith("+buckets"):
        found["k_center"] = torch.randn(-(-context // BUCKET_SIZE), kv_heads, head_dim, device="cuda")
    return found


def backend_of(kernel: str) -> str:
    """That of a kernel of ours, `sawkv-BACKEND[:FORMAT][+CONSTANTS]`; of a peer, its name."""
    return "cuda" if kernel == GATHER else re.split("[:+]", kernel.removeprefix("sawkv-"))[0]


def format_of(kernel: str) -> str:
    """The codec of the pages."""
    return kernel.partition(":")[2].partition("+")[0] or "int4"


def fill(batch: Batch, shape: Shape, kernel: str) -> PagedKVCache:
    """A cache of random tokens; all slots that hold none have NaN for scales."""
    cache = PagedKVCache.allocate(
        shape.layout(kernel),
        batch.num_pages,
        "cuda",
        **constants_of(kernel, shape.kv_heads, shape.head_dim, max(shape.lengths)),
    )
    cache.pages.fill_(0xFF)
    for i, length in enumerate(shape.lengths):
        position = torch.arange(length, device="cuda")
        slots = batch.block_table[i, position // shape.page].long() * shape.page + position % shape.page
        k, v = torch.randn(2, length, shape.kv_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16) + 0.3
        append(k, v, cache, slots, position, backend=backend_of(kernel))
    return cache


def sawkv_decode(
    shape: Shape, batch: Batch, cache: PagedKVCache, backend: str
) -> tuple[Callable[[], torch.Tensor], Callable[[], object]]:
    """The call to time, and that of the schedule."""
    heads, device = shape.q_heads, cache.pages.device
    window = shape.options.get("sliding_window", 0)
    schedule = Schedule(
        cache.layout,
        device,
        num_q_heads=heads,
        max_num_seqs=len(shape.lengths),
        max_query_len=shape.query_len,
        sliding_window=window,
        backend=backend,
    )
    attention = Attention(
        cache, num_q_heads=heads, softmax_scale=shape.head_dim**-0.5, sliding_window=window, backend=backend
    )
    update = partial(schedule.update, batch.block_table, batch.seq_lens, batch.query_start_loc)
    return partial(attention, batch.q, update(), torch.full_like(batch.q, torch.nan)), update


def relative_error(shape: Shape, batch: Batch, cache: PagedKVCache, got: torch.Tensor) -> float:
    """Against fp32 attention over the decoded cache."""
    want = decode_attention(
        batch.q.float(),
        cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        softmax_scale=shape.head_dim**-0.5,
        max_query_len=shape.query_len,
        backend="reference",
    )
    return float((got.float() - want).norm() / want.norm())


def gather_and_attend(shape: Shape, batch: Batch, cache: PagedKVCache) -> Callable[[], torch.Tensor]:
    """What serves long prompts: pages are gathered into 16 bits, and FlashAttention-3 attends to these."""
    lengths = torch.tensor([0, *shape.lengths], device="cuda")
    starts, out = lengths.cumsum(0).int(), torch.full_like(batch.q, torch.nan)
    k, v = torch.empty(2, sum(shape.lengths), shape.kv_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)

    attend = flash_attention(shape, batch, batch.q, k, v, out, cu_seqlens_k=starts)

    def run() -> torch.Tensor:
        gather(cache, batch.block_table, batch.seq_lens, starts, k, v, rotated=False, backend="cuda")
        return attend()

    return run


def flash_attention(
    shape: Shape,
    batch: Batch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    version: int = 3,
    **where: Any,
) -> Callable[[], torch.Tensor]:
    """FlashAttention of a batch's queries. `where` says where the keys of each sequence are."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    def run() -> torch.Tensor:
        flash_attn_varlen_func(
            q,
            k,
            v,
            max_seqlen_q=shape.query_len,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_k=max(shape.lengths),
            softmax_scale=shape.head_dim**-0.5,
            causal=True,
            out=out,
            fa_version=version,
            **where,
        )
        return out

    return run


def peer_decode(name: str, shape: Shape, batch: Batch) -> Callable[[], torch.Tensor]:
    """The same attention by vLLM's kernels over their own caches, filled at random. FlashAttention 3 ends at head_dim
    256; beyond it vLLM takes FlashAttention 4, or Triton's.
    """
    if name == "vllm_int4_per_token_head":
        return vllm_int4(shape, batch)
    q = batch.q
    k, v = torch.randn(
        2, batch.num_pages, shape.page, shape.kv_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16
    )
    scales: dict[str, Any] = {}
    if name == "fa3_fp8":
        q, k, v = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
        one = torch.ones(len(shape.lengths), shape.kv_heads, device="cuda")
        scales = {"q_descale": one, "k_descale": one, "v_descale": one}
    if name == "triton_bf16":
        return triton_bf16(shape, batch, k, v)
    out, table = torch.empty_like(batch.q), batch.block_table.clamp(max=batch.num_pages - 1)
    where = {"seqused_k": batch.seq_lens, "block_table": table}
    return flash_attention(shape, batch, q, k, v, out, int(name[2]), **where, **scales)


def triton_bf16(shape: Shape, batch: Batch, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    common = triton_arguments(shape, batch)
    out: torch.Tensor = common["out"]

    def run() -> torch.Tensor:
        unified_attention(k=k, v=v, causal=True, q_descale=None, k_descale=None, v_descale=None, **common)
        return out

    return run


def triton_arguments(shape: Shape, batch: Batch) -> dict[str, Any]:
    """What vLLM's Triton backends pass to attention in 16 bits and over INT4: tensors of the step, and what they
    allocate for decoding, where long sequences are cut into segments.
    """
    segments, threshold = 16, max(1, 128 // shape.kv_heads)
    partial = torch.empty(threshold, shape.q_heads, segments, triton.next_power_of_2(shape.head_dim), device="cuda")
    return {
        "q": batch.q,
        "out": torch.empty_like(batch.q),
        "cu_seqlens_q": batch.query_start_loc,
        "max_seqlen_q": shape.query_len,
        "seqused_k": batch.seq_lens,
        "max_seqlen_k": max(shape.lengths),
        "softmax_scale": shape.head_dim**-0.5,
        "window_size": (-1, -1),
        "block_table": batch.block_table.clamp(max=batch.num_pages - 1),
        "softcap": 0,
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": segments,
        "softmax_segm_output": partial,
        "softmax_segm_max": partial[..., 0].clone(),
        "softmax_segm_expsum": partial[..., 0].clone(),
    }


def vllm_int4(shape: Shape, batch: Batch) -> Callable[[], torch.Tensor]:
    from vllm.v1.attention.ops.int4_per_token_head import unified_attention_int4

    row = shape.head_dim // 2 + 4
    pages = torch.randint(
        0, 256, (batch.num_pages, shape.page, shape.kv_heads, 2 * row), device="cuda", dtype=torch.uint8
    )
    words = pages.view(torch.float32)  # a scale after the codes of K, and one after those of V
    k_scale, v_scale = words[..., shape.head_dim // 8], words[..., (row + shape.head_dim // 2) // 4]
    k_scale.fill_(0.1), v_scale.fill_(0.1)
    common = triton_arguments(shape, batch)
    out: torch.Tensor = common["out"]

    def run() -> torch.Tensor:
        unified_attention_int4(
            k_cache=pages[..., :row],
            v_cache=pages[..., row:],
            sinks=None,
            alibi_slopes=None,
            use_alibi_sqrt=False,
            qq_bias=None,
            output_scale=None,
            mm_prefix_range=None,
            k_scale_cache=k_scale,
            v_scale_cache=v_scale,
            **common,
        )
        return out

    return run


def median_ms(run: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median"))


def graph_ms(runs: Sequence[Callable[[], object]]) -> float:
    """Milliseconds of one run in a CUDA graph of all of them, several times over."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    repeats = max(1, 16 // len(runs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for run in runs:
                run()
    times: list[float] = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        graph.replay()  # while a busy CPU takes its time to launch the next one, which is timed
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / repeats / len(runs))
    return sorted(times)[len(times) // 2]


def read_bandwidth() -> float:
    """GB/s at which this card reads 2 GiB."""
    x = torch.ones(1 << 29, device="cuda")
    return 2**31 / 1e6 / median_ms(x.sum)


def run_decode(
    shapes: list[Shape], kernels: list[str], only_check: bool, common: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    bandwidth = read_bandwidth()
    print(f"this card reads {bandwidth:.0f} GB/s")
    columns = (
        f"{'ms':>8s} {'graph':>8s} {'GB/s':>6s} {'of read':>7s} {'vs FA3':>6s} {'graph':>6s} {'error':>8s}  schedule"
    )
    print(f"{'shape':34s} {'kernel':26s} {columns}")
    for shape in shapes:
        torch.manual_seed(0)
        batch = Batch.make(shape)
        base: dict[str, Any] = {}
        for kernel in kernels:
            backend = backend_of(kernel)
            record = {**common, **shape.record, "kernel": kernel, "read_gb_s": round(bandwidth)}
            try:
                if backend in BACKENDS:
                    if reason := unsupported_reason(backend, torch.device("cuda", 0), shape.layout(kernel)):
                        print(f"{shape.name:34s} {kernel:26s} {reason}")
                        continue
                    cache = fill(batch, shape, kernel)
                    run, schedule = sawkv_decode(shape, batch, cache, backend)
                    if kernel == GATHER:
                        run = gather_and_attend(shape, batch, cache)
                    record["rel_err"] = relative_error(shape, batch, cache, run())
                    if not record["rel_err"] <= MAX_ERROR:
                        print(f"{shape.name:34s} {kernel:26s} WRONG: relative error {record['rel_err']:.2e}")
                        continue
                    if only_check:
                        print(f"{shape.name:34s} {kernel:26s} relative error {record['rel_err']:.2e}")
                        continue
                    record["schedule_ms"] = median_ms(schedule)
                    one = cache.pages.numel()
                    more = [Batch.make(shape) for _ in range(min(15, COLD_BYTES // one))]
                    filled = ((b, fill(b, shape, kernel)) for b in more)
                    runs = [run]
                    if kernel == GATHER:
                        runs += [gather_and_attend(shape, b, c) for b, c in filled]
                    else:
                        runs += [sawkv_decode(shape, b, c, backend)[0] for b, c in filled]
                else:
                    if only_check:
                        continue
                    run = peer_decode(kernel, shape, batch)
                    one = (
                        batch.num_pages
                        * shape.page
                        * shape.kv_heads
                        * shape.head_dim
                        * (4 if kernel.endswith("bf16") else 2)
                    )
                    runs = [run, *(peer_decode(kernel, shape, batch) for _ in range(min(15, COLD_BYTES // one)))]
                record["ms"], record["graph_ms"] = median_ms(run), graph_ms(runs)
            except Exception as error:
                print(f"{shape.name:34s} {kernel:26s} {type(error).__name__}: {str(error)[:200]}")
                continue
            finally:
                run = runs = cache = more = None  # type: ignore[assignment]
                torch.cuda.empty_cache()
            if kernel == "fa3_bf16":
                base = record
            record["useful_gb_s"] = shape.useful_bytes(kernel) / 1e6 / record["ms"]
            if base:
                record["speedup_vs_fa3_bf16"] = base["ms"] / record["ms"]
                record["graph_speedup_vs_fa3_bf16"] = base["graph_ms"] / record["graph_ms"]
            print(
                f"{shape.name:34s} {kernel:26s} {record['ms']:8.4f} {record['graph_ms']:8.4f}"
                f" {record['useful_gb_s']:6.0f} {record['useful_gb_s'] / bandwidth:7.1%}"
                f" {record.get('speedup_vs_fa3_bf16', 0):6.2f} {record.get('graph_speedup_vs_fa3_bf16', 0):6.2f}"
                f" {record.get('rel_err', 0):8.1e}  {record.get('schedule_ms', 0) * 1e3:.1f} us",
                flush=True,
            )
            yield record


def run_append(kernels: list[str], lengths: list[int], common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """append beside vLLM's BF16 write and a copy of as many bytes, on slots as a prefill writes them; bytes are checked
    first.
    """
    heads, head_dim, page, num_pages = 8, 128, ENGINE_PAGE_SIZE, 1024

    def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k, v = torch.randn(2, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        token = torch.arange(tokens, device="cuda")
        return k, v, torch.randperm(num_pages, device="cuda")[token // page] * page + token % page

    def sawkv_append(tokens: int, kernel: str) -> Callable[[], object]:
        backend, constants = backend_of(kernel), constants_of(kernel, heads, head_dim, 4 * BUCKET_SIZE)
        layout = PageLayout(CacheFormat(format_of(kernel)), heads, head_dim, page)
        caches = [PagedKVCache.allocate(layout, num_pages, "cuda", **constants) for _ in range(2)]
        k, v, slots = inputs(tokens)
        positions = torch.arange(tokens, device="cuda")
        for cache, name in zip(caches, (backend, "reference"), strict=True):
            cache.pages.fill_(0xA5)
            append(k, v, cache, slots, positions, backend=name)
        if not torch.equal(caches[0].pages, caches[1].pages):
            raise ValueError("WRONG: its bytes are not the reference's")
        return lambda: append(k, v, caches[0], slots, positions, backend=backend)

    def vllm_bf16(tokens: int) -> Callable[[], object]:
        from vllm import _custom_ops

        pages = torch.empty(2, num_pages, page, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        one = torch.ones(1, device="cuda")
        k, v, slots = inputs(tokens)
        return lambda: _custom_ops.reshape_and_cache_flash(k, v, pages[0], pages[1], slots, "auto", one, one)

    def copy(tokens: int) -> Callable[[], object]:
        read, written = 2 * head_dim, head_dim // 2 + 4
        x, y = torch.empty(2, tokens * heads * (read + written), device="cuda", dtype=torch.uint8)
        return lambda: y.copy_(x)

    peers = {"copy_of_as_many_bytes": copy, "vllm_bf16": vllm_bf16}
    own = sorted({kernel.partition("+")[0] for kernel in kernels if backend_of(kernel) in BACKENDS})
    for tokens in lengths:
        for kernel in (
            *peers,
            *own,
            *(f"{kernel}+{extra}" for kernel in own for extra in ("feedback", "prepared", "buckets")),
        ):
            make = peers.get(kernel) or partial(sawkv_append, kernel=kernel)
            try:
                # 8 sets of inputs together outgrow the L2 cache at 8,192 tokens.
                runs = [make(tokens) for _ in range(8)]
                ms, replayed = median_ms(runs[0]), graph_ms(runs)
            except Exception as error:
                print(f"append {tokens:5d} tokens  {kernel:24s} {type(error).__name__}: {str(error)[:200]}")
                continue
            yield {**common, "operation": "append", "kernel": kernel, "tokens": tokens, "ms": ms, "graph_ms": replayed}
            print(
                f"append {tokens:5d} tokens  {kernel:24s} {ms * 1e3:7.2f} us, graph {replayed * 1e3:7.2f} us",
                flush=True,
            )


def run_gather(kernels: list[str], common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """gather beside a copy of as many bytes."""
    shape = uniform(8, 16384)
    total = sum(shape.lengths)
    source = torch.empty(1 << 28, device="cuda", dtype=torch.uint8)
    copied = torch.empty_like(source)
    copy_gb_s = 2 * source.numel() / 1e6 / median_ms(lambda: copied.copy_(source))
    batch = Batch.make(shape)
    starts = torch.arange(0, total + 1, 16384, dtype=torch.int32, device="cuda")
    k_out, v_out = torch.empty(2, total, shape.kv_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    for kernel in kernels:
        if (backend := backend_of(kernel)) not in BACKENDS:
            continue
        for rotated in (True, False):
            try:
                cache = fill(batch, shape, kernel)
                arguments = (cache, batch.block_table, batch.seq_lens, starts, k_out, v_out)
                ms = median_ms(partial(gather, *arguments, rotated=rotated, backend=backend))
            except Exception as error:
                print(f"gather 8x16384 {kernel:22s} {type(error).__name__}: {str(error)[:200]}")
                continue
            moved = shape.useful_bytes(kernel) + 2 * k_out.numel() * k_out.element_size()
            share = moved / 1e6 / ms / copy_gb_s
            yield {
                **common,
                "operation": "gather",
                "kernel": kernel,
                "rotated": rotated,
                "ms": ms,
                "of_copy_bandwidth": round(share, 4),
            }
            print(
                f"gather 8x16384 {kernel:22s} rotated={rotated!s:5s} {ms * 1e3:7.1f} us, {share:.0%} of copy's"
                f" {copy_gb_s:.0f} GB/s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="*", help="names of shapes, comma-separated; * stands for any characters")
    parser.add_argument(
        "--kernels", default="fa3_bf16,sawkv-cuda,sawkv-cuda+prepared,sawkv-triton,fa3_fp8,vllm_int4_per_token_head"
    )
    parser.add_argument("--check", action="store_true", help="correctness only")
    parser.add_argument("--skip", default="", help="some of decode, turns and append, comma-separated")
    parser.add_argument("--append-tokens", default="1,64,256,8192", help="of append, comma-separated")
    parser.add_argument("--no-write", action="store_true", help="do not append to docs/results")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="of these sources, where they are not in a git repository")
    arguments = parser.parse_args()
    common = {
        "device": torch.cuda.get_device_name(),
        "commit": arguments.commit or git_head(),
        "torch": torch.__version__,
    }
    try:
        shapes, chosen_turns = choose(arguments.shapes.split(","), all_shapes(), turns())
    except ValueError as error:
        parser.error(str(error))
    kernels = arguments.kernels.split(",")
    skipped = arguments.skip.split(",")
    lengths = [int(part) for part in arguments.append_tokens.split(",")]
    of_turns = [kernel for kernel in kernels if kernel in ("fa3_bf16", "sawkv-cuda")]
    sections: dict[str, list[Iterator[dict[str, Any]]]] = {}
    if "decode" not in skipped:
        sections["decode.jsonl"] = [run_decode(shapes, kernels, arguments.check, common)]
    if "turns" not in skipped:
        sections["turns.jsonl"] = [run_decode(chosen_turns, [*of_turns, GATHER], arguments.check, common)]
    if "append" not in skipped and not arguments.check:
        sections["append_gather.jsonl"] = [run_append(kernels, lengths, common), run_gather(kernels, common)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, parts in sections.items():
        for record in chain(*parts):  # written one by one: a run that is stopped keeps what it has measured
            if not arguments.no_write:
                rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in record.items()}
                append_record(arguments.output / name, rounded)


if __name__ == "__main__":
    main()
