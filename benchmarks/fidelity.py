# Over 400 lines: one program, from servers to records, read from top to bottom.
"""The effect of smaller KV caches on real checkpoints: each is served from several caches, and asked over HTTP.

    python -m benchmarks.fidelity smollm2 gemma3 --jobs 5  # docs/results/real_models.jsonl
    python -m benchmarks.fidelity smollm2 --methods served --tokens 1024 --window 128  # small
    python -m benchmarks.fidelity smollm2 --tokens 0 --recall-lengths 4096 8192 --recall-count 20  # real_recall.jsonl
    python -m benchmarks.fidelity qwen25 --window 32767 --tokens 131064  # KL by position too; a server answers a token
    python -m benchmarks.fidelity smollm2 --through lab --methods prepared int4  # the same windows in the lab

A checkpoint is a directory, or NAME=DIRECTORY. For each one `vllm` serves it in 16 bits, then in the ways that
--methods name:

    served          `sawkv serve MODEL`, and nothing else said
    unprepared      the same with --no-prepare
    int8, bf16, ... `sawkv serve MODEL --format ...`; the distance of bf16 pages is that of rounding: the floor
    fp8, vllm_int4_per_token_head, turboquant_4bit_nc, ...   vLLM's own --kv-cache-dtype, without sawkv

Windows of text are sent as prompts, one at a time, and every key and value that a token attends to is read back from
the cache, its own included, by all of these. Distributions are compared over the whole vocabulary (`recorder`); that
the log-probabilities that the server answers with are the same ones is checked. Intervals are 95 % by bootstrap over
windows. Servers run --enforce-eager, `--jobs` at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from safetensors.torch import load_file, save_file

from benchmarks.plots import record_line
from benchmarks.texts import text_file
from sawkv.cli import end_as_by_ctrl_c
from sawkv.errors import FormatError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.client import POLL, Client, check_layers, serving
from sawkv.integrations.vllm.options import Options
from sawkv.integrations.vllm.server import server_command
from sawkv.lab.divergence import Reference, TokenScores
from sawkv.lab.evaluate import STATES_KEPT, device_name, shipped_samples
from sawkv.lab.methods import find_method, fit
from sawkv.lab.tasks import Prompt, make_prompts
from sawkv.prepare.model import EvalModel, default_dtype, find_device
from sawkv.prepare.text import Text, load_text

RESULTS: Final = Path("docs/results")
WIDE: Final = "16bit"
METHODS: Final = ("served", "unprepared", "int8", "fp8", "vllm_int4_per_token_head", "bf16")
BITS: Final = {"fp8": 8.0, WIDE: 16.0}
RESAMPLES: Final = 10_000
CLIENTS: Final = 8
FIRST_POSITIONS: Final = 1024
"""Of a long window: what its later positions are compared with."""
CHUNK: Final = 4096
"""Tokens of a prompt that vLLM takes at once, and whose logits it holds at once."""
AGREES: Final = 0.02
"""Nats a token by which the server's answers may differ from what is computed here; both round logits of 16 bits."""


@dataclass(frozen=True)
class Job:
    """What one server is asked.

    Attributes:
        name, folder: of the checkpoint.
        ids: [num_windows, window] of all texts, one after the other; None leaves predictions out.
        texts: name and number of windows of each.
        text: one of them, with the model's tokenizer.
        prompts: of recall.
        states: file for the hidden states of 16 bits.
        work: folder for files and logs.
        options: for vLLM.
    """

    name: str
    folder: Path
    ids: torch.Tensor | None
    texts: dict[str, int]
    text: Text
    prompts: list[Prompt]
    work: Path
    options: list[str]

    @property
    def states(self) -> Path:
        return self.work / f"{self.name}.states"


@torch.no_grad()
def main() -> None:
    args = _arguments()
    end_as_by_ctrl_c()
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    jobs = [_job(*_named(model), args) for model in args.models]
    setting = {"device": device_name(find_device(args.device)), "commit": args.commit or _commit()}
    if args.through == "lab":
        for job in jobs:
            for found in _lab(job, args):
                write(args.out, [setting | record for record in found])
        return
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool, contextlib.ExitStack() as stack:
        # Predictions are compared with those of 16 bits, which must be there first; recall is not.
        first = [WIDE] if args.tokens else [WIDE, *args.methods]
        running = {pool.submit(_serve, job, method, args): (job, method) for job in jobs for method in first}
        stack.callback(_end, pool, running)
        while running:
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                job, method = running.pop(task)
                try:
                    predictions, recall = task.result()
                except Exception as error:
                    failed += 1
                    print(f"FAILED  {job.name} {method}: {error}", flush=True)
                    continue
                write(args.out, [setting | record for record in predictions])
                write(args.out.with_name("real_recall.jsonl"), [setting | record for record in recall])
                if method == WIDE and args.tokens:
                    running |= {pool.submit(_serve, job, name, args): (job, name) for name in args.methods}
    print(f"{time.monotonic() - started:.0f} s in all, {failed} failed")
    raise SystemExit(failed)


def _end(pool: ThreadPoolExecutor, tasks: Iterable[Future[Any]]) -> None:
    """End servers that threads wait for, and so the threads."""
    pool.shutdown(wait=False, cancel_futures=True)
    while not all(task.done() for task in tasks):
        for server in psutil.Process().children():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
        time.sleep(POLL)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=f"default: {' '.join(METHODS)}"
    )
    parser.add_argument("--through", choices=("server", "lab"), default="server", help="default: %(default)s")
    parser.add_argument(
        "--texts",
        nargs="+",
        default=["prose", "python"],
        metavar="TEXT",
        help="prose, python or a file (default: both)",
    )
    parser.add_argument(
        "--tokens", type=int, default=16384, help="predictions for each text, at least; 0: none (default: %(default)s)"
    )
    parser.add_argument("--window", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument(
        "--recall-lengths", nargs="+", type=int, default=[4096, 8192, 16384, 32768], help="those that the model holds"
    )
    parser.add_argument(
        "--recall-count", type=int, default=0, help="prompts of each task, length and depth (default: none)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="servers at once (default: %(default)s)")
    parser.add_argument(
        "--kv-cache-memory", type=int, default=2048, metavar="MIB", help="of each (default: %(default)s)"
    )
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the rest of the line goes to vLLM")
    parser.add_argument("--device", help="of the lab (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the lab (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    parser.add_argument("--commit", help="what is measured (default: git's HEAD)")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir(), "sawkv-fidelity"), help="logs (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "real_models.jsonl", help="lines to add to (default: %(default)s)"
    )
    return parser.parse_args()


def _named(model: str) -> tuple[str, Path]:
    name, mark, path = model.partition("=")
    return (name, Path(path)) if mark else (Path(model).resolve().name, Path(model))


def _job(name: str, folder: Path, args: argparse.Namespace) -> Job:
    texts = {text: load_text(folder, text_file(text, args.work)) for text in args.texts}
    count = -(-args.tokens // (args.window - 1))
    windows = {text: loaded.windows(args.window, count) for text, loaded in texts.items()} if count else {}
    config = json.loads((folder / "config.json").read_text())
    longest = int((config.get("text_config") or config)["max_position_embeddings"])
    if args.through == "server" and args.tokens and args.window >= longest:
        raise SystemExit(f"--window: expected fewer tokens than the {longest} that {name} holds, got {args.window}")
    first = next(iter(texts.values()))
    prompts = _prompts(first, [length for length in args.recall_lengths if length <= longest], args.recall_count)
    # Not --max-model-len: the model is prepared for its whole context, as it is for users who do not limit it.
    options = ["--max-num-batched-tokens", str(CHUNK), "--enforce-eager"]
    options += ["--kv-cache-memory-bytes", str(args.kv_cache_memory << 20)]
    # vLLM asks for so much to be free.
    options += ["--gpu-memory-utilization", "0.05"] if torch.cuda.device_count() else []
    ids = torch.cat(list(windows.values())) if windows else None
    return Job(
        name,
        folder,
        ids,
        {text: len(rows) for text, rows in windows.items()},
        first,
        prompts,
        args.work,
        [*options, *args.options],
    )


def _prompts(text: Text, lengths: Sequence[int], count: int) -> list[Prompt]:
    return make_prompts(text.encode, text.ids, text.prefix, lengths=lengths, count=count) if count else []


def _serve(job: Job, method: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of one way of serving: of predictions, and of recall."""
    start = time.monotonic()
    env = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
    command = _command(job, method)
    recorder = "benchmarks.recorder_ours.OurRecorder"
    if command[2] != "sawkv.cli":
        recorder, env["VLLM_PLUGINS"] = "benchmarks.recorder.Recorder", ""
    with serving(
        [*command, "--worker-extension-cls", recorder], job.work / f"{job.name}-{method}.log", env=env
    ) as client:
        ready = time.monotonic() - start
        layers = client.kv_cache_dtypes()
        print(f"{job.name} {method}: layers {layers}", flush=True)
        if command[2] != "sawkv.cli":
            check_layers(layers, Options(command).get("--kv-cache-dtype") or "auto")
        if (command[2] == "sawkv.cli") != bool(client.notice()):
            raise RuntimeError(
                f"{job.name} {method}: expected a server {'with' if command[2] == 'sawkv.cli' else 'without'} sawkv"
            )
        common = {"model": job.name, "method": method, "through": "server", "bits": _bits(client, method, job.folder)}
        predictions = [] if job.ids is None else [common | record for record in _predictions(client, job, method)]
        recall = [common | record for record in _recall(client, job.prompts)]
    for record in predictions:
        print(line(record), flush=True)
    print(f"{job.name} {method}: {time.monotonic() - start:.0f} s, {ready:.0f} of them until it answered", flush=True)
    return predictions, recall


def _command(job: Job, method: str) -> list[str]:
    if method == WIDE:
        return server_command(str(job.folder), None, job.options)
    ours = {"served": [], "unprepared": ["--no-prepare"]}.get(method)
    if ours is None:
        try:
            ours = ["--format", str(CacheFormat.parse(method))]
        except FormatError:
            dtype = method.removeprefix("vllm_")
            return server_command(str(job.folder), None, [*job.options, "--kv-cache-dtype", dtype])
    return [sys.executable, "-m", "sawkv.cli", "serve", str(job.folder), *ours, *job.options]


def _bits(client: Client, method: str, folder: Path) -> float | None:
    """Bits of a value with all that is stored for its row; None where it is not known."""
    if sizes := re.search(r"(\d+) bytes per token, KV head and layer \(16 bits: (\d+)\)", client.notice()):
        return 16 * int(sizes[1]) / int(sizes[2])
    if method == "vllm_int4_per_token_head":
        config = json.loads((folder / "config.json").read_text())
        config = config.get("text_config") or config
        return 4 + 32 / int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    return BITS.get(method)


def _predictions(client: Client, job: Job, method: str) -> Iterator[dict[str, Any]]:
    """Send all windows; for 16 bits keep their states, else compare with them."""
    assert job.ids is not None
    window = str(job.ids.shape[1])
    _rpc(client, "record_states")
    answered = torch.tensor([client.prompt_logprobs(ids) for ids in job.ids.tolist()])
    if method == WIDE:
        _rpc(client, "save_states", str(job.states), window)
        return
    ids, out = (job.work / f"{job.name}-{method}.{kind}" for kind in ("ids", "scores"))
    save_file({"ids": job.ids.contiguous()}, ids)
    _rpc(client, "compare_states", str(job.states), window, str(ids), str(out))
    found = load_file(out)
    apart = float((answered + found["loss"]).abs().mean())
    if not apart < AGREES:
        raise RuntimeError(
            f"{job.name} {method}: the server's log-probabilities are {apart:.3f} nats from those computed of its"
            " states"
        )
    scores = TokenScores(found["kl"], found["loss"], found["same_top1"])
    yield from _records(scores, found["loss_16bit"], job)


def _rpc(client: Client, method: str, *arguments: str) -> None:
    client.post("/collective_rpc", {"method": method, "args": arguments})


def _records(scores: TokenScores, wide_loss: torch.Tensor, job: Job) -> Iterator[dict[str, Any]]:
    """One for each text."""
    first = 0
    for text, count in job.texts.items():
        rows = slice(first, first + count)
        first += count
        part = TokenScores(scores.kl[rows], scores.loss[rows], scores.same_top1[rows])
        yield {"text": text, "window": part.kl.shape[1] + 1} | summary(part, wide_loss[rows])


def summary(scores: TokenScores, wide_loss: torch.Tensor) -> dict[str, Any]:
    """Of predictions [num_windows, window - 1], and the losses of 16 bits on them."""
    found = scores.divergence()
    by_window = scores.kl.double().mean(1)
    return {
        "tokens": found.tokens,
        "mean_kl": _digits(found.mean_kl, 5),
        "kl_se": _digits(found.kl_se, 3),
        "kl_ci95": [_digits(end, 4) for end in interval(by_window)],
        "kl_p999": _digits(found.kl_p999, 4),
        "kl_max": _digits(found.kl_max, 4),
        "same_top1": round(found.same_top1, 5),
        "ppl": round(found.ppl, 4),
        "ppl_16bit": round(float(wide_loss.double().mean().exp()), 4),
        "ppl_ratio_ci95": [
            _digits(end, 5) for end in interval((scores.loss - wide_loss).double().mean(1)).exp().tolist()
        ],
        "kl_by_window": [_digits(value, 4) for value in by_window.tolist()],
    } | ({"kl_by_position": by_position(scores.kl)} if scores.kl.shape[1] >= 2 * FIRST_POSITIONS else {})


def by_position(kl: torch.Tensor) -> list[dict[str, Any]]:
    """Mean KL of the first positions of a window, then octave by octave, the last one as far as the window goes.

    Args:
        kl: [num_windows, window - 1].
    """
    borders = [0, FIRST_POSITIONS]
    while 2 * borders[-1] < kl.shape[1]:
        borders.append(2 * borders[-1])
    borders.append(kl.shape[1] + 1)
    return [
        {"start": start, "end": end, "mean_kl": _digits(float(kl[:, start:end].double().mean()), 5)}
        for start, end in itertools.pairwise(borders)
    ]


def interval(
    window_means: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor] = lambda means: means
) -> torch.Tensor:
    """Both ends of a 95 % interval: windows are drawn again and again, the same draws for every method.

    Args:
        window_means: [..., num_windows].
        of: maps means [..., draws] to what the interval is of, [draws]; by default the mean itself.
    """
    count = window_means.shape[-1]
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    return torch.quantile(
        of(window_means.double()[..., draws].mean(-1)), torch.tensor([0.025, 0.975], dtype=torch.float64)
    )


def _recall(client: Client, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
    """Right answers of those asked, by task, length and depth. Greedy decoding must write every token of one."""

    def ask(prompt: Prompt) -> bool:
        ids, answer = prompt.ids[: -prompt.answer_length], list(prompt.ids[-prompt.answer_length :])
        choice = client.complete(ids, max_tokens=len(answer), ignore_eos=True, return_token_ids=True)
        return bool(choice["token_ids"] == answer)

    with ThreadPoolExecutor(CLIENTS) as pool:
        right = list(pool.map(ask, prompts))
    cells: dict[tuple[str, int], dict[str, list[bool]]] = {}
    for prompt, is_right in zip(prompts, right, strict=True):
        by_depth = cells.setdefault((prompt.task, prompt.length), {})
        by_depth.setdefault(str(prompt.depth), []).append(is_right)
    for (task, length), answers in cells.items():
        correct = {depth: sum(of_depth) for depth, of_depth in answers.items()}
        yield {"task": task, "length": length, "asked": len(right) // len(cells) // len(correct), "correct": correct}


def _lab(job: Job, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The same windows, in one teacher-forced pass of a Transformers model per method: the records of each method as it
    comes.
    """
    assert job.ids is not None
    device = find_device(args.device)
    model = EvalModel.load(job.folder, device, getattr(torch, args.dtype) if args.dtype else default_dtype(device))
    methods = [find_method(name) for name in args.methods]
    samples = shipped_samples(model, job.text)
    reference = Reference(model, job.ids, 1, STATES_KEPT)
    loss = reference.scores().loss
    for method in methods:
        scores = reference.compare(fit(method, samples))
        bits = method.bits(model.shape.head_dim, job.ids.shape[1])
        common = {"model": job.name, "method": method.name, "through": "lab", "bits": round(bits, 4)}
        if method.kept:
            common["bits_of_codes"] = round(replace(method, kept=None).bits(model.shape.head_dim), 4)
        records = [common | record for record in _records(scores, loss, job)]
        for record in records:
            print(line(record), flush=True)
        yield records


def line(record: dict[str, Any]) -> str:
    low, high = record["kl_ci95"]
    return (
        f"{record['model']:<22} {record['text']:<7} {record['method']:<26} {record['bits'] or 0:>6.3f} bits  KL"
        f" {record['mean_kl']:.5f} ({low:.5f} to {high:.5f})  p99.9 {record['kl_p999']:.3f}  top-1"
        f" {record['same_top1']:.2%}  ppl {record['ppl']:.3f} ({record['ppl_16bit']:.3f})"
    )


def write(file: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add lines; they replace those of the file for the same thing measured in the same place."""
    if not records:
        return
    kept = [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []
    new = {_cell(record) for record in records}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    whole = [*(r for r in kept if _cell(r) not in new), *records]
    part.write_text("".join(map(record_line, whole)))
    part.replace(file)


def _cell(record: dict[str, Any]) -> tuple[Any, ...]:
    keys = ("device", "model", "text", "method", "through", "window", "task", "length")
    return tuple(record.get(key) for key in keys)


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def _digits(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


if __name__ == "__main__":
    main()
