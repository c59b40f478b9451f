# Over 400 lines: the server, the clients and the judge of one test.
"""Soak test: vLLM serves from sawkv's pages under random load and faults, and every greedy response must equal its
reference.

    python -m benchmarks.soak models/sawkv-6m --tokens 1000000

References come first: each prompt alone on a fresh server, with no reuse of prefixes. Then 1 to `--clients` clients
send, at random: prompts of the references; prompts continued by a part of their answer, as a conversation's next turn
is (prefix hits); requests that are dropped mid-stream or before their first token; sampled requests, as noise. The
cache is far too small for all of them, so that vLLM preempts. Between, the server is stopped or killed, and started
again.

With `--offload FOLDER` blocks also go to files and come back (docs/offload.md), and every second or so one byte of a
file is flipped, or the file gets the content of another, with its checksum. Then a run also fails if no prefix came
back from files, or if no damage was noticed.

A response that differs is asked for again, alone, from its first differing token on. It is a near-tie if the two
tokens' log-probabilities are within `TIE` there, and so on to its end; else it is wrong. Where matrix products do not
depend on the batch (bf16 on CPUs without bf16 instructions), all responses are equal to the last token. The exit status
is 0 if no response is wrong and none is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.preflight import environment
from sawkv.integrations.vllm.server import free_port, running, server_command

TIE = 0.01
"""Nats between the log-probabilities of two tokens that rounding may swap."""
START_TIMEOUT = 900.0
REQUEST_TIMEOUT = 600.0
STOP_TIMEOUT = 60.0
ACTIVE_CLIENTS = (1, 2, 4, 8, 16, 32, 64)
KINDS = {"whole": 50, "stream": 25, "drop mid-stream": 10, "drop early": 8, "sampled": 7}
"""Weights of the kinds of requests."""
METRICS = re.compile(
    r"^(vllm:(?:num_preemptions|(?:external_)?prefix_cache_(?:hits|queries)|generation_tokens)_total|sawkv_\w+_total)"
    r"(?:\{.*\})?"
    r" (\S+)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Load:
    """What is sent, and to which server."""

    model: str
    cache_format: CacheFormat = field(default_factory=lambda: CacheFormat("int4"))
    tokens: int = 1_000_000
    clients: int = 64
    restarts: int = 6
    num_prompts: int = 64
    response_tokens: int = 192
    seed: int = 0
    num_blocks: int = 256
    options: tuple[str, ...] = ()
    offload: Path | None = None

    def server_options(self) -> list[str]:
        """Options of the server for this load alone."""
        if self.offload is None:
            return [*self.options]
        connector = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "spec_name": "HostTieringSpec",
                "cpu_bytes_to_use": 4 << 20,  # smaller than the engine's own pages: most come from files
                "secondary_tiers": [{"type": "sawkv_fs", "root_dir": str(self.offload)}],
            },
        }
        return ["--kv-transfer-config", json.dumps(connector), *self.options]


@dataclass(frozen=True)
class Reference:
    """A prompt's token ids, and its greedy continuation alone."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class Difference:
    """A response that is not its reference."""

    prompt: list[int]
    want: list[int]
    got: list[int]


@dataclass
class Report:
    """What happened. `wrong` and `lost` are failures."""

    counts: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        shown = [
            f"{name}: {value:,.0f}" for name, value in [*sorted(self.counts.items()), *sorted(self.metrics.items())]
        ]
        return [*shown, f"wrong: {len(self.wrong)}", *self.wrong, f"lost: {len(self.lost)}", *self.lost]


class Server:
    """vLLM's server as a process group of its own, and requests to it."""

    def __init__(self, load: Load, log: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        limits = [
            "--max-model-len",
            "1024",
            "--max-num-seqs",
            str(load.clients),
            "--max-num-batched-tokens",
            "256",
            "--block-size",
            "32",
        ]
        limits += ["--num-gpu-blocks-override", str(load.num_blocks), "--kv-cache-memory-bytes", str(1 << 28)]
        serving = [
            "--served-model-name",
            "model",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--disable-uvicorn-access-log",
        ]
        self._command = server_command(load.model, load.cache_format, [*limits, *serving, *load.server_options()])
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Start, and wait until the server answers."""
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sawkv-metrics-"))
        env = environment() | {"PROMETHEUS_MULTIPROC_DIR": folder}
        sink = self._stack.enter_context(self.log.open("ab"))
        self._process = self._stack.enter_context(
            running(self._command, STOP_TIMEOUT, env=env, stdout=sink, stderr=subprocess.STDOUT)
        )
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT)
        # A connection for each request: the server closes idle ones, and a request sent into one would look lost.
        self._session = aiohttp.ClientSession(
            self.url, connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=timeout
        )
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(aiohttp.ClientError):
                async with self._session.get("/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Signal the server, and its children too if it is to be killed; wait for its end."""
        if self._process is None or self._session is None:
            return
        if how == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._stack.close)
        await asyncio.sleep(0.1)  # requests in flight see their connections end
        await self._session.close()
        self._process = None

    async def stream(self, prompt: Sequence[int], max_tokens: int, **options: Any) -> AsyncGenerator[list[int], None]:
        """Token ids as they come. Leaving the loop closes the connection, as a client that goes away does."""
        async with self._post(prompt, max_tokens, stream=True, **options) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise RuntimeError(f"error in a stream: {event['error']}")
                    yield event["choices"][0]["token_ids"] or []

    async def complete(self, prompt: Sequence[int], max_tokens: int, **options: Any) -> list[int]:
        """Token ids of a whole response."""
        async with self._post(prompt, max_tokens, **options) as response:
            tokens: list[int] = (await response.json())["choices"][0]["token_ids"]
            return tokens

    async def top_logprobs(self, prompt: Sequence[int], **options: Any) -> dict[str, float]:
        """Log-probabilities of the best next tokens, by `token_id:N`."""
        async with self._post(prompt, 1, logprobs=5, return_tokens_as_token_ids=True, **options) as response:
            top: dict[str, float] = (await response.json())["choices"][0]["logprobs"]["top_logprobs"][0]
            return top

    async def metrics(self) -> str:
        """The text of the Prometheus endpoint."""
        if self._session is None:
            raise RuntimeError("the server has not been started")
        async with self._session.get("/metrics") as response:
            return await response.text()

    @contextlib.asynccontextmanager
    async def _post(
        self, prompt: Sequence[int], max_tokens: int, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        body = {
            "model": "model",
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if self._session is None:
            raise RuntimeError("the server has not been started")
        async with self._session.post("/v1/completions", json=body | {"return_token_ids": True} | options) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:300]}")
            yield response


class Soak:
    """One run. `run` returns the report."""

    def __init__(self, load: Load, server_log: Path) -> None:
        self.load = load
        self.report = Report()
        self.references: list[Reference] = []
        self._random = random.Random(load.seed)
        self._server = Server(load, server_log)
        self._serving = asyncio.Event()
        self._lives = 0
        self._active = load.clients
        self._differences: list[Difference] = []
        self._started = time.monotonic()
        self._salts = 0

    async def run(self) -> Report:
        """The whole of it: references, load with restarts, and then an idle server that must hold no page."""
        task = asyncio.current_task()
        if task is not None:
            # The server must not outlive this process.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            await self._server.start()
            await self.make_references()
            self._serving.set()
            clients = [asyncio.create_task(self._client(i)) for i in range(self.load.clients)]
            others = [asyncio.create_task(self._conduct()), asyncio.create_task(self._damage())]
            await asyncio.gather(*clients)
            for other in others:
                other.cancel()
            await self._explain_differences()
            await self._check_idle()
            await self._scrape()
            self._check_offload()
        finally:
            await self._server.stop()
        return self.report

    async def make_references(self) -> None:
        """Prompts that share prefixes, and their greedy answers, one request at a time."""
        vocabulary = range(300, json.loads(Path(self.load.model, "config.json").read_text())["vocab_size"])
        bases = [self._random.choices(vocabulary, k=250) for _ in range(max(1, self.load.num_prompts // 8))]
        for i in range(self.load.num_prompts):
            shared = bases[i % len(bases)][: self._random.randint(1, 250)]
            prompt = shared + self._random.choices(vocabulary, k=self._random.randint(1, 80))
            self.references.append(Reference(prompt, await self._alone(prompt, self.load.response_tokens)))
        self._say(f"{len(self.references)} references of {self.load.response_tokens} tokens")

    async def _alone(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        return await self._server.complete(prompt, max_tokens, cache_salt=self._fresh_salt())

    def _fresh_salt(self) -> str:
        """A key that keeps a request from the cached prefixes of all others."""
        self._salts += 1
        return f"alone-{self._salts}"

    async def _client(self, index: int) -> None:
        while self._goes_on():
            if index >= self._active:
                await asyncio.sleep(0.5)
                continue
            await self._serving.wait()
            life = self._lives
            try:
                await self._request()
            except Exception as error:  # whatever a client may see
                if life == self._lives and self._serving.is_set():
                    self.report.lost.append(f"{type(error).__name__}: {error}")
                    self._say(f"lost: {self.report.lost[-1]}")
                    await asyncio.sleep(1)
                else:
                    self.report.counts["interrupted by a restart"] += 1

    def _goes_on(self) -> bool:
        """Until all tokens have come and all restarts are over."""
        return (
            self.report.counts["tokens checked"] < self.load.tokens
            or self._lives < self.load.restarts
            or not self._serving.is_set()
        )

    async def _request(self) -> None:
        draw, counts = self._random, self.report.counts
        reference = draw.choice(self.references)
        done = draw.choice([0, draw.randrange(len(reference.response))])  # a first turn, or a later one
        prompt, want = reference.prompt + reference.response[:done], reference.response[done:]
        want = want[: draw.randint(1, len(want))]
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        got: list[int] = []
        if kind == "whole":
            got = await self._server.complete(prompt, len(want))
        elif kind == "sampled":
            await self._server.complete(prompt, len(want), temperature=1.0)
        elif kind == "drop early":
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._server.complete(prompt, len(want)), draw.random())
        else:
            stop_at = draw.randint(1, len(want)) if kind == "drop mid-stream" else len(want) + 1
            stream = self._server.stream(prompt, len(want))
            async with contextlib.aclosing(stream):
                async for tokens in stream:
                    got += tokens
                    if len(got) >= stop_at:
                        break
        counts[f"requests, {kind}"] += 1
        counts["tokens checked"] += len(got)
        if got != want[: len(got)]:
            self._differences.append(Difference(prompt, want, got))
        elif got:
            counts["responses equal to their reference, as far as they went"] += 1
        if kind in ("whole", "stream") and len(got) != len(want):  # a server that shuts down ends responses early
            raise RuntimeError(f"expected {len(want)} tokens, got {len(got)}")

    async def _conduct(self) -> None:
        """Change the number of active clients, report, and restart the server when its share of the tokens has come."""
        last_report = 0.0
        while True:
            await asyncio.sleep(self._random.uniform(2, 12))
            self._active = min(self._random.choice(ACTIVE_CLIENTS), self.load.clients)
            tokens = self.report.counts["tokens checked"]
            if time.monotonic() - last_report > 60:
                last_report = time.monotonic()
                failures = f"{len(self._differences)} responses differ, {len(self.report.lost)} lost"
                self._say(f"{tokens:,} tokens checked, {failures}, {self._lives} restarts")
            if self._lives < self.load.restarts and tokens >= self.load.tokens * (self._lives + 1) / (
                self.load.restarts + 1
            ):
                how = self._random.choice([signal.SIGTERM, signal.SIGKILL])
                await self._scrape()
                self._serving.clear()
                self._lives += 1
                self.report.counts[f"restarts, {how.name}"] += 1
                await self._server.stop(how)
                await self._server.start()
                self._serving.set()

    async def _damage(self) -> None:
        """Flip one byte of a stored block, or put another block in its place, again and again."""
        draw = random.Random(self.load.seed)
        while self.load.offload is not None:
            await asyncio.sleep(draw.uniform(0.5, 2))
            files = sorted(self.load.offload.rglob("*.bin"))
            with contextlib.suppress(FileNotFoundError):  # a damaged file is removed
                if len(files) < 2:
                    continue
                file, other = draw.sample(files, 2)
                if draw.random() < 0.5:
                    content = bytearray(file.read_bytes())
                    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
                else:
                    content = bytearray(other.read_bytes())
                    Path(f"{file}.sum").write_bytes(Path(f"{other}.sum").read_bytes())
                file.write_bytes(content)
                self.report.counts["files damaged"] += 1

    def _check_offload(self) -> None:
        if self.load.offload is None:
            return
        noticed = self._server.log.read_text(errors="replace").count("a stored block is damaged and is removed")
        self.report.counts["damaged blocks noticed"] = noticed
        if not noticed or not self.report.metrics.get("vllm:external_prefix_cache_hits_total"):
            self.report.lost.append("expected prefixes from files and damaged files among them")

    async def _explain_differences(self) -> None:
        for difference in self._differences:
            ties = await self._near_ties(difference)
            first = next(
                (i for i, (a, b) in enumerate(zip(difference.want, difference.got, strict=False)) if a != b), -1
            )
            if ties is None:
                self.report.wrong.append(f"{len(difference.prompt)} tokens of prompt, differs from token {first} on")
            else:
                self.report.counts["responses equal up to near-ties"] += 1

    async def _near_ties(self, difference: Difference) -> int | None:
        """How many near-ties explain the response, or None if they do not."""
        position, ties, got = 0, 0, difference.got
        while True:
            prompt = difference.prompt + got[:position]
            want = await self._alone(prompt, len(got) - position) if position < len(got) else []
            first = next((i for i, token in enumerate(want) if token != got[position + i]), None)
            if first is None:
                return ties
            top = await self._server.top_logprobs(prompt + want[:first], cache_salt=self._fresh_salt())
            theirs = top.get(f"token_id:{got[position + first]}")
            if theirs is None or max(top.values()) - theirs > TIE:
                return None
            ties += 1
            position += first + 1

    async def _check_idle(self) -> None:
        """All requests have ended, dropped ones too: no page may be in use."""
        text = ""
        for _ in range(60):
            text = await self._server.metrics()
            held = re.findall(
                r"^vllm:(?:kv_cache_usage_perc|num_requests_running|num_requests_waiting)\{.*\} (\S+)$", text, re.M
            )
            if held and not any(float(value) for value in held):
                return
            await asyncio.sleep(0.5)
        self.report.lost.append("an idle server still holds requests or pages")

    async def _scrape(self) -> None:
        with contextlib.suppress(aiohttp.ClientError):
            for name, value in METRICS.findall(await self._server.metrics()):
                self.report.metrics[name] = self.report.metrics.get(name, 0) + float(value)

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:7.0f} s  {text}", flush=True)


def read_arguments(arguments: Sequence[str] | None = None) -> tuple[Load, Path]:
    """The load, and where the server's log goes. Options that are not ours are the server's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--format", default="int4", help="cache format (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, help="tokens of greedy responses to check (default: %(default)s)"
    )
    parser.add_argument("--clients", type=int, default=64, help="most clients at once (default: %(default)s)")
    parser.add_argument(
        "--restarts", type=int, default=6, help="times that the server is stopped or killed (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn at random (default: %(default)s)")
    parser.add_argument(
        "--offload", type=Path, metavar="FOLDER", help="store blocks in files of this folder, and damage some"
    )
    parser.add_argument(
        "--server-log", type=Path, default=Path("soak-server.log"), help="where vLLM's log goes (default: %(default)s)"
    )
    args, options = parser.parse_known_args(arguments)
    load = Load(
        args.model,
        CacheFormat.parse(args.format),
        tokens=args.tokens,
        clients=args.clients,
        restarts=args.restarts,
        seed=args.seed,
        options=tuple(options),
        offload=args.offload,
    )
    return load, args.server_log


def main() -> int:
    try:
        report = asyncio.run(Soak(*read_arguments()).run())
    except asyncio.CancelledError:
        return 130
    print("\n".join(report.lines()))
    return 1 if report.wrong or report.lost else 0


if __name__ == "__main__":
    sys.exit(main())
