"""Throughput and latency of vLLM with several KV cache formats: one engine a format, all loads in it, one after the
other.

    python -m benchmarks.serving                                             # Qwen3-8B's shape, random weights
    python -m benchmarks.serving --formats int4-k128-v128 --loads 16384/512x48 --budget 240
    python -m benchmarks.serving --model qwen3.5-35b-a3b --formats bf16 fp8 int4 --loads 256/1024x256 32768/512x32
    python -m benchmarks.serving --table  # the table of what is recorded, nothing run

A load is INPUT/OUTPUTxREQUESTS in tokens, all requests sent at once, or PREFIX+NEW/OUTPUTxREQUESTS where they share a
prefix. Prompts are random tokens, the same ones for every format and no two alike, so the prefix cache serves shared
prefixes only; this is checked. Each load is written to docs/results/serving.jsonl as it ends, if the engine was alone
on the card when it started:

    output_tok_s            output tokens of all requests / seconds from sending the first request to the last token
    prefill_tok_s           prompt tokens of all requests, cached ones too / seconds until the last request has its
                            first token
    ttft_mean_s, ttft_p99_s from vLLM's RequestOutput.metrics: first token, since the request was sent
    tpot_p50_ms, tpot_p99_ms over requests, of each one's mean time between its tokens after the first
    kv_tokens               that the KV cache holds in requests of `context` tokens, as vLLM's log says: in hybrid
                            models and under sliding windows it depends on the context
    preemptions             requests that had to give their pages back and start again
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks import engines
from benchmarks.engines import say
from benchmarks.plots import append_record, read_records, serving_table
from benchmarks.shapes import ENGINE
from sawkv.cli import end_as_by_ctrl_c
from sawkv.integrations.vllm.client import held_tokens

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

LOADS: Final = (
    "16384/1x16",
    "256/1024x1",
    "256/1024x32",
    "256/1024x256",
    "16384/1024x8",
    "12288+4096/512x64",
    "16384/512x48",
    "16384/1024x64",
)
START_TIMEOUT: Final = 20.0
"""Seconds beyond its budget after which an engine is stopped that does not start. Loads end themselves."""


@dataclass(frozen=True)
class Load:
    """Requests that are sent at once; lengths in tokens."""

    shared_prefix: int
    new: int
    out: int
    requests: int

    @classmethod
    def parse(cls, name: str) -> Load:
        match = re.fullmatch(r"(?:(\d+)\+)?(\d+)/(\d+)x(\d+)", name, re.ASCII)
        if match is None or not all(map(int, match.groups("1"))):
            raise argparse.ArgumentTypeError(
                f"load: expected INPUT/OUTPUTxREQUESTS or PREFIX+NEW/OUTPUTxREQUESTS, got {name!r}"
            )
        prefix, new, out, requests = map(int, match.groups("0"))
        return cls(prefix, new, out, requests)

    def __str__(self) -> str:
        return f"{f'{self.shared_prefix}+' if self.shared_prefix else ''}{self.new}/{self.out}x{self.requests}"

    @property
    def inp(self) -> int:
        return self.shared_prefix + self.new

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The same prompts for every format."""
        draw = np.random.default_rng([self.shared_prefix, self.new, self.out, self.requests])
        prefix = draw.integers(0, vocab_size, self.shared_prefix).tolist()
        return [prefix + draw.integers(0, vocab_size, self.new).tolist() for _ in range(self.requests)]

    @property
    def record(self) -> dict[str, int]:
        shared = {"shared_prefix": self.shared_prefix} if self.shared_prefix else {}
        return {"inp": self.inp, "out": self.out, "requests": self.requests, **shared}


class OutOfTimeError(Exception):
    """A load was stopped at its deadline."""


def main() -> None:
    args = _arguments()
    if args.engine_of:
        _run_loads(args)
        return
    deadline, start = time.monotonic() + args.budget, 0.0
    end_as_by_ctrl_c()
    engine = json.dumps(ENGINE.get(args.model, {}) | args.engine)
    with engines.model_folder(args.model) as model:
        for name in [] if args.table else args.formats:
            left = deadline - time.monotonic()
            if left < start:
                print(f"{name}: skipped, the budget has no time for a start of {start:.0f} s", flush=True)
                continue
            log = engines.log_of(args, "serving", name)
            words = ["--model", model, "--engine", engine, "--commit", args.commit, "--budget", left]
            for record in engines.run_apart("benchmarks.serving", name, words, log, left + START_TIMEOUT):
                start = record.pop("start_s", start)
                if "format" not in record:
                    continue
                if (taken := engines.taken_gib(log)) > engines.ALONE_GIB:
                    print(f"{name}: not recorded, {taken:.1f} GiB of the card were taken: another process uses it")
                else:
                    append_record(args.output, record | {"kv_tokens": held_tokens(log)})
    print(f"\n{serving_table(read_records(args.output))}")


def _arguments() -> argparse.Namespace:
    parser = engines.arguments(__doc__, ["bf16", "int4-k128-v128", "fp8", "vllm_int4_per_token_head"], "serving.jsonl")
    parser.add_argument("--loads", nargs="+", type=Load.parse, default=[Load.parse(name) for name in LOADS])
    parser.add_argument(
        "--budget", type=float, default=3600, help="seconds for all of it; loads that would take longer are skipped"
    )
    parser.add_argument(
        "--limit", type=float, default=600, help="seconds for one load; it is stopped then (default: %(default)s)"
    )
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="more arguments of vllm.LLM")
    parser.add_argument("--table", action="store_true", help="print the table of what is recorded and stop")
    parser.add_argument("--engine-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_loads(args: argparse.Namespace) -> None:
    """In the format's own process: start vLLM, run each load, print marked lines of JSON."""
    start = time.monotonic()
    deadline, name = start + args.budget, args.engine_of
    context = max(load.inp + load.out for load in args.loads)
    options = {"gpu_memory_utilization": engines.MEMORY, "max_model_len": context, **args.engine}
    llm = engines.start_engine(name, args.model, prepare=not args.no_prepare, **options)
    context = options["max_model_len"]
    gpus = llm.llm_engine.vllm_config.parallel_config.world_size
    common = {**engines.measured(args, args.model, name, gpus), "context": context}
    try:  # compile what was not compiled at start-up
        _run_load(llm, Load(0, max(1, context // 4 - 8), 8, 4), deadline)
    except OutOfTimeError as error:
        raise SystemExit(f"{name}: warm-up {error}") from None
    seconds = time.monotonic() - start
    say(f"{name}: ready after {seconds:.0f} s on {common['device']}", start_s=seconds)
    done: list[dict[str, Any]] = []
    for load in args.loads:
        left = min(args.limit, deadline - time.monotonic())
        if (least := _least_seconds(load, done)) > left:
            say(f"{name} {load}: skipped, it takes at least {least:.0f} s and {left:.0f} s are left")
            continue
        try:
            record = {**common, **load.record, **_run_load(llm, load, time.monotonic() + left)}
        except OutOfTimeError as error:
            say(f"{name} {load}: {error}")
            continue
        done.append(record)
        after = f", then {record['tpot_p50_ms']:.1f} ms a token" if load.out > 1 else ""
        say(
            f"{name} {load}: {record['seconds']:.1f} s, {record['output_tok_s']:.0f} output tok/s, "
            f"first token {record['ttft_mean_s']:.4g} s{after}; {record['preemptions']} preemptions",
            **record,
        )


def _least_seconds(load: Load, done: Sequence[dict[str, Any]]) -> float:
    """A lower bound of a load's time, from the fastest prefill and the fastest decode step that this
    engine has shown.
    """
    prefill = max((record["prefill_tok_s"] for record in done), default=float("inf"))
    step = min((record["tpot_p50_ms"] for record in done if record["tpot_p50_ms"]), default=0.0)
    return (load.shared_prefix + load.new * load.requests) / prefill + load.out * step / 1e3


def _run_load(llm: LLM, load: Load, deadline: float) -> dict[str, Any]:
    """Send all requests at once and wait for the last token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    prompts = load.prompts(engine.vllm_config.model_config.get_vocab_size())
    sampling = SamplingParams(
        temperature=0, max_tokens=load.out, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    preemptions = _counter(llm, "vllm:num_preemptions")
    outputs: list[RequestOutput] = []
    start, arrival = time.monotonic(), time.time()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{load}-{i}", {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        outputs += [output for output in engine.step() if output.finished]  # type: ignore[misc]
        if time.monotonic() > deadline and engine.has_unfinished_requests():
            engine.abort_request([f"{load}-{i}" for i in range(load.requests)])
            while engine.has_unfinished_requests():
                engine.step()
            raise OutOfTimeError(
                f"stopped after {time.monotonic() - start:.0f} s with {len(outputs)} of {load.requests} requests done"
            )
    seconds = time.monotonic() - start
    if [len(output.outputs[0].token_ids) for output in outputs] != [load.out] * load.requests:
        raise RuntimeError(f"{load}: a request was lost or ended early")
    cached = sum(output.num_cached_tokens or 0 for output in outputs)
    llm.reset_prefix_cache()
    if cached and not load.shared_prefix:
        raise RuntimeError(f"{load}: expected no prefix hits, got {cached} tokens")
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    ttft = [m.first_token_latency for m in metrics]
    last_first_token = max(m.arrival_time + m.first_token_latency for m in metrics) - arrival
    tpot = [1e3 * (m.last_token_ts - m.first_token_ts) / (load.out - 1) for m in metrics] if load.out > 1 else []
    return {
        "seconds": round(seconds, 3),
        "output_tok_s": round(load.out * load.requests / seconds, 2),
        "prefill_tok_s": round(load.inp * load.requests / last_first_token, 1),
        "ttft_mean_s": round(statistics.mean(ttft), 4),
        "ttft_p99_s": round(float(np.percentile(ttft, 99)), 4),
        "tpot_p50_ms": round(float(np.percentile(tpot, 50)), 3) if tpot else None,
        "tpot_p99_ms": round(float(np.percentile(tpot, 99)), 3) if tpot else None,
        "preemptions": _counter(llm, "vllm:num_preemptions") - preemptions,
        "cached_tokens": cached,
    }


def _counter(llm: LLM, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
