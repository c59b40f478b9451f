"""The cost of counting: append with and without counters, compared with the attention of the same step, on a CPU or a
GPU.

    python -m benchmarks.counters

Each step appends one token to each sequence of one layer. On a GPU a CUDA graph of `CALLS` calls is replayed, so that
only kernels count. Runs with and without counters alternate, and the smallest time of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from sawkv import Attention, CacheFormat, PagedKVCache, PageLayout, Schedule, append
from sawkv.format.counters import new_counters
from sawkv.kernels import select_backend

CALLS = 20
TURNS = 40
CONTEXT = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--q-heads", type=int, default=32)
    args = parser.parse_args()
    device = torch.device("cuda:0" if args.device == "cuda" else args.device)
    layout = PageLayout(CacheFormat("int4"), args.kv_heads, 128, 16)
    backend = select_backend(device, layout)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads of the CPU"
    print(
        f"{name}, {backend.name} backend, {layout.format}, {args.kv_heads} KV heads, context {CONTEXT}, microseconds a"
        " layer"
    )
    print(f"{'sequences':>9} {'append':>9} {'counted':>9} {'attention':>10} {'share of both':>14}")
    for num_seqs in (1, 8, 64) if device.type == "cpu" else (1, 8, 64, 256):
        plain, counted, attention = _measure(layout, num_seqs, args.q_heads, device)
        share = (counted - plain) / (plain + attention)
        print(f"{num_seqs:>9} {plain * 1e6:>9.2f} {counted * 1e6:>9.2f} {attention * 1e6:>10.2f} {share:>13.2%}")
    k, v = torch.randn(2, 8192, args.kv_heads, 128, device=device, dtype=torch.bfloat16)
    slots = torch.randperm(8192, device=device)
    caches = [_cache(layout, 512, device, counters) for counters in (None, new_counters(device))]
    plain, counted = _times([partial(append, k, v, cache, slots) for cache in caches], device)
    print(f"8192 tokens of a prompt: append {plain * 1e6:.1f}, counted {counted * 1e6:.1f}")


def _measure(layout: PageLayout, num_seqs: int, q_heads: int, device: torch.device) -> tuple[float, float, float]:
    """Seconds of append, of append with counters, and of attention."""
    pages = CONTEXT // layout.page_size
    k, v = torch.randn(2, num_seqs, layout.num_kv_heads, 128, device=device, dtype=torch.bfloat16)
    caches = [_cache(layout, num_seqs * pages, device, counters) for counters in (None, new_counters(device))]
    table = torch.randperm(num_seqs * pages, device=device).int().view(num_seqs, pages)
    context_k, context_v = torch.randn(2, num_seqs * CONTEXT, layout.num_kv_heads, 128, device=device)
    append(context_k, context_v, caches[0], torch.arange(num_seqs * CONTEXT, device=device))
    slots = table[:, -1].long() * layout.page_size
    lengths = torch.full((num_seqs,), CONTEXT, dtype=torch.int32, device=device)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
    q = torch.randn(num_seqs, q_heads, 128, device=device, dtype=torch.bfloat16)
    schedule = Schedule(layout, device, num_q_heads=q_heads, max_num_seqs=num_seqs, max_query_len=1)
    step = schedule.update(table, lengths, starts)
    attend = partial(Attention(caches[0], num_q_heads=q_heads, softmax_scale=128**-0.5), q, step)

    plain, counted = _times([partial(append, k, v, cache, slots) for cache in caches], device)
    return plain, counted, _times([attend], device)[0]


def _cache(layout: PageLayout, num_pages: int, device: torch.device, counters: torch.Tensor | None) -> PagedKVCache:
    return PagedKVCache(
        torch.zeros(layout.pages_shape(num_pages), dtype=torch.uint8, device=device), layout, counters=counters
    )


def _times(functions: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Least seconds of one call of each, taking turns."""
    runs = [_repeated(function, device) for function in functions]
    least = [float("inf")] * len(runs)
    for _ in range(TURNS):
        for i, run in enumerate(runs):
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            least[i] = min(least[i], (time.perf_counter() - start) / CALLS)
    return least


def _repeated(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(CALLS):
            function()

    repeat()  # compiles
    if device.type != "cuda":
        return repeat
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeat()
    return graph.replay


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
