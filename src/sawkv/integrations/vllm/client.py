"""A vLLM server as a child process: start it, wait until it answers, and send requests over HTTP. Imports no vLLM."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sawkv.errors import UnsupportedError
from sawkv.integrations.vllm.config import WORKER_EXTENSION
from sawkv.integrations.vllm.server import STOP_TIMEOUT, free_port, running

START_TIMEOUT = 900.0
"""Seconds that vLLM may take to start. The first start on a CPU compiles the model."""
ANSWER_TIMEOUT = 600.0
"""Seconds that one answer may take."""
POLL = 0.5
LOG_LINES = 25
"""Last lines of the log that are shown if the server ends without an error."""
NOTICE = "sawkv: KV cache format"
"""Start of sawkv's line in vLLM's log. Without this line vLLM runs with a cache of its own."""
ASKABLE: Final = (["--worker-extension-cls", WORKER_EXTENSION], {"VLLM_SERVER_DEV_MODE": "1"})
"""Options and environment with which a server answers `Client.kv_cache_dtypes`."""
PREFIX_COUNTERS: Final = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
"""Prompt tokens looked up in the prefix cache, and those found."""
STAGES: Mapping[str, str] = {
    "Initializing a V1 LLM engine": "starting the engine",
    "Loading weights took": "weights loaded",
    "Dynamo bytecode transform": "compiling the model",
    "sawkv: prepar": "preparing the model for 4 bits",
    "KV cache size": "cache allocated",
}
"""What of vLLM's log a person waits for, by a part of its line."""


@dataclass(frozen=True)
class Client:
    """Sends requests to one server.

    Attributes:
        port: on this machine.
        log: file with the server's output.
    """

    port: int
    log: Path

    def get(self, path: str, *, timeout: float = 10) -> str:
        """The body of an answer.

        Raises:
            OSError: the server does not answer.
        """
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as answer:
            body: str = answer.read().decode()
        return body

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON answer to a JSON request.

        Raises:
            UnsupportedError: the server refuses it.
            OSError: the server does not answer.
        """
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise UnsupportedError(
                f"{path}: expected an answer, got {error.code}: {error.read().decode(errors='replace')[:500]}"
            ) from error
        return found

    def complete(self, prompt: str | Sequence[int], **options: Any) -> dict[str, Any]:
        """The first choice of a greedy completion of text or token ids."""
        return self._first_choice("/v1/completions", {"prompt": prompt} | options)

    def chat(self, message: str, **options: Any) -> dict[str, Any]:
        """The first choice of a greedy answer to one message."""
        messages = [{"role": "user", "content": message}]
        return self._first_choice("/v1/chat/completions", {"messages": messages} | options)

    def _first_choice(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = self.post(path, {"temperature": 0, **body})["choices"][0]
        return choice

    def prompt_logprobs(self, ids: Sequence[int]) -> list[float]:
        """Log-probability of each token after the first, in nats, given those before it."""
        found = self.complete(ids, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
        return [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], found[1:], strict=True)]

    def counters(self, *names: str) -> tuple[float, ...]:
        """Counters of the server's `/metrics` at one moment, such as `vllm:num_preemptions`. Each is the sum over its
        labels, or 0 if it has not counted yet.
        """
        lines = self.get("/metrics").splitlines()
        starts = [re.compile(rf"{re.escape(name)}_total[{{ ]") for name in names]
        return tuple(sum(float(line.rpartition(" ")[2]) for line in lines if start.match(line)) for start in starts)

    def kv_tokens(self) -> int:
        """`held_tokens` of the server's log."""
        return held_tokens(self.log)

    def kv_cache_dtypes(self) -> dict[str, int]:
        """How many attention layers have each `kv_cache_dtype`, over all workers. The server needs `ASKABLE`'s options
        and environment.
        """
        workers = self.post("/collective_rpc", {"method": "kv_cache_dtypes"})["results"]
        return dict(Counter(dtype for worker in workers for dtype in worker))

    def notice(self) -> str:
        """sawkv's line in the server's log, or ""."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line[line.index(NOTICE) :] for line in lines if NOTICE in line), "")


def held_tokens(log: Path) -> int:
    """Tokens that a KV cache holds, according to vLLM's log.

    Raises:
        UnsupportedError: the log does not say.
    """
    sizes = re.findall(r"KV cache size: ([\d,]+) tokens", log.read_text(errors="replace"))
    if not sizes:
        raise UnsupportedError("vLLM's log: expected a line 'KV cache size: ... tokens', got none")
    return int(sizes[-1].replace(",", ""))


def check_layers(found: Mapping[str, int], wanted: str, *, all_of_them: bool = True) -> None:
    """Refuse a cache that is not what its name says: a checkpoint may ask for FP8 in silence, and vLLM's TurboQuant
    keeps layers in 16 bits.

    Args:
        found: how many attention layers have each dtype of vLLM's.
        wanted: the dtype that was asked for.
        all_of_them: False lets others stand beside it.

    Raises:
        UnsupportedError: layers have another dtype.
    """
    if wanted not in found or (all_of_them and len(found) > 1):
        got = ", ".join(f"{dtype} in {count}" for dtype, count in found.items()) or "no attention"
        raise UnsupportedError(
            f"expected kv_cache_dtype {wanted} in all attention layers, got {got}: not a cache of that name"
        )


@contextlib.contextmanager
def serving(
    command: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    say: Callable[[str], object] = lambda stage: None,
) -> Iterator[Client]:
    """Run a server that answers requests within the block, and end it with the block.

    Args:
        command: starts vLLM's server, without host and port.
        log: file for the server's output.
        env: its environment; None as for `running`.
        say: called with a description of each stage of the start.

    Raises:
        UnsupportedError: the server ends by itself, or does not start within `START_TIMEOUT`.
    """
    port = free_port()
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with (
        log.open("wb") as sink,
        running(command, STOP_TIMEOUT, stdout=sink, stderr=subprocess.STDOUT, env=env) as server,
    ):
        client = Client(port, log)
        _wait(client, server, say)
        yield client


def _wait(client: Client, server: subprocess.Popen[bytes], say: Callable[[str], object]) -> None:
    start, said = time.monotonic(), set[str]()
    while True:
        text = client.log.read_text(errors="replace")
        for mark, stage in STAGES.items():
            if mark in text and mark not in said:
                said.add(mark)
                say(stage)
        problem = None
        if server.poll() is not None:
            problem = f"vLLM ended with status {server.returncode} while it started"
        elif time.monotonic() - start > START_TIMEOUT:
            problem = f"vLLM did not start within {START_TIMEOUT:.0f} s"
        if problem:
            raise UnsupportedError(f"{problem}: {_cause(text)} ({client.log})")
        with contextlib.suppress(OSError, http.client.HTTPException):
            client.get("/health", timeout=2)
            return
        time.sleep(POLL)


def _cause(text: str) -> str:
    """The last error in a log that is more than a reference to another error, or else the last lines."""
    text = re.sub(r"\d+ validation errors? for \S+\n\s*|\s\[type=.*", "", text)  # pydantic's words around its cause
    errors = [found for found in re.findall(r"\w+(?:Error|Exception): (.+)", text) if "root cause" not in found]
    return errors[-1] if errors else "\n".join(text.strip().splitlines()[-LOG_LINES:])
