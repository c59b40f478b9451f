"""The main job, shown: vLLM serves one model in 16 bits and then from INT4 pages, and answers the same prompts through the OpenAI API."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sawkv.errors import UnsupportedError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.server import free_port, running, server_command

if TYPE_CHECKING:
    from openai import OpenAI

START_TIMEOUT = 900.0
"""Seconds that vLLM may take to start; the first start on a CPU compiles the model."""
STOP_TIMEOUT = 30.0

WIDE = "16-bit"
PASS_KEY = "48213"
PROMPTS = {
    "a function": 'def read_lines(path):\n    """Return the lines of a text file."""\n',
    "a class": "class Counter:\n    def __init__(self):\n        self.counts = {}\n\n    def add(self, key):\n",
    "a test": "import unittest\n\n\nclass TestParser(unittest.TestCase):\n    def test_empty(self):\n",
    "a pass key among 100 lines": f"The pass key is {PASS_KEY}.\n"
    + "".join(f"Line {i}: the value of item {i * 7 % 100} was not changed.\n" for i in range(100))
    + "What is the pass key? The pass key is",
}


@dataclass(frozen=True)
class Outcome:
    """What one server showed."""

    name: str
    kv_tokens: int
    texts: list[str]
    tokens: list[list[str]]
    seconds: float


def run_demo(model: str, *, cache_format: str, max_tokens: int, kv_cache_memory: int, max_model_len: int) -> int:
    """Serve `model` twice and print both side by side. Returns 0, or 1 if an int4 cache holds less than 3.5 times the tokens.

    Args:
        model: a checkpoint directory, or a name that vLLM resolves.
        cache_format: name of the format to compare with vLLM's 16-bit cache.
        max_tokens: tokens to generate for each prompt, greedily.
        kv_cache_memory: bytes that each server gives to its cache.
        max_model_len: longest sequence to serve, in tokens.
    """
    chosen = CacheFormat.parse(cache_format)
    options = ["--kv-cache-memory-bytes", str(kv_cache_memory), "--max-model-len", str(max_model_len), "--served-model-name", "model"]
    outcomes = []
    for name, served in ((WIDE, None), (str(chosen), chosen)):
        print(f"\nStarting vLLM, KV cache {name} ...", flush=True)
        outcomes.append(_measure(name, server_command(model, served, options), max_tokens))
    _report(outcomes[0], outcomes[1], kv_cache_memory)
    return 1 if chosen.codec == "int4" and outcomes[1].kv_tokens < 3.5 * outcomes[0].kv_tokens else 0


def _measure(name: str, command: Sequence[str], max_tokens: int) -> Outcome:
    from openai import OpenAI

    with tempfile.TemporaryDirectory(prefix="sawkv-demo-") as folder:
        log, port = Path(folder, "server.log"), free_port()
        command = [*command, "--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as sink, running(command, STOP_TIMEOUT, stdout=sink, stderr=subprocess.STDOUT) as server:
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
            _wait_until_ready(client, server, log)
            print(f"  sending {len(PROMPTS)} prompts at once ...", flush=True)
            start = time.monotonic()
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                answers = list(pool.map(lambda prompt: _complete(client, prompt, max_tokens), PROMPTS.values()))
            seconds = time.monotonic() - start
            text = log.read_text(errors="replace")
    if name != WIDE and "sawkv: KV cache format" not in text:  # vLLM goes on without a plugin that it cannot load
        raise UnsupportedError(f"vLLM runs without sawkv, so there is nothing to compare:\n{text[-2000:]}")
    sizes = re.findall(r"KV cache size: ([\d,]+) tokens", text)
    if not sizes:
        raise UnsupportedError("vLLM's log does not report 'KV cache size: ... tokens', which this demonstration reads")
    return Outcome(name, int(sizes[-1].replace(",", "")), [a[0] for a in answers], [a[1] for a in answers], seconds)


def _complete(client: OpenAI, prompt: str, max_tokens: int) -> tuple[str, list[str]]:
    """Greedy continuation: its text and its tokens."""
    choice = client.completions.create(model="model", prompt=prompt, max_tokens=max_tokens, temperature=0, logprobs=1).choices[0]
    return choice.text, list(choice.logprobs.tokens or []) if choice.logprobs else []


def _wait_until_ready(client: OpenAI, server: subprocess.Popen[bytes], log: Path) -> None:
    """Poll until the server answers, showing where its start-up is."""
    from openai import APIError

    start = time.monotonic()
    shown, said = start, ""
    while True:
        if server.poll() is not None:
            raise UnsupportedError(f"vLLM ended with status {server.returncode} while starting:\n{_tail(log, 25)}")
        with contextlib.suppress(APIError):
            client.with_options(timeout=2).models.list()
            print(f"  ready after {time.monotonic() - start:.0f} s", flush=True)
            return
        if time.monotonic() - start > START_TIMEOUT:
            raise UnsupportedError(f"vLLM did not start within {START_TIMEOUT:.0f} s:\n{_tail(log, 25)}")
        last = re.sub(r"^\(.*?\) |\w+ \d\d-\d\d [\d:]+ \[.*?\] ", "", _tail(log, 1)).strip()[:110]
        since = time.monotonic() - shown
        if since > 20 or (since > 3 and last != said):
            shown, said = time.monotonic(), last
            print(f"  {shown - start:4.0f} s  {last or 'loading vLLM'}", flush=True)
        time.sleep(0.5)


def _tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-lines:])


def _report(wide: Outcome, narrow: Outcome, kv_cache_memory: int) -> None:
    width = 62
    for index, (title, prompt) in enumerate(PROMPTS.items()):
        print(f"\n--- {title} ---")
        print(textwrap.indent(_last_lines(prompt, 4), "    "))
        print(f"{wide.name:<{width}} | {narrow.name}")
        left, right = (_lines(outcome.texts[index].rstrip(), width) for outcome in (wide, narrow))
        for i in range(max(len(left), len(right))):
            print(f"{left[i] if i < len(left) else '':<{width}} | {right[i] if i < len(right) else ''}")
        agreed, total = _agreement(wide.tokens[index], narrow.tokens[index])
        print(f"greedy tokens agree: {'all' if agreed == total else f'the first {agreed} of'} {total}")
    print(f"\n{'':<28}{wide.name:>16}{narrow.name:>18}{'ratio':>9}")
    per_token = [kv_cache_memory / outcome.kv_tokens for outcome in (wide, narrow)]
    print(f"{'KV capacity (vLLM), tokens':<28}{wide.kv_tokens:>16,}{narrow.kv_tokens:>18,}{narrow.kv_tokens / wide.kv_tokens:>8.2f}x")
    print(f"{'memory a token, bytes':<28}{per_token[0]:>16,.0f}{per_token[1]:>18,.0f}{per_token[0] / per_token[1]:>8.2f}x")
    same = sum(a == b for a, b in zip(wide.tokens, narrow.tokens, strict=True))
    print(f"{'time for all prompts, s':<28}{wide.seconds:>16.2f}{narrow.seconds:>18.2f}")
    print(f"greedy outputs that agree to the last token: {same} of {len(PROMPTS)}", flush=True)


def _agreement(a: list[str], b: list[str]) -> tuple[int, int]:
    """How many tokens agree before the first that differs, of how many."""
    total = max(len(a), len(b))
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))), total


def _lines(text: str, width: int) -> list[str]:
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in text.expandtabs(4))
    return [part for line in shown.split("\n") for part in (textwrap.wrap(line, width, drop_whitespace=False) or [""])]


def _last_lines(text: str, count: int) -> str:
    lines = text.rstrip("\n").split("\n")
    return "\n".join([*([f"... {len(lines) - count} lines before ..."] if len(lines) > count + 1 else lines[:-count]), *lines[-count:]])
