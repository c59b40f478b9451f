"""`benchmarks.agents` without an engine: what agents send, what of their answers is a fault, and which limits a record
breaks.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks import agents, shapes
from benchmarks.agents import SETS, Turn, Work, check, summary
from benchmarks.engines import recorded_name
from sawkv.errors import UnsupportedError
from sawkv.prepare.corpus import preparation_windows

WORK = Work(agents=3, first=50, grow_to=140, turns=4, answer=5, think=0.0)


class Server:
    """Answers with tokens 1000, 1001, ..., in chunks of two, as an OpenAI client gets them."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.prompts: list[list[int]] = []
        self.completions = self

    async def create(self, *, max_tokens: int, extra_body: dict[str, Any], **options: Any) -> Any:
        self.prompts.append(list(extra_body["prompt"]))
        assert extra_body == {"prompt": self.prompts[-1], "ignore_eos": True, "return_token_ids": True}
        ids = list(range(1000, 1000 + min(max_tokens, self.answer)))

        async def chunks() -> Any:
            for start in range(0, len(ids), 2):
                await asyncio.sleep(0.002)
                yield SimpleNamespace(choices=[SimpleNamespace(model_extra={"token_ids": ids[start : start + 2]})])
            yield SimpleNamespace(choices=[])  # the usage

        return chunks()


def converse(server: Any, work: Work, agent: int) -> list[Turn]:
    turns: list[Turn] = []
    asyncio.run(agents._run_agent(server, "model", work, agent, 500, turns))
    return turns


def test_each_turn_sends_all_that_came_before() -> None:
    server = Server(answer=5)
    turns = converse(server, WORK, 2)
    new = WORK.tokens(2, 500)
    assert [len(prompt) for prompt in server.prompts] == WORK.prompts() == [50, 78, 106, 134]
    for before, prompt, added in zip(server.prompts, server.prompts[1:], new[1:], strict=False):
        assert prompt == [*before, *range(1000, 1005), *added]
    assert [(turn.agent, turn.turn, turn.tokens) for turn in turns] == [(2, i, 5) for i in range(4)]
    assert all(0 < turn.first_s < turn.last_s for turn in turns)


@pytest.mark.parametrize("work", [WORK, *SETS.values(), Work(1, 7, 8, turns=1, answer=1)])
def test_conversations_grow_to_the_tokens_asked_for(work: Work) -> None:
    end = work.prompts()[-1] + work.answer
    assert work.grow_to - max(1, work.turns - 1) < end <= work.grow_to
    assert work.held == work.agents * end
    assert sum(work.is_late(turn) for turn in range(work.turns)) == max(1, work.turns // 3)


def test_the_best_hit_rate_is_that_of_a_cache_which_forgets_nothing() -> None:
    kept: set[tuple[int, ...]] = set()
    found = asked = 0
    server = Server(answer=5)
    converse(server, WORK, 0)
    for prompt in server.prompts:
        asked += len(prompt)
        found += max((n for n in range(1, len(prompt)) if tuple(prompt[:n]) in kept), default=0)
        whole = [*prompt, *range(1000, 1004)]  # the last token of an answer is not computed
        kept |= {tuple(whole[:n]) for n in range(1, len(whole) + 1)}
    assert WORK.hit_rate() == found / asked
    assert WORK.hit_rate(lost=7) == (found - 3 * 7) / asked
    assert WORK.hit_rate(lost=1000) == 0


def test_no_two_prompts_begin_alike_and_each_format_gets_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    warm: list[list[int]] = []
    client: Any = SimpleNamespace(complete=lambda prompt, **_: warm.append(prompt))
    agents._warm_up(client, WORK, 500)
    starts = [tuple(WORK.tokens(agent, 500)[0][:16]) for agent in range(WORK.agents)]
    assert len({*starts, *(tuple(prompt[:16]) for prompt in warm)}) == WORK.agents + 1
    assert WORK.tokens(1, 500) == WORK.tokens(1, 500)
    assert WORK.pauses(1) != replace(WORK, think=1.0).pauses(1) == replace(WORK, think=1.0).pauses(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first": 0}, "expected agents, first prompts"),
        ({"think": -1.0}, "expected agents, first prompts"),
        ({"grow_to": 72}, r"--grow-to: expected at least 73 tokens, got 72"),
    ],
)
def test_work_that_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    assert replace(WORK, grow_to=73).new == 1
    with pytest.raises(SystemExit, match=words):
        replace(WORK, **change)


def test_arguments_change_the_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--sets", "64x20k", "16x32k", "--agents", "8"]
    monkeypatch.setattr("sys.argv", ["agents", *given, "--output", "x", "--options", "--enforce-eager"])
    args = agents._arguments()
    assert args.works == [replace(SETS[name], agents=8) for name in ("64x20k", "16x32k")]
    assert (args.formats, args.options) == (["bf16", "fp8", "int4"], ["--enforce-eager"])
    for given, words in (
        (["--formats", "int4", "vllm_int4_per_token_head"], "expected bf16, fp8 or sawkv's, got vllm"),
        (["--formats", "int4", "int5"], "int5"),
        (["--options", "--enforce-eager"], "expected --output too"),
    ):
        monkeypatch.setattr("sys.argv", ["agents", *given])
        with pytest.raises(SystemExit):
            agents._arguments()
        assert words in capsys.readouterr().err


ANSWERS = [Turn(a, t, 5, first_s=0.1 * (t + 1), last_s=0.1 * (t + 1) + 0.04) for a in range(3) for t in range(4)]


def test_measures_are_those_of_the_answers() -> None:
    found = summary(WORK, ANSWERS, seconds=6.0)
    assert found["output_tok_s"] == 10.0
    assert found["ttft_by_turn_s"] == [0.1, 0.2, 0.3, 0.4]
    assert (found["ttft_p50_s"], found["late_ttft_p50_s"]) == (0.25, 0.4)
    assert found["tpot_p50_ms"] == pytest.approx(10)


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        (ANSWERS[1:], "expected 12 answers, got 11"),
        ([*ANSWERS[1:], ANSWERS[1]], "expected 12 answers, got 11"),
        ([replace(ANSWERS[0], tokens=4), *ANSWERS[1:]], "expected answers of 5 tokens, got .*tokens=4"),
    ],
)
def test_a_lost_or_short_answer_is_no_record(turns: list[Turn], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        summary(WORK, turns, seconds=6.0)


def test_a_server_that_answers_less_is_noticed() -> None:
    turns = [turn for agent in range(WORK.agents) for turn in converse(Server(answer=3), WORK, agent)]
    with pytest.raises(UnsupportedError, match="expected answers of 5 tokens"):
        summary(WORK, turns, seconds=6.0)


GROWING = Work(64, 16384, 32768)  # 2.1 M tokens
BEST = GROWING.hit_rate() - 0.001


def record(name: str, speed: float, late: float, tokens: int, **changes: Any) -> dict[str, Any]:
    hits = BEST if GROWING.held <= tokens else 0.4
    made = {"format": name, "output_tok_s": speed, "late_ttft_p50_s": late, "kv_tokens": tokens, "hit_rate": hits}
    return made | changes


BF16, FP8 = record("bf16", 100.0, 40.0, 800_000), record("fp8", 200.0, 20.0, 1_600_000)
INT4 = record("int4", 500.0, 1.0, 3_000_000)
UNPREPARED = INT4 | {"format": recorded_name("int4", no_prepare=True)}
LARGE = {"kv_tokens": 9_000_000, "hit_rate": BEST}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([BF16, FP8, INT4], []),
        ([INT4], []),
        ([BF16, FP8], []),
        ([FP8, INT4 | {"output_tok_s": 399.0}], ["at least 2.0x of fp8's output tokens per second, got 1.995x"]),
        ([BF16, INT4 | {"output_tok_s": 299.0}], ["at least 3.0x of bf16's output tokens per second, got 2.990x"]),
        ([INT4 | {"output_tok_s": 1.0}, INT4, FP8], []),  # the last record of a format counts
        ([FP8, INT4 | {"output_tok_s": 399.0}, UNPREPARED], ["int4: expected at least 2.0x of fp8's output tokens"]),
        ([FP8, INT4 | {"late_ttft_p50_s": 4.2}], ["at most 0.2x of fp8's late time to first token, got 0.210x"]),
        ([BF16, INT4 | {"late_ttft_p50_s": 30.0}], []),
        # Where all fit, INT4 must not lose, and no more is asked.
        ([FP8 | LARGE, BF16, INT4 | {"output_tok_s": 200.0, "late_ttft_p50_s": 20.0}], []),
        ([FP8 | LARGE, INT4 | {"output_tok_s": 199.0}], ["at least 1.0x of fp8's"]),
        # BF16 alone tells what fp8 would hold.
        ([BF16 | {"kv_tokens": 1_100_000}, INT4 | {"output_tok_s": 101.0}], []),
        ([INT4 | {"hit_rate": 0.77}], ["int4: expected a hit rate of at least 0.7780, all agents fit, got 0.77"]),
        ([FP8 | {"hit_rate": 0.79}], ["fp8: expected a hit rate of at most 0.7824, got 0.79"]),
    ],
)
def test_what_breaks_a_limit_is_said(records: list[dict[str, Any]], said: list[str]) -> None:
    faults = check(GROWING, records)
    assert len(faults) == len(said)
    for fault, words in zip(faults, said, strict=True):
        assert words in fault


def test_a_shape_is_prepared_on_many_tokens_and_prompts_keep_their_length(tmp_path: Path) -> None:
    """The tokenizer of a shape has a word for each token. Text without such words was one unknown token throughout, and
    a model prepared on it was prepared on nothing.
    """
    tokenizer = Tokenizer.from_file(f"{shapes.write_model(tmp_path, 'mistral-7b')}/tokenizer.json")
    text = preparation_windows(lambda words: tokenizer.encode(words).ids, 256, 4)
    assert len(text.unique()) > 40
    assert (text == 0).float().mean() < 0.01
    ids = [*range(200), *np.random.default_rng().integers(0, 32000, 500).tolist(), 31999]
    assert tokenizer.encode(tokenizer.decode(ids)).ids == ids
