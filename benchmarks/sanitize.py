"""The GPU kernels under compute-sanitizer, on small shapes: memory errors and races in shared memory.

    python -m benchmarks.sanitize                     # memcheck and racecheck, cuda and triton backends
    python -m benchmarks.sanitize --tools memcheck --backends cuda

Exits with 1 if a tool reports an error. Tensors come straight from cudaMalloc, so that memcheck sees each one's end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from sawkv import Attention, CacheFormat, PagedKVCache, PageLayout, Schedule, append, gather
from sawkv.format.feedback import Feedback
from sawkv.kernels import cuda, unsupported_reason

OPTIONS = {
    "memcheck": ["--report-api-errors", "no"],  # the driver's bindings ask for functions that older drivers do not have
    "racecheck": ["--num-cuda-barriers", "256"],  # how many to follow: those of PTX are not counted by itself
}
USUAL_PLACE = "/usr/local/cuda/bin"


@dataclass(frozen=True)
class Case:
    """One batch; each takes another path through the kernels."""

    lengths: tuple[int, ...] = (0, 1, 17, 700)
    query_len: int = 1
    group: int = 4
    head_dim: int = 128
    page_size: int = 16
    prepared: bool = True
    buckets: int = 1
    format_name: str = "int4"
    num_blocks: int = 0  # of the CUDA kernel; few take many tiles and chunks each, so that all rings wrap
    options: dict[str, Any] = field(default_factory=dict, hash=False)


CASES = (
    Case(),
    Case(prepared=False),
    Case(lengths=(9000, 40, 3), page_size=64),  # a sequence cut into chunks, merged by the second kernel
    Case(query_len=4, group=8),
    Case(query_len=8, group=16),
    Case(query_len=16, options={"sliding_window": 100}),
    Case(lengths=(9000, 40, 90), query_len=40, page_size=64, options={"sinks": torch.zeros(8)}),
    Case(head_dim=64, page_size=32),
    Case(head_dim=96, group=1),
    Case(head_dim=256, page_size=128, query_len=2),
    Case(head_dim=512, page_size=64, group=8, prepared=False),
    Case(lengths=(9000, 40, 3), head_dim=512, query_len=2, prepared=False),
    Case(lengths=(0, 1, 17, 3000), num_blocks=2),
    Case(lengths=(0, 1, 17, 3000), head_dim=256, page_size=64, group=8, num_blocks=2),
    Case(lengths=(0, 1, 17, 3000), head_dim=512, page_size=64, group=8, prepared=False, num_blocks=2),
    Case(lengths=(3, 900), head_dim=512, query_len=8, prepared=False, num_blocks=2),
    Case(lengths=(40, 900, 90), query_len=40, page_size=64, num_blocks=2),
    Case(options={"sliding_window": 100, "logit_softcap": 5.0}),
    Case(options={"sinks": torch.zeros(8)}),
    Case(lengths=(9000, 40, 3), buckets=3),  # a center of K for each bucket of positions
    Case(lengths=(9000, 40, 90), query_len=40, buckets=5, options={"logit_softcap": 5.0}),
    Case(format_name="int3"),
    Case(format_name="int2", lengths=(9000, 40, 3), page_size=64),
    Case(format_name="int2", lengths=tuple(range(1, 200, 9)), num_blocks=2),  # chunks of two KV heads
    Case(format_name="int4v3", query_len=4, group=8),
    Case(format_name="int3v2", head_dim=256, page_size=128, query_len=2),
    Case(format_name="int3", lengths=(900, 40, 90), query_len=40, page_size=64),
    Case(format_name="int4v2", lengths=(900, 40, 90), query_len=16, head_dim=64),
)


def run_cases(backend: str, formats: list[str], head_dims: list[int]) -> None:
    """What runs under the tool."""
    cuda.DEBUG_DEFINES["FOR_RACECHECK"] = 1  # see tiles.cuh
    device = torch.device("cuda", 0)
    for case in (case for case in CASES if case.format_name in formats and case.head_dim in head_dims):
        layout = PageLayout(CacheFormat(case.format_name), 2, case.head_dim, case.page_size)
        if reason := unsupported_reason(backend, device, layout):
            print(f"{backend}: {case}: {reason}")
            continue
        counts = [-(-length // case.page_size) for length in case.lengths]
        constants: dict[str, Any] = {}
        if case.prepared:  # centers and gains of K and V, and V's feedback
            weights = torch.randint(-9, 10, (2, case.head_dim, case.head_dim)) * torch.ones(
                case.head_dim, case.head_dim
            ).tril(-32)
            constants["v_feedback"] = Feedback(weights.to(device, torch.int8), torch.full((2,), 1e-4, device=device))
            for name in ("k_center", "v_center", "k_gain", "v_gain"):
                constants[name] = 0.5 + torch.rand(2, case.head_dim, device=device)
            if case.buckets > 1:
                constants["k_center"] = torch.rand(case.buckets, 2, case.head_dim, device=device)
        cache = PagedKVCache.allocate(layout, sum(counts), device, **constants)
        table = torch.full((len(counts), max(counts)), 2**30, dtype=torch.int32)
        starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        for i, count in enumerate(counts):
            table[i, :count] = torch.arange(starts[i], starts[i + 1])
        slots = torch.cat(
            [torch.arange(length) + start * case.page_size for length, start in zip(case.lengths, starts, strict=False)]
        )
        k, v = torch.randn(2, len(slots), 2, case.head_dim).to(device, torch.bfloat16)
        positions = torch.cat([torch.arange(length) for length in case.lengths]).to(device)
        append(k, v, cache, slots.to(device), positions, backend=backend)
        seq_lens = torch.tensor(case.lengths, dtype=torch.int32)
        query_start = torch.arange(len(counts) + 1, dtype=torch.int32) * case.query_len
        q = torch.randn(len(counts) * case.query_len, 2 * case.group, case.head_dim).to(device, torch.bfloat16)
        where = table.to(device), seq_lens.to(device)
        options: dict[str, Any] = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.options.items()
        }
        attention = Attention(
            cache, num_q_heads=q.shape[1], softmax_scale=case.head_dim**-0.5, backend=backend, **options
        )
        schedule = Schedule(
            layout,
            cache.pages.device,
            num_q_heads=q.shape[1],
            max_num_seqs=len(counts),
            max_query_len=case.query_len,
            sliding_window=options.get("sliding_window", 0),
            backend=backend,
        )
        if case.num_blocks and isinstance(schedule.kernel, cuda.Schedule):
            schedule.kernel.num_blocks = case.num_blocks
        out = attention(q, schedule.update(*where, query_start.to(device)))
        cu_seq_lens = torch.tensor([0, *case.lengths]).cumsum(0).int().to(device)
        for rotated in (True, False):
            gather(cache, *where, cu_seq_lens, k, v, rotated=rotated, backend=backend)
        if not bool(out.isfinite().all()):
            sys.exit(f"{backend}: {case}: the output is not finite")
        print(f"{backend}: {case}: ran", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tools", nargs="+", default=["memcheck", "racecheck"], help="of compute-sanitizer (default: %(default)s)"
    )
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    formats = sorted({case.format_name for case in CASES})
    parser.add_argument("--formats", nargs="+", default=formats, choices=formats, help="of pages (default: all)")
    dims = sorted({case.head_dim for case in CASES})
    parser.add_argument("--head-dims", nargs="+", type=int, default=dims, choices=dims, help="(default: all)")
    parser.add_argument("--inside", metavar="BACKEND", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run_cases(args.inside, args.formats, args.head_dims)
        return 0
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:{USUAL_PLACE}")
    if sanitizer is None:
        print(f"expected compute-sanitizer, of the CUDA toolkit, on PATH or in {USUAL_PLACE}", file=sys.stderr)
        return 2
    failed = []
    for backend in args.backends:
        for tool in args.tools:
            inside = [sys.executable, "-m", "benchmarks.sanitize", "--inside", backend]
            inside += ["--formats", *args.formats, "--head-dims", *map(str, args.head_dims)]
            print(f"--- {tool}, {backend}", flush=True)
            environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            if subprocess.run(
                [sanitizer, "--tool", tool, *OPTIONS.get(tool, []), "--error-exitcode", "1", *inside],
                check=False,
                env=environment,
            ).returncode:
                failed.append(f"{tool} of {backend}")
    print(f"failed: {', '.join(failed)}" if failed else "clean")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
