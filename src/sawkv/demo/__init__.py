"""`sawkv demo`: vLLM serves one model in 16 bits and then from INT4 pages, and answers the same requests over the
OpenAI API.

The demo shows how many tokens the cache holds, how well the model predicts a page of text, whether it recalls a
pass-key hidden in the page, how fast it answers, and what it writes. Greedy texts diverge where two tokens are about
equally likely. As a control, Transformers reads vLLM's 16-bit texts in 16 bits, and shows where it would diverge
without any quantization.

The page (`page.txt`) is from Isaac Newton's Opticks, 1704, in the public domain.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from sawkv.capacity import CPU_BLOCK
from sawkv.errors import SawkvError, UnsupportedError
from sawkv.format.layout import RECENT_PAGE_SIZE, engine_page_size
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm import preflight
from sawkv.integrations.vllm.client import Client, serving
from sawkv.integrations.vllm.options import Options
from sawkv.integrations.vllm.server import CPU_CACHE, server_command

WIDTH: Final = 80
QUESTIONS: Final = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that reverses a string.",
)
DEPTHS: Final = (0.0, 1 / 3, 2 / 3, 1.0)
KEY_LINES: Final = 24
"""Lines of the page in which a pass-key is hidden."""
KEY_TOKENS: Final = 8
"""Tokens of an answer. A key of five digits takes at most six."""
WINDOW: Final = 512
"""Tokens of the page per window. Each window is read from an empty cache."""
REQUESTS: Final = 8
REQUEST_CHARACTERS: Final = 100
"""Of the page, in the prompt of a request."""
REQUEST_TOKENS: Final = 32
BOTH_CORES: Final = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "passive"}
"""Environment of both servers on a CPU. vLLM itself leaves one core to its front end, which is half of two."""
LEAST_SHARE: Final = 0.95
"""Smallest share of the tokens promised by the format that vLLM's cache must hold."""


@dataclass(frozen=True)
class Answer:
    """A greedy answer of one server.

    Attributes:
        prompt, tokens: token ids.
        text: text of the tokens.
    """

    prompt: list[int]
    tokens: list[int]
    text: str


@dataclass(frozen=True)
class Outcome:
    """Measurements of one server.

    Attributes:
        name: of its cache.
        notice: sawkv's line in the log, or "".
        kv_tokens: tokens that its cache holds.
        answers: to `QUESTIONS`.
        losses: of the page's tokens, in nats.
        recalled: whether each pass-key was recalled.
        requests_per_second: with `REQUESTS` at once.
    """

    name: str
    notice: str
    kv_tokens: int
    answers: list[Answer]
    losses: list[float]
    recalled: list[bool]
    requests_per_second: float


def run_demo(
    model: str, *, cache_format: CacheFormat, max_tokens: int, kv_cache_memory: int, max_model_len: int
) -> int:
    """Serve `model` twice, and print a comparison.

    Args:
        model: a checkpoint directory, or a name that vLLM resolves.
        cache_format: the format to compare with vLLM's 16-bit cache.
        max_tokens: tokens per answer.
        kv_cache_memory: bytes of each server's cache.
        max_model_len: tokens of the longest request.

    Returns:
        0, or 1 if the format's cache holds fewer tokens than the format promises.
    """
    import torch

    if max_tokens >= max_model_len:
        raise SawkvError(f"--max-tokens: expected fewer than --max-model-len, {max_model_len}, got {max_tokens}")
    options = ["--kv-cache-memory-bytes", str(kv_cache_memory), "--max-model-len", str(max_model_len)]
    on_gpu = bool(torch.cuda.device_count())
    preflight.check_installation()
    preflight.check_model(model, cache_format, Options(options), on_gpu=on_gpu)
    if not on_gpu:  # on a CPU, compiling a model takes minutes
        options.append("--enforce-eager")
    commands = {
        "16 bits": server_command(model, None, options),
        cache_format.codec.upper(): [
            sys.executable,
            "-m",
            "sawkv",
            "serve",
            model,
            "--format",
            str(cache_format),
            *options,
        ],
    }
    outcomes = []
    for number, (name, command) in enumerate(commands.items(), 1):
        print(f"[{number}/{len(commands)}] vLLM with its KV cache in {name}", flush=True)
        outcomes.append(_measure(name, command, max_tokens, None if on_gpu else BOTH_CORES | os.environ))
    wide, narrow = outcomes
    if not narrow.notice:  # vLLM continues without a plugin that it cannot load
        raise UnsupportedError(
            "demo: expected vLLM to run with sawkv, got a log without its line; so there is nothing to compare"
        )
    control = forks(model, wide.answers)
    served = model if str(cache_format) == "int4" else f"{model} --format {cache_format}"
    print("\n".join(report(wide, narrow, control, kv_cache_memory, served, on_gpu=on_gpu)), flush=True)
    share = LEAST_SHARE * max_model_len / (max_model_len + newest_room(cache_format, on_gpu=on_gpu))
    promised = bytes_per_token(narrow.notice)
    return 0 if narrow.kv_tokens / wide.kv_tokens >= share * promised[1] / promised[0] else 1


def newest_room(cache_format: CacheFormat, *, on_gpu: bool) -> int:
    """Tokens of a request's pages in whose place a second cache layer has its newest ones in 16 bits."""
    blocks = cache_format.recent // RECENT_PAGE_SIZE + bool(cache_format.recent)
    return blocks * (engine_page_size(cache_format) if on_gpu else CPU_BLOCK)


def bytes_per_token(notice: str) -> tuple[int, int]:
    """Bytes per token, KV head and layer in the format and in 16 bits, parsed from sawkv's line in the log."""
    narrow, wide = (
        int(notice.split(before)[1].split(after)[0]) for before, after in ((", ", " bytes"), ("(16 bits: ", ")"))
    )
    return narrow, wide


def _measure(name: str, command: Sequence[str], max_tokens: int, env: Mapping[str, str] | None) -> Outcome:
    start = time.monotonic()

    def say(stage: str) -> None:
        print(f"{time.monotonic() - start:8.0f} s  {stage}", flush=True)

    page = (files("sawkv") / "demo" / "page.txt").read_text(encoding="utf-8")
    with (
        tempfile.TemporaryDirectory(prefix="sawkv-demo-") as folder,
        serving(command, Path(folder, "log"), env=env, say=say) as client,
    ):
        say("it answers; asking questions")
        answers = [_ask(client, question, max_tokens) for question in QUESTIONS]
        say("reading a page of text")
        ids = client.post("/tokenize", {"prompt": page})["tokens"]
        losses = [-value for part in _windows(ids) for value in client.prompt_logprobs(part)]
        say("looking for pass-keys in it")
        recalled = [_recalls(client, page, depth) for depth in DEPTHS]
        say(f"{REQUESTS} requests at once")
        begun = time.monotonic()
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(
                pool.map(
                    lambda i: client.complete(
                        page[200 * i :][:REQUEST_CHARACTERS], max_tokens=REQUEST_TOKENS, ignore_eos=True
                    ),
                    range(REQUESTS),
                )
            )
        rate = REQUESTS / (time.monotonic() - begun)
        return Outcome(name, client.notice(), client.kv_tokens(), answers, losses, recalled, rate)


def _ask(client: Client, question: str, max_tokens: int) -> Answer:
    """Ask by the model's chat template, or with plain text if it has none."""
    options: dict[str, Any] = {"max_tokens": max_tokens, "return_token_ids": True, "temperature": 0}
    try:
        found = client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": question}]} | options)
    except UnsupportedError:
        found = client.post("/v1/completions", {"prompt": f"{question}\n"} | options)
    choice = found["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return Answer(found.get("prompt_token_ids") or choice["prompt_token_ids"], choice["token_ids"], text)


def _windows(ids: list[int]) -> list[list[int]]:
    return [part for first in range(0, len(ids), WINDOW) if len(part := ids[first : first + WINDOW]) > 1]


def _recalls(client: Client, page: str, depth: float) -> bool:
    """Whether a pass-key stated at `depth` of the start of the page is recalled."""
    key = str(random.Random(depth).randrange(10_000, 100_000))
    lines = page.splitlines()[:KEY_LINES]
    lines.insert(round(depth * len(lines)), f"The pass key is {key}.")
    prompt = "\n".join([*lines, "What is the pass key? The pass key is"])
    answer: str = client.complete(prompt, max_tokens=KEY_TOKENS)["text"]
    return answer.strip().startswith(key)


def forks(model: str, answers: Sequence[Answer]) -> list[int] | None:
    """For each answer, the number of tokens after which Transformers in bf16 would choose another one. None if it
    cannot load the model.

    One pass over prompt and answer decides it: up to the first different choice, decoding sees the same tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from sawkv.prepare.linear import LinearInFp32

    disable_progress_bar()  # type: ignore[no-untyped-call]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)  # type: ignore[arg-type]
    except (OSError, ValueError, ImportError, RuntimeError):  # RuntimeError: out of memory
        return None
    found = []
    with torch.inference_mode(), LinearInFp32():
        for answer in answers:
            logits = loaded(torch.tensor([answer.prompt + answer.tokens], device=device)).logits[
                0, len(answer.prompt) - 1 : -1
            ]
            found.append(first_difference(logits.argmax(-1).tolist(), answer.tokens))
    return found


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def report(
    wide: Outcome, narrow: Outcome, control: list[int] | None, kv_cache_memory: int, model: str, *, on_gpu: bool
) -> list[str]:
    """Lines of at most `WIDTH` columns."""
    lines = []
    for question, *both in zip(QUESTIONS, wide.answers, narrow.answers, strict=True):
        lines += ["", *textwrap.wrap(question, WIDTH - 2, initial_indent="> ", subsequent_indent="> ")]
        for outcome, answer in zip((wide, narrow), both, strict=True):
            lines += _beside(outcome.name, answer.text)
    memory = [kv_cache_memory / outcome.kv_tokens for outcome in (wide, narrow)]
    ppl = [math.exp(statistics.fmean(outcome.losses)) for outcome in (wide, narrow)]
    change = _change(wide.losses, narrow.losses)
    keys = [f"{sum(outcome.recalled)} of {len(outcome.recalled)}" for outcome in (wide, narrow)]
    rates = [outcome.requests_per_second for outcome in (wide, narrow)]
    rows = [
        ("", wide.name, narrow.name, ""),
        (
            "tokens that the KV cache holds",
            f"{wide.kv_tokens:,}",
            f"{narrow.kv_tokens:,}",
            f"{narrow.kv_tokens / wide.kv_tokens:.2f}x",
        ),
        ("memory per token, bytes", f"{memory[0]:,.0f}", f"{memory[1]:,.0f}", f"1/{memory[0] / memory[1]:.2f}"),
        ("perplexity of a page of text", f"{ppl[0]:.2f}", f"{ppl[1]:.2f}", change),
        ("pass-keys recalled from the page", *keys, ""),
        (
            f"requests per second, {REQUESTS} at once",
            f"{rates[0]:.2f}",
            f"{rates[1]:.2f}",
            f"{rates[1] / rates[0]:.2f}x",
        ),
    ]
    lines += ["", *(f"{name:<36}{left:>14}{right:>14}{ratio:>16}" for name, left, right, ratio in rows), ""]
    lines += _paragraph(about_texts(wide, narrow, control))
    lines += ["", *_paragraph(f"In sawkv's words: {narrow.notice.removeprefix('sawkv: ')}.")]
    ratio = narrow.kv_tokens / wide.kv_tokens
    short = f"In short: {ratio:.2f} times the tokens in the same memory, perplexity {change}."
    if not on_gpu:
        short += " On a CPU, 4 bits save memory and no time; docs/performance.md has the speed of GPUs."
    lines += ["", *_paragraph(short)]
    serve = f"Next: sawkv serve {model}"
    return [*lines, serve] if on_gpu else [*lines, f"{serve} \\", f"  {CPU_CACHE}"]


def _change(wide: Sequence[float], narrow: Sequence[float]) -> str:
    """The change of perplexity, with half of its 95 % interval over tokens."""
    changes = [after - before for before, after in zip(wide, narrow, strict=True)]
    error = 1.96 * statistics.stdev(changes) / math.sqrt(len(changes))
    return f"{math.expm1(statistics.fmean(changes)):+.1%} ± {error:.1%}"


def about_texts(wide: Outcome, narrow: Outcome, control: list[int] | None) -> str:
    """Where the greedy texts diverge, and where they diverge without quantization."""
    lengths = [len(answer.tokens) for answer in wide.answers]
    parted = [first_difference(a.tokens, b.tokens) for a, b in zip(wide.answers, narrow.answers, strict=True)]

    def said(places: Sequence[int]) -> str:
        return ", ".join(
            str(place) if place < length else "not at all" for place, length in zip(places, lengths, strict=True)
        )

    found = (
        f"Greedy texts part where two words are about as likely, and then go their own ways. Here {narrow.name} parts"
        " from 16 bits after "
    )
    found += f"this many tokens: {said(parted)}."
    if control is not None:
        found += f" Transformers, which rounds its 16 bits otherwise, parts from vLLM's 16 bits after {said(control)}."
    return found


def _beside(name: str, text: str) -> list[str]:
    """A text to the right of its name."""
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in text.strip().expandtabs(4))
    width = WIDTH - 10
    parts = [part for line in shown.split("\n") for part in textwrap.wrap(line, width) or [""]]
    return [f"{name if not i else '':>7} | {part.rstrip()}".rstrip() for i, part in enumerate(parts)]


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))
