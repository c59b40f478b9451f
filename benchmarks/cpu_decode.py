"""Decode speed of vLLM on the CPU: sawkv's INT4 pages against vLLM's own 16-bit attention, in turns, in one run.

    python -m benchmarks.cpu_decode models/sawkv-6m

Each turn is a fresh process that holds `--seqs` sequences of `--context` tokens and decodes `--steps` tokens of each.
The time of a step is the median of vLLM's steps in which every sequence decodes, so prefill and start-up do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.plots import append_record
from sawkv.cli import end_as_by_ctrl_c


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--seqs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=["16-bit", "int4", "int8"])
    parser.add_argument("--out", type=Path, help="append the result as a line of JSON")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        print(json.dumps(_turn(args)))
        return
    end_as_by_ctrl_c()
    medians: dict[str, list[float]] = {name: [] for name in args.formats}
    for _ in range(args.repeats):
        for name in args.formats:
            env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            command = [sys.executable, "-m", "benchmarks.cpu_decode", *sys.argv[1:], "--turn", name]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            medians[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{name}: {medians[name][-1] * 1e3:.2f} ms a step", file=sys.stderr, flush=True)
    base = statistics.median(medians[args.formats[0]])
    print(f"\n{args.seqs} sequences, {args.context} tokens of context, {os.cpu_count()} cores")
    print(f"{'KV cache':<18}{'ms a step':>11}{'decode tok/s':>15}{'ratio':>8}   spread")
    for name, values in medians.items():
        middle = statistics.median(values)
        record = {
            "kv_cache": name,
            "context": args.context,
            "seqs": args.seqs,
            "ms": round(middle * 1e3, 3),
            "ratio": round(base / middle, 3),
        }
        spread = f"{min(values) * 1e3:.2f}-{max(values) * 1e3:.2f}"
        print(f"{name:<18}{middle * 1e3:>11.2f}{args.seqs / middle:>15.1f}{base / middle:>8.2f}   {spread}")
        if args.out:
            append_record(args.out, record)


def _turn(args: argparse.Namespace) -> float:
    """Median seconds of a decode step with one cache format."""
    from vllm import LLM, SamplingParams

    dtype = {"16-bit": "auto", "int8": "int8_per_token_head"}.get(args.turn, "int4_per_token_head")
    llm = LLM(
        str(args.model),
        kv_cache_dtype=dtype,
        kv_cache_memory_bytes=512 << 20,
        max_model_len=args.context + args.steps + 16,
        max_num_seqs=args.seqs,
        enable_prefix_caching=False,
        additional_config={} if args.turn in ("16-bit", "int4", "int8") else {"sawkv": {"format": args.turn}},
    )
    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=args.steps, ignore_eos=True, detokenize=False)
    for i in range(args.seqs):
        ids = [(i * 7919 + j * 104729) % 3000 + 300 for j in range(args.context)]
        engine.add_request(str(i), {"prompt_token_ids": ids}, sampling)
    times = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == args.seqs and all(len(o.outputs[0].token_ids) > 1 for o in outputs):  # type: ignore[index]
            times.append(time.perf_counter() - start)
    if len(times) < args.steps // 2:
        raise RuntimeError(
            f"expected at least {args.steps // 2} steps with all {args.seqs} sequences decoding, got {len(times)}"
        )
    return statistics.median(times)


if __name__ == "__main__":
    main()
