"""What benchmarks that start vLLM have in common: the names of caches, an engine in a process of its own, and what a
record says of the thing measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.plots import RESULTS
from benchmarks.shapes import SHAPES, write_config, write_model
from sawkv.errors import SawkvError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.client import check_layers
from sawkv.integrations.vllm.config import WORKER_EXTENSION, engine_options
from sawkv.integrations.vllm.preflight import environment
from sawkv.integrations.vllm.server import STOP_TIMEOUT, running

if TYPE_CHECKING:
    from vllm import LLM

PEERS: Final[dict[str, dict[str, Any]]] = {
    "bf16": {},
    "fp8": {"kv_cache_dtype": "fp8"},
    "vllm_int4_per_token_head": {"kv_cache_dtype": "int4_per_token_head"},
    "turboquant_k8v4": {"kv_cache_dtype": "turboquant_k8v4"},
    "turboquant_4bit_nc": {"kv_cache_dtype": "turboquant_4bit_nc"},
}
"""vLLM's own formats. Any other name is one of sawkv's. TurboQuant's keep some layers in 16 bits, as vLLM does unless
told otherwise.
"""
QUICK_START: Final = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
"""Environment: FlashInfer's sampler is compiled at start-up, which takes minutes."""
QUICK_KERNELS: Final[dict[str, Any]] = {"enable_flashinfer_autotune": False}
"""vLLM's `kernel_config`, for the same reason."""
MEMORY: Final = 0.9
"""vLLM's `gpu_memory_utilization`. Its own default is not the same in all versions."""
ALONE_GIB: Final = 1.0
"""Of a card, what may be taken when an engine starts: the engine's own context takes 0.7 on an H200."""
MARK: Final = "RECORD "
LOG_LINES: Final = 25


def arguments(doc: str | None, formats: Sequence[str], output: str) -> argparse.ArgumentParser:
    """A parser of what such benchmarks are asked: formats, model, and where records go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--formats",
        nargs="+",
        type=_format,
        default=list(formats),
        help=f"sawkv's, or {', '.join(PEERS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--model", default="qwen3-8b", help=f"a model directory, or a shape: {', '.join(SHAPES)} (default: %(default)s)"
    )
    parser.add_argument("--no-prepare", action="store_true", help="serve sawkv's formats unprepared")
    parser.add_argument("--commit", default=git_head(), help="what is measured (default: git's HEAD)")
    parser.add_argument("--output", type=Path, default=RESULTS / output, help="file of records (default: %(default)s)")
    parser.add_argument(
        "--log", type=Path, default=Path(tempfile.gettempdir()), help="folder for vLLM's logs (default: %(default)s)"
    )
    return parser


def log_of(args: argparse.Namespace, benchmark: str, name: str) -> Path:
    """The log of vLLM with the format called `name`. Runs with different models may be under way at once."""
    folder: Path = args.log
    return folder / f"{benchmark}-{Path(args.model).name}-{name}.log"


def _format(name: str) -> str:
    try:
        if name not in PEERS:
            CacheFormat.parse(name)
    except SawkvError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def git_head() -> str:
    """The commit that is checked out, abbreviated; `unknown` outside of a repository."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


@contextlib.contextmanager
def model_folder(model: str, *, tokenizer: bool = False) -> Iterator[str]:
    """The folder of a model, or a temporary one with the shape of that name, with a tokenizer if asked for."""
    if model not in SHAPES:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="sawkv-shape-") as folder:
        yield (write_model if tokenizer else write_config)(Path(folder, model), model)


def load_format(model: str) -> str:
    """vLLM's `load_format`: a shape has no weights."""
    return "auto" if list(Path(model).glob("*.safetensors")) else "dummy"


def measured(args: argparse.Namespace, model: str, name: str, gpus: int = 1) -> dict[str, str]:
    """The fields of a record that say what was measured, and where. Imports vLLM, and does not start CUDA."""
    import vllm
    from vllm.platforms import current_platform

    device = current_platform.get_device_name().strip() or "cpu"
    return {
        "device": device if gpus == 1 else f"{gpus} x {device}",
        "commit": args.commit,
        "vllm": vllm.__version__,
        "model": Path(model).name,
        "format": recorded_name(name, args.no_prepare),
    }


def recorded_name(name: str, no_prepare: bool) -> str:
    """A format's name in records, of which the last of a name counts: unprepared, it has another."""
    return f"{name}, unprepared" if no_prepare and name not in PEERS else name


def taken_gib(log: Path) -> float:
    """GiB of a card that were taken when the engine started, its own context included, as vLLM's log says; 0 if it does
    not. Above `ALONE_GIB` another process uses the card too, which makes steps longer.
    """
    found = re.findall(r"Free memory on device \(([\d.]+)/([\d.]+) GiB\) on startup", log.read_text(errors="replace"))
    return max((float(total) - float(free) for free, total in found), default=0.0)


def start_engine(name: str, model: str, *, prepare: bool = True, **options: Any) -> LLM:
    """vLLM with the format called `name` in all layers.

    Raises:
        UnsupportedError: some layer has another: a baseline that keeps layers in 16 bits is not what its name says,
            but for TurboQuant.
    """
    import vllm
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and name == "vllm_int4_per_token_head":
        raise SystemExit("vllm_int4_per_token_head: vLLM's CPU build has no such attention")
    options = {
        "load_format": load_format(model),
        "skip_tokenizer_init": True,
        "disable_log_stats": False,  # or requests have no metrics
        "kernel_config": QUICK_KERNELS,
        **(PEERS[name] if name in PEERS else engine_options(CacheFormat.parse(name), prepare=prepare)),
        **options,
        "worker_extension_cls": WORKER_EXTENSION,
    }
    llm = vllm.LLM(model, **options)
    layers = Counter(dtype for worker in llm.collective_rpc("kv_cache_dtypes") for dtype in worker)
    check_layers(layers, options.get("kv_cache_dtype", "auto"), all_of_them=not name.startswith("turboquant"))
    print(f"{name}: " + ", ".join(f"{count} layers {dtype}" for dtype, count in layers.items()), flush=True)
    return llm


def run_apart(module: str, name: str, words: Sequence[object], log: Path, patience: float) -> Iterator[dict[str, Any]]:
    """Run `python -m module` again with this process's arguments, `--engine-of name` and further `words`, so that the
    GPU's memory is free again afterwards. Yields the records that it `say`s; the rest of its output is the log.

    Args:
        module: the benchmark.
        name: of the format.
        words: arguments; of two alike, the last counts.
        log: file for its output.
        patience: seconds after which it is stopped.
    """
    command = [sys.executable, "-m", module, *sys.argv[1:], "--engine-of", name, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    print(f"{name}: starting vLLM, log in {log}", flush=True)
    with (
        log.open("w", buffering=1) as sink,
        running(command, STOP_TIMEOUT, env=environment() | QUICK_START, **pipes) as engine,
    ):
        assert engine.stdout is not None
        timer = threading.Timer(patience, os.killpg, (engine.pid, signal.SIGKILL))
        timer.start()
        try:
            with engine.stdout as lines:
                for line in map(bytes.decode, lines):
                    if line.startswith(MARK):
                        record = json.loads(line.removeprefix(MARK))
                        print(record.pop("say"), flush=True)
                        yield record
                    else:
                        sink.write(line)
            engine.wait(STOP_TIMEOUT)
        finally:
            timer.cancel()
    if engine.returncode:
        last = "\n".join(log.read_text().splitlines()[-LOG_LINES:])
        print(f"{name}: vLLM ended with {engine.returncode}; the log's end:\n{last}", flush=True)


def say(text: str, **record: Any) -> None:
    """In a process of `run_apart`: print a line, and give the record to the process that started it."""
    print(f"\n{MARK}{json.dumps({'say': text, **record})}", flush=True)
