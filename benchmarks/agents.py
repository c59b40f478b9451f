"""Many agents on one server: each turn sends all that came before and new tokens; turns of other agents lie between.

    python -m benchmarks.agents --formats int4          # 64 agents growing to 32k tokens, Qwen3-8B's shape
    python -m benchmarks.agents --formats fp8           # one format a command, if its time is limited: records add up
    python -m benchmarks.agents --sets 64x20k 16x32k    # fits in fp8, not in BF16; fits in all
    python -m benchmarks.agents --model models/sawkv-6m --formats bf16 int4 --agents 4 --first 256 --grow-to 1024 \
        --turns 4 --answer 8 --output build/agents.jsonl --options --kv-cache-memory-bytes 12000000 --enforce-eager
                                                        # on a CPU, to try this file

One server per format, with vLLM's default settings, prefix caching among them, and OpenAI's client. It serves one set
of agents after the other. An agent's first prompt has `--first` random tokens, the same ones for every format. The
server answers `--answer` tokens, never fewer. After a time to think, exponential with a mean of `--think` seconds, the
agent sends its first prompt, the answer, and as many new tokens that its last answer ends at `--grow-to`. Each format
and set is a line in docs/results/agents.jsonl:

    output_tok_s             output tokens of all agents / seconds from the start to the last token
    ttft_p50_s               median time to first token, since the request was sent; ttft_by_turn_s: turn by turn
    late_ttft_p50_s          that of the last third of turns
    tpot_p50_ms              median over requests, of each one's mean time between its tokens after the first
    hit_rate                 prompt tokens found in the prefix cache / those looked up, of the server's /metrics
    best_hit_rate            that of a cache which forgets nothing
    computed_tok_s           prompt tokens that were not found / seconds
    kv_tokens, preemptions   that the cache holds, as vLLM's log says; requests that had to give their pages back

The exit status is 1 if an answer is lost or short, if a cache that holds all agents forgets some, and if a limit is
broken: where the agents do not fit into fp8, sawkv's format writes at least 2.0x of fp8's tokens per second and 3.0x of
bf16's, with at most 0.2x of fp8's late time to first token; else at least as many as each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import openai

from benchmarks import engines
from benchmarks.engines import PEERS
from benchmarks.plots import agents_table, append_record, read_records
from sawkv.bench.records import SIXTEEN_BITS
from sawkv.bench.server import serve_cache
from sawkv.cli import end_as_by_ctrl_c
from sawkv.errors import UnsupportedError
from sawkv.integrations.vllm.client import PREFIX_COUNTERS, Client

COUNTERS: Final = (*PREFIX_COUNTERS, "vllm:num_preemptions")
LEAST_OUTPUT: Final = {"fp8": 2.0, "bf16": 3.0}
"""Of sawkv's formats over these, where the agents fit into neither."""
MOST_LATE_TTFT: Final = 0.2
"""Over fp8's, there."""
LARGEST_BLOCK: Final = 128
"""Tokens of vLLM's blocks, at most: those on a CPU. Whole ones alone are found in the prefix cache."""
SEED: Final = 23


@dataclass(frozen=True)
class Work:
    """What the agents do.

    Attributes:
        agents: that run at once.
        first: tokens of an agent's first prompt.
        grow_to: tokens of its conversation at the end.
        turns: of each agent.
        answer: tokens of an answer.
        think: mean seconds between an answer and the next turn.
    """

    agents: int
    first: int
    grow_to: int
    turns: int = 6
    answer: int = 128
    think: float = 1.0

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 0 or min(self.agents, self.first, self.turns, self.answer) < 1:
            raise SystemExit(f"expected agents, first prompts, turns and answers, got {self}")
        if self.turns > 1 and self.new < 1:
            needed = self.first + self.turns * self.answer + self.turns - 1
            raise SystemExit(f"--grow-to: expected at least {needed} tokens, got {self.grow_to}")

    @property
    def new(self) -> int:
        """Tokens that each turn after the first adds to the answer before."""
        return (self.grow_to - self.first - self.turns * self.answer) // max(1, self.turns - 1)

    def prompts(self) -> list[int]:
        """Tokens of an agent's prompts, turn by turn."""
        return [self.first + turn * (self.answer + self.new) for turn in range(self.turns)]

    @property
    def held(self) -> int:
        """Tokens of all conversations at the end."""
        return self.agents * (self.prompts()[-1] + self.answer)

    def hit_rate(self, lost: int = 0) -> float:
        """Of a cache that forgets nothing, but does not find the last `lost` tokens that it holds of each prompt. The
        last token of an answer has no K and V yet.
        """
        prompts = self.prompts()
        return sum(max(0, prompt - self.new - 1 - lost) for prompt in prompts[1:]) / sum(prompts)

    def is_late(self, turn: int) -> bool:
        """Whether a turn is in the last third."""
        return turn >= self.turns - max(1, self.turns // 3)

    def tokens(self, agent: int, vocabulary: int) -> list[list[int]]:
        """What the agent adds in each turn, the same for every format."""
        draw = np.random.default_rng([SEED, self.agents, self.grow_to, agent])
        return [draw.integers(0, vocabulary, self.new if turn else self.first).tolist() for turn in range(self.turns)]

    def pauses(self, agent: int) -> list[float]:
        """Seconds before each turn, the same for every format."""
        pauses: list[float] = np.random.default_rng([SEED, agent, 1]).exponential(self.think, self.turns).tolist()
        return pauses

    def __str__(self) -> str:
        return f"{self.agents}x{self.grow_to}"


SETS: Final = {
    "64x32k": Work(64, 16384, 32768),
    "64x20k": Work(64, 8192, 20480),
    "16x32k": Work(16, 16384, 32768),
}
"""On one H200, Qwen3-8B's shape fits 0.8 M tokens in BF16, 1.6 M in fp8 and 3.0 M in INT4."""


@dataclass(frozen=True)
class Turn:
    """One answer: seconds are since its request was sent."""

    agent: int
    turn: int
    tokens: int
    first_s: float
    last_s: float


def main() -> None:
    args = _arguments()
    end_as_by_ctrl_c()
    faults = []
    with engines.model_folder(args.model, tokenizer=True) as model:
        for name in args.formats:
            try:
                for record in _run_format(args, name, model):
                    append_record(args.output, record)
            except UnsupportedError as error:
                faults.append(f"{name}: {error}")
    for work in args.works:
        found = [r for r in read_records(args.output) if r["model"] == Path(model).name and r["work"] == asdict(work)]
        device = found[-1]["device"] if found else ""
        faults += check(work, [record for record in found if record["device"] == device])
    print(f"\n{agents_table(read_records(args.output))}\n")
    print("\n".join(faults or ["all limits are kept"]))
    sys.exit(bool(faults))


def check(work: Work, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of the records breaks a limit. Of several of a format the last counts."""
    latest = {record["format"]: record for record in records}
    faults = []
    for name, record in latest.items():
        rate, least, best = record["hit_rate"], work.hit_rate(LARGEST_BLOCK), work.hit_rate()
        if rate > best:
            faults.append(f"{name}: expected a hit rate of at most {best:.4f}, got {rate}: prompts are alike")
        if work.held <= record["kv_tokens"] and rate < least:
            faults.append(f"{name}: expected a hit rate of at least {least:.4f}, all agents fit, got {rate}")
    wide = [latest[name]["kv_tokens"] * times for name, times in (("fp8", 1), ("bf16", 2)) if name in latest]
    fits = not wide or work.held <= wide[0]
    for ours, peer in ((ours, peer) for ours in latest if ours not in PEERS for peer in LEAST_OUTPUT if peer in latest):
        least = 1.0 if fits else LEAST_OUTPUT[peer]
        ratio = latest[ours]["output_tok_s"] / latest[peer]["output_tok_s"]
        if ratio < least:
            faults.append(f"{ours}: expected at least {least}x of {peer}'s output tokens per second, got {ratio:.3f}x")
        late = latest[ours]["late_ttft_p50_s"] / latest[peer]["late_ttft_p50_s"]
        if peer == "fp8" and not fits and late > MOST_LATE_TTFT:
            faults.append(
                f"{ours}: expected at most {MOST_LATE_TTFT}x of {peer}'s late time to first token, got {late:.3f}x"
            )
    return faults


def _arguments() -> argparse.Namespace:
    parser = engines.arguments(__doc__, ["bf16", "fp8", "int4"], "agents.jsonl")
    first = next(iter(SETS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[first], help=f"of agents (default: {first})")
    for name, kind in (("agents", int), ("first", int), ("grow-to", int), ("turns", int), ("answer", int)):
        parser.add_argument(f"--{name}", type=kind, help="in place of each set's")
    parser.add_argument("--think", type=float, help="in place of each set's")
    parser.add_argument("--limit", type=float, default=540, help="seconds for a set's agents (default: %(default)s)")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more options of vLLM's server; last")
    args = parser.parse_args()
    if unknown := [name for name in args.formats if name in PEERS and name not in LEAST_OUTPUT]:
        parser.error(f"--formats: expected bf16, fp8 or sawkv's, got {', '.join(unknown)}")
    if args.options and args.output == parser.get_default("output"):
        parser.error("--options: expected --output too, since the records that docs show are of default settings")
    given = {field.name: getattr(args, field.name) for field in fields(Work)}
    given = {name: value for name, value in given.items() if value is not None}
    args.works = [replace(SETS[each], **given) for each in args.sets]
    return args


def _run_format(args: argparse.Namespace, name: str, model: str) -> Iterator[dict[str, Any]]:
    """Serve one format, and let each set of agents run. Yields records.

    Raises:
        UnsupportedError: it cannot be served, or an answer is lost or short.
    """
    words = ["--max-model-len", str(max(work.grow_to for work in args.works))]
    words += ["--load-format", engines.load_format(model)]
    words += ["--gpu-memory-utilization", str(engines.MEMORY), "--kernel-config", json.dumps(engines.QUICK_KERNELS)]
    words += ["--no-prepare"] if args.no_prepare and name not in PEERS else []
    log = engines.log_of(args, "agents", name)
    vocabulary = json.loads(Path(model, "config.json").read_text())["vocab_size"]
    print(f"{name}: starting vLLM's server, log in {log}", flush=True)
    cache = SIXTEEN_BITS if name == "bf16" else name
    with serve_cache(model, cache, [*words, *args.options], log, env=engines.QUICK_START) as (client, served):
        print(f"{name}: ready after {served.start_s:.0f} s, {served.kv_tokens:,} tokens of KV cache", flush=True)
        for work in args.works:
            record = {
                **engines.measured(args, model, name),
                "set": str(work),
                "work": asdict(work),
                **_measure(client, model, work, vocabulary, args.limit),
                "kv_tokens": served.kv_tokens,
            }
            print(
                f"{name}, {work}: {record['seconds']} s, {record['output_tok_s']} output tok/s, first token"
                f" {record['ttft_p50_s']} s, late {record['late_ttft_p50_s']} s, then {record['tpot_p50_ms']} ms a"
                f" token; {record['hit_rate']:.1%} of prompts found",
                flush=True,
            )
            yield record


def _measure(client: Client, model: str, work: Work, vocabulary: int, limit: float) -> dict[str, Any]:
    """Let the agents run. Returns the measures of their record.

    Raises:
        UnsupportedError: an answer is lost or short.
    """
    _warm_up(client, work, vocabulary)
    before = client.counters(*COUNTERS)
    start = time.monotonic()
    try:
        turns = asyncio.run(_run_agents(client, model, work, vocabulary, limit))
    except (openai.OpenAIError, TimeoutError) as error:
        raise UnsupportedError(f"{work}: {error!r} after {time.monotonic() - start:.0f} s") from error
    seconds = time.monotonic() - start
    asked, hit, preempted = (now - was for now, was in zip(client.counters(*COUNTERS), before, strict=True))
    return {
        **summary(work, turns, seconds),
        "hit_rate": round(hit / asked, 4),
        "best_hit_rate": round(work.hit_rate(), 4),
        "computed_tok_s": round((asked - hit) / seconds, 1),
        "preemptions": int(preempted),
    }


def summary(work: Work, turns: Sequence[Turn], seconds: float) -> dict[str, Any]:
    """The measures of a record that come from the answers.

    Raises:
        UnsupportedError: an answer is lost, twice there, or has another length than asked.
    """
    wanted = {(agent, turn) for agent in range(work.agents) for turn in range(work.turns)}
    if len(turns) != len(wanted) or {(turn.agent, turn.turn) for turn in turns} != wanted:
        raise UnsupportedError(f"expected {len(wanted)} answers, got {len({(t.agent, t.turn) for t in turns})}")
    if short := [turn for turn in turns if turn.tokens != work.answer]:
        raise UnsupportedError(f"expected answers of {work.answer} tokens, got {short[0]} and {len(short) - 1} more")
    by_turn = [statistics.median(t.first_s for t in turns if t.turn == turn) for turn in range(work.turns)]
    later = [1e3 * (t.last_s - t.first_s) / (work.answer - 1) for t in turns] if work.answer > 1 else []
    return {
        "seconds": round(seconds, 3),
        "output_tok_s": round(sum(turn.tokens for turn in turns) / seconds, 2),
        "ttft_p50_s": round(statistics.median(turn.first_s for turn in turns), 4),
        "late_ttft_p50_s": round(statistics.median(t.first_s for t in turns if work.is_late(t.turn)), 4),
        "ttft_by_turn_s": [round(first, 4) for first in by_turn],
        "tpot_p50_ms": round(statistics.median(later), 3) if later else None,
    }


def _warm_up(client: Client, work: Work, vocabulary: int) -> None:
    """Compile what was not compiled at start-up: long prompts, and short turns over them."""
    draw = np.random.default_rng([SEED, work.agents])  # no agent's: numpy takes [SEED, 0] and SEED for the same
    prompt: list[int] = draw.integers(0, vocabulary, work.first).tolist()
    for _ in range(3):
        client.complete(prompt, max_tokens=2, ignore_eos=True)
        prompt = prompt[: work.first - work.first // 4] + draw.integers(0, vocabulary, work.first // 4).tolist()


async def _run_agents(client: Client, model: str, work: Work, vocabulary: int, limit: float) -> list[Turn]:
    turns: list[Turn] = []
    url = f"http://127.0.0.1:{client.port}/v1"
    async with (
        # By default OpenAI's client gives up a connection after 5 s, and 64 long prompts keep a server that long.
        openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=limit) as server,
        asyncio.timeout(limit),
    ):
        await asyncio.gather(*(_run_agent(server, model, work, i, vocabulary, turns) for i in range(work.agents)))
    return turns


async def _run_agent(
    server: openai.AsyncOpenAI, model: str, work: Work, agent: int, vocabulary: int, turns: list[Turn]
) -> None:
    """One conversation; each answer is added to `turns`."""
    conversation: list[int] = []
    for turn, (new, pause) in enumerate(zip(work.tokens(agent, vocabulary), work.pauses(agent), strict=True)):
        await asyncio.sleep(pause)
        conversation += new
        answer, times = await _ask(server, model, conversation, work.answer)
        conversation += answer
        turns.append(Turn(agent, turn, len(answer), *times))


async def _ask(
    server: openai.AsyncOpenAI, model: str, prompt: list[int], count: int
) -> tuple[list[int], tuple[float, float]]:
    """The answer's tokens, and the seconds until the first and the last of them."""
    answer: list[int] = []
    first = last = 0.0
    start = time.monotonic()
    chunks = await server.completions.create(
        model=model,
        prompt="",  # extra_body's is sent: for a prompt of 28,000 tokens the client looks at the type of each, in 0.2 s
        max_tokens=count,
        temperature=0,
        stream=True,
        extra_body={"prompt": prompt, "ignore_eos": True, "return_token_ids": True},
    )
    async for chunk in chunks:
        new: list[int] = [token for choice in chunk.choices for token in (choice.model_extra or {})["token_ids"] or ()]
        if new:
            last = time.monotonic() - start
            first = first or last
            answer += new
    return answer, (first, last)


if __name__ == "__main__":
    main()
