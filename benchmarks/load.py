"""Latency under load: vLLM's own load generator (`vllm bench serve`) against its server, with and without sawkv.

    python -m benchmarks.load                                                  # Qwen3-8B's shape, random weights
    python -m benchmarks.load --formats int4 --rates 2 --seconds 20 --budget 240

Requests of `--input` and `--output-tokens` arrive at random (Poisson) at each rate for about `--seconds`; the same ones
for every format. One server a format. Each rate is written to docs/results/load.jsonl as it ends, with medians and 99th
percentiles of the time to first token (`ttft`) and of the time per output token (`tpot`), in milliseconds, as the
generator reports them.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.plots import RESULTS, load_table, read_records
from benchmarks.serving import git_head
from benchmarks.shapes import SHAPES, write_model
from sawkv.bench.generator import Generator, options
from sawkv.bench.records import SIXTEEN_BITS, Load, Served, Setting
from sawkv.bench.run import check_layers
from sawkv.errors import UnsupportedError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.client import ASKABLE, serving
from sawkv.integrations.vllm.preflight import environment
from sawkv.integrations.vllm.server import server_command

DEVICE: Final = (
    "import vllm; from vllm.platforms import current_platform as p;"
    " print(f'{vllm.__version__}|{p.get_device_name().strip() or \"cpu\"}')"
)
FIELDS: Final = ("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms")


def main() -> None:
    args = _arguments()
    deadline = time.monotonic() + args.budget
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server must not outlive this process
    said = subprocess.run([sys.executable, "-c", DEVICE], check=True, capture_output=True, text=True).stdout
    version, device = said.strip().splitlines()[-1].split("|")
    with tempfile.TemporaryDirectory(prefix="sawkv-load-") as folder:
        model = write_model(Path(folder, args.model), args.model) if args.model in SHAPES else args.model
        with Generator() as generator:
            for name in args.formats:
                try:
                    _run_format(args, generator, name, model, deadline, version, device)
                except UnsupportedError as error:
                    print(f"{name}: {error}", flush=True)
    print(f"\n{load_table(read_records(args.output))}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--formats", nargs="+", default=["bf16", "int4-k128-v128"], help="bf16 is vLLM as it is (default: %(default)s)"
    )
    parser.add_argument(
        "--model",
        default="qwen3-8b",
        help=f"a checkpoint directory, or a shape: {', '.join(SHAPES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[1.0, 2.0, 3.0], help="requests a second (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=30, help="for which requests arrive at one rate (default: %(default)s)"
    )
    parser.add_argument("--input", type=int, default=8192, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=512, help="tokens of an answer (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=3600, help="seconds for all of it; what does not fit is skipped"
    )
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more options of vLLM's server; last")
    parser.add_argument("--commit", help="what is measured (default: git's HEAD)")
    parser.add_argument("--output", type=Path, default=RESULTS / "load.jsonl")
    parser.add_argument(
        "--log", type=Path, default=Path(tempfile.gettempdir()), help="folder for vLLM's logs (default: %(default)s)"
    )
    args = parser.parse_args()
    args.commit = args.commit or git_head()
    return args


def _run_format(
    args: argparse.Namespace, generator: Generator, name: str, model: str, deadline: float, version: str, device: str
) -> None:
    cache_format = None if name == "bf16" else CacheFormat.parse(name)
    words = ["--max-model-len", str(args.input + args.output_tokens + 8)]
    if not list(Path(model).glob("*.safetensors")):
        words += ["--load-format", "dummy"]
    words += [
        "--gpu-memory-utilization",
        "0.90",
        "--kernel-config",
        '{"enable_flashinfer_autotune": false}',
        *args.options,
    ]
    start, log = time.monotonic(), args.log / f"load-{name}.log"
    print(f"{name}: starting vLLM's server, log in {log}", flush=True)
    # FlashInfer's sampler is compiled at start-up, which takes minutes.
    env = environment() | {"VLLM_USE_FLASHINFER_SAMPLER": "0"} | ASKABLE[1]
    with serving([*server_command(model, cache_format, words), *ASKABLE[0]], log, env=env) as client:
        print(f"{name}: ready after {time.monotonic() - start:.0f} s", flush=True)
        if cache_format is not None and not client.notice():  # vLLM goes on without a plugin that it cannot load
            raise SystemExit(f"{name}: vLLM runs without sawkv; see {log}")
        served = Served(SIXTEEN_BITS if cache_format is None else name, layers=client.kv_cache_dtypes())
        check_layers(served, Setting(model, options=tuple(args.options)))
        print(f"{name}: layers {served.layers}", flush=True)
        for rate in args.rates:
            requests = max(1, round(rate * args.seconds))
            left = deadline - time.monotonic()
            if left < args.seconds:
                print(f"{name}, {rate:g} requests/s: skipped, {left:.0f} s are left", flush=True)
                continue
            setting = Setting(model, args.input, args.output_tokens, 0, requests)
            # The load's number chooses the prompts: others at each rate, or the prefix cache has them.
            result = generator.generate(options(setting, Load(rate), int(rate * 1000)), client.port, left)
            record = {
                "device": device,
                "commit": args.commit,
                "vllm": version,
                "model": Path(model).name,
                "format": name,
                "inp": args.input,
                "out": args.output_tokens,
                "rate": rate,
                "requests": requests,
                "completed": result["completed"],
                "output_tok_s": round(result["output_throughput"], 2),
                **{field: round(result[field], 2) for field in FIELDS},
            }
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a") as file:
                file.write(json.dumps(record) + "\n")
            shown = ", ".join(
                f"{field.replace('_', ' ').removesuffix(' ms')} {record[field]:.0f} ms" for field in FIELDS
            )
            print(f"{name}, {rate:g} requests/s: {record['output_tok_s']:.0f} output tok/s, {shown}", flush=True)


if __name__ == "__main__":
    main()
