# Over 400 lines: eight engines and their checks, one after the other.
"""vLLM on a GPU, end to end: options that users switch on must not change outputs.

    python -m benchmarks.gpu_correctness models/sawkv-6m                       # all engines, one after the other
    python -m benchmarks.gpu_correctness models/sawkv-6m --engines serving --minutes 10
    python -m benchmarks.gpu_correctness models/sawkv-6m --format fp16-k128-v128 --engines reference cache ngram draft

Each engine runs in a process of its own, and its results are kept in `--work`, so a later command may run the rest.
Engines:

    reference    the reference kernels, eager, in one process: all other engines follow its greedy texts
    wide         vLLM's own 16-bit cache: the distance of the format itself
    serving      the kernels under test: CUDA graphs, torch.compile, asynchronous scheduling, prefix caching, LoRA; then
                 a soak of --minutes
    cache        a cache too small for its requests (preemption); sleep levels 1 and 2, and the same again after waking
    ngram, draft speculative decoding by n-grams, and by a draft model: the model itself, whose drafts are accepted
    control      unrotated pages: must be found different, or the checks are blind

Rounding of 16-bit models moves some codes to their neighbours. A code that moves was about as near to either, so
nothing is lost, but every log-probability changes a little, and greedy texts part where two tokens are close. So
engines follow the reference's text: each token's log-probability, in that text's own context, is compared. A quantized
format may be as far from 16 bits as the reference is (`QUALITY`), no farther from the reference than from 16 bits
(`APART`), and no single request much farther (`WORST`). Unquantized pages may differ by rounding alone (`ROUNDING`).
Each check prints one line; the exit status is the number of failures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.agreement import Follower, Nearness, Output, as_output, follow, generate, logprobs_of, sampling
from sawkv.cli import end_as_by_ctrl_c
from sawkv.format.layout import ENGINE_PAGE_SIZE
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.config import engine_options
from sawkv.integrations.vllm.server import STOP_TIMEOUT, running
from sawkv.prepare.text import load_text

if TYPE_CHECKING:
    from vllm import LLM

QUALITY: Final = 1.15
"""Of mean distances from 16 bits: an engine's over the reference's. Some 4,000 tokens know it to 4 % or so."""
APART: Final = 1.3
"""Mean distance from the reference, over that of the reference from 16 bits. Independent errors of the same size would
give 1.4.
"""
WORST: Final = 6.0
"""Likewise, of the worst request."""
ROUNDING: Final = (0.02, 0.1)
"""Nats, mean and worst request, of unquantized pages."""
ENGINES: Final = ("reference", "wide", "serving", "cache", "ngram", "draft", "control")
LORA_RANK: Final = 8


def main() -> int:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.engine:
        Engine(args).run()
        return 0
    end_as_by_ctrl_c()
    failures = 0
    for name in args.engines:
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu_correctness",
            *sys.argv[1:],
            "--work",
            str(args.work),
            "--engine",
            name,
        ]
        alone = name in ("reference", "control")
        env = (
            os.environ
            | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
            | ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if alone else {})
        )
        start, log = time.monotonic(), args.work / f"{name}.log"
        (args.work / f"{name}.json").unlink(missing_ok=True)
        with (
            log.open("w") as sink,
            running(command, STOP_TIMEOUT, stdout=sink, stderr=subprocess.STDOUT, env=env) as engine,
        ):
            status = engine.wait()
        print(f"--- {name}: {time.monotonic() - start:.0f} s, log in {log}", flush=True)
        if status:
            failures += _line(False, f"{name}: ended with {status}", log.read_text()[-1500:])
            continue
        failures += _judge(name, args)
    return failures


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--format", default="int4", help="cache format; each its own --work (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="float16", help="of the model; less rounding than bfloat16 (default: %(default)s)"
    )
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="to generate for each request (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=1, help="of the soak, with random aborts (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir(), "sawkv-gpu-correctness"), help="default: %(default)s"
    )
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="more arguments of vllm.LLM")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    return parser.parse_args()


class Engine:
    """One vLLM engine, in this process, and what is asked of it. Results go to `<work>/<name>.json`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.name = args, args.engine
        self.on_cpu = not _has_gpu()
        self.results: dict[str, Any] = {}
        options: dict[str, Any] = {
            "model": str(args.model),
            "dtype": args.dtype,
            "max_model_len": 2304,
            "max_num_batched_tokens": 1024,  # the longest prompts take several chunks
            "max_num_seqs": args.requests,
            "kv_cache_memory_bytes": 256 << 20,
            "gpu_memory_utilization": 0.3,  # must be free, though the cache takes what the line above says
            "disable_log_stats": False,
            "kernel_config": {"enable_flashinfer_autotune": False},
        }
        if self.name != "wide":
            options |= engine_options(CacheFormat.parse("int4-k0-v0" if self.name == "control" else args.format))
        if self.name in ("reference", "serving"):
            options |= {"enable_lora": True, "max_lora_rank": LORA_RANK}
        if self.name in ("reference", "control"):
            _use_reference_kernels()
            options["enforce_eager"] = True
        if self.name == "cache":
            block_size = 128 if self.on_cpu else ENGINE_PAGE_SIZE
            options |= {"num_gpu_blocks_override": 8192 // block_size, "enable_sleep_mode": not self.on_cpu}
        if self.name == "ngram":
            options["speculative_config"] = {
                "method": "ngram",
                "num_speculative_tokens": 4,
                "prompt_lookup_max": 4,
                "prompt_lookup_min": 2,
            }
        if self.name == "draft":
            options["speculative_config"] = {
                "method": "draft_model",
                "model": str(args.model),
                "num_speculative_tokens": 3,
            }
        from vllm import LLM

        self.llm: LLM = LLM(**(options | args.options))

    def run(self) -> None:
        if self.name == "reference":
            main, again = _prompts(self.args.model, self.args.requests, self.args.longest)
            self.results |= {
                "main": self.generate(main),
                "hits": self.generate(again),
                "lora": self.generate(main[:8], self._adapter()),
            }
        else:
            texts = json.loads((self.args.work / "reference.json").read_text())
            self.results["main"] = self.follow(texts["main"])
            if self.name == "serving":
                self.results |= {
                    "hits": self.follow(texts["hits"]),
                    "lora": self.follow(texts["lora"], self._adapter()),
                }
                main = texts["main"]  # four further on, prompts share no prefix
                mixed_up = [{**text, "prompt": main[(i + 4) % len(main)]["prompt"]} for i, text in enumerate(main[:16])]
                self.results |= {"soak": self._soak(texts["main"]), "mixed up": self.follow(mixed_up)}
            if self.name == "cache" and not self.on_cpu:
                self._sleep_and_wake(texts["main"][:16])
        counters = {
            metric.name.removeprefix("vllm:"): getattr(metric, "value", None) for metric in self.llm.get_metrics()
        }
        self.results["metrics"] = {name: value for name, value in counters.items() if value is not None}
        (self.args.work / f"{self.name}.json").write_text(json.dumps(self.results))

    def _adapter(self) -> Path:
        return _adapter(self.args.model, self.args.work / "adapter")

    def generate(self, prompts: Sequence[list[int]], adapter: Path | None = None) -> list[Output]:
        return self._generate(prompts, [self.args.tokens] * len(prompts), adapter)

    def follow(self, texts: Sequence[Output], adapter: Path | None = None) -> list[list[float]]:
        """Log-probabilities of the tokens of each text."""
        followers = follow(texts, lambda prompts, lengths: self._generate(prompts, lengths, adapter))
        # Of the main texts, which are first.
        self.results.setdefault("departures", sum(follower.departures for follower in followers))
        return [follower.logprobs for follower in followers]

    def _generate(self, prompts: Sequence[list[int]], lengths: Sequence[int], adapter: Path | None) -> list[Output]:
        from vllm.lora.request import LoRARequest

        lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
        return generate(self.llm, prompts, lengths, lora)

    def _sleep_and_wake(self, texts: Sequence[Output]) -> None:
        for level in (1, 2):
            self.llm.sleep(level)
            self.llm.wake_up()
            if level == 2:  # it gave the weights away
                self.llm.collective_rpc("reload_weights")
            self.llm.reset_prefix_cache()
            self.results[f"sleep {level}"] = self.follow(texts)

    def _soak(self, texts: Sequence[Output]) -> dict[str, Any]:
        """Random requests that come, end and are dropped, for `--minutes`, each following a text; what they found."""
        engine, draw = self.llm.llm_engine, random.Random(0)
        running: dict[str, tuple[int, Follower]] = {}
        found: dict[str, Any] = {"finished": [], "dropped": 0, "lost": 0}
        deadline, sent = time.monotonic() + 60 * self.args.minutes, 0

        def send(index: int, follower: Follower) -> None:
            nonlocal sent
            engine.add_request(f"soak-{sent}", {"prompt_token_ids": follower.prompt}, sampling(follower.left))
            running[f"soak-{sent}"] = index, follower
            sent += 1

        while running or time.monotonic() < deadline:
            while len(running) < self.args.requests and time.monotonic() < deadline and draw.random() < 0.7:
                index, length = draw.randrange(len(texts)), draw.randint(1, self.args.tokens)
                send(index, Follower(texts[index]["prompt"], texts[index]["tokens"][:length]))
            if running and draw.random() < 0.05:
                dropped = draw.choice(list(running))
                engine.abort_request([dropped])
                found["dropped"] += running.pop(dropped) is not None
            for output in engine.step() if engine.has_unfinished_requests() else ():
                if not output.finished or output.request_id not in running:
                    continue
                index, follower = running.pop(output.request_id)
                answer = as_output(output)
                found["lost"] += len(answer["tokens"]) != follower.left
                follower.take(answer)
                if follower.left:
                    send(index, follower)
                else:
                    found["finished"].append((index, follower.logprobs))
            if time.monotonic() > deadline + 120:
                found["lost"] += len(running)
                break
        return found


def _has_gpu() -> bool:
    import torch

    return torch.cuda.device_count() > 0  # is_available() would start CUDA here, and vLLM could not fork


def _use_reference_kernels() -> None:
    """In this process, where the engine runs too: no backend but the reference is looked for."""
    from sawkv import kernels

    kernels.PREFERENCE = ("reference",)  # type: ignore[misc, assignment]


def _prompts(model: Path, count: int, longest: int) -> tuple[list[list[int]], list[list[int]]]:
    """Real text of mixed lengths, some sharing prefixes; and a second turn of some, which hits the prefix cache."""
    text, draw = load_text(model, None).ids.tolist(), random.Random(0)
    main = []
    for i in range(count):
        start, length = draw.randrange(len(text) - 4096), int(2 ** draw.uniform(0, 11))
        if i % 4 == 0:
            shared = text[start : start + 600]
        prefix = shared[: draw.randint(100, 600)] if i % 4 else []
        main.append((prefix + text[start + 600 : start + 600 + length])[:longest])
    return main, [prompt + text[7 * i : 7 * i + 20] for i, prompt in enumerate(main[:16])]


def _adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter with random weights, large enough to change the text."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    sizes = {"q_proj": config["num_attention_heads"] * head_dim, "v_proj": config["num_key_value_heads"] * head_dim}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(LORA_RANK, hidden, generator=generator) * 0.1
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(size, LORA_RANK, generator=generator) * 0.1
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": LORA_RANK, "lora_alpha": LORA_RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": list(sizes)}))
    return folder


def _judge(name: str, args: argparse.Namespace) -> int:
    """Print the checks of one engine; the number that failed."""
    found = {
        n: json.loads(path.read_text())
        for n in {name, "reference", "wide"}
        if (path := args.work / f"{n}.json").is_file()
    }
    got, metrics = found[name], found[name]["metrics"]
    if "reference" not in found:
        return _line(False, f"{name}: nothing to compare with", "run the engine `reference` first")
    texts = found["reference"]
    if name == "reference":
        failed = _line(
            texts["lora"][0]["tokens"] != texts["main"][0]["tokens"], "reference: the adapter changes the text"
        )
        hits = sum(output["cached"] for output in texts["hits"])
        return failed + _line(hits > 0, "reference: prefix hits", f"{hits} tokens")
    is_quantized = CacheFormat.parse(args.format).quantized
    if is_quantized and "wide" not in found:
        return _line(False, f"{name}: no scale to compare by", "run the engine `wide` first")
    judge = Judge(texts, found["wide"]["main"] if is_quantized else None)
    if name == "wide":
        return _line(True, "wide: how far the format moves log-probabilities", f"{judge.scale:.4f} nats a token")
    if name == "control":
        return judge.main("control: unrotated pages are noticed", got["main"], wanted=False)
    failed = judge.main(
        f"{name}: {len(got['main'])} mixed requests, {got['departures']} restarts of their text", got["main"]
    )
    if name == "serving":
        failed += judge.near("serving: second turns, prefix hits", got["hits"], texts["hits"])
        failed += _line(
            metrics["prefix_cache_hits"] > 0, "serving: prefix hits", f"{metrics['prefix_cache_hits']} tokens"
        )
        failed += judge.near("serving: LoRA", got["lora"], texts["lora"])
        soak = got["soak"]
        wrong = sum(not judge.is_near([logprobs], [texts["main"][i]]) for i, logprobs in soak["finished"])
        tokens = sum(len(logprobs) for _, logprobs in soak["finished"])
        counts = (
            f"{len(soak['finished'])} responses, {tokens} tokens, {soak['dropped']} dropped, {wrong} wrong,"
            f" {soak['lost']} lost"
        )
        failed += _line(bool(soak["finished"]) and not wrong and not soak["lost"], "serving: soak", counts)
        noticed = sum(
            not judge.is_near([logprobs], [text])
            for logprobs, text in zip(got["mixed up"], texts["main"], strict=False)
        )
        mixed_up = f"{noticed} of {len(got['mixed up'])} texts after another's prompt are found wrong"
        failed += _line(
            noticed >= 0.9 * len(got["mixed up"]), "serving: the soak would notice another request's pages", mixed_up
        )
    if name == "cache":
        failed += _line(
            metrics["num_preemptions"] > 0, "cache: preemption happened", f"{metrics['num_preemptions']} times"
        )
        for level in (1, 2):
            if (after := got.get(f"sleep {level}")) is not None:
                failed += judge.near(f"cache: after sleep level {level}", after, texts["main"][: len(after)])
    if name in ("ngram", "draft"):
        accepted, drafted = (metrics.get(f"spec_decode_num_{kind}_tokens", 0) for kind in ("accepted", "draft"))
        failed += _line(accepted > 0, f"{name}: drafts were accepted", f"{accepted} of {drafted} tokens")
    return failed


class Judge:
    """Distances of log-probabilities from those of the reference, and of 16 bits."""

    def __init__(self, texts: dict[str, Any], wide: list[list[float]] | None) -> None:
        """`wide` None is for formats that do not quantize."""
        self.texts, self.wide = texts, wide
        self.scale = 0.0 if wide is None else Nearness.of([logprobs_of(text) for text in texts["main"]], wide).mean

    def main(self, what: str, got: list[list[float]], wanted: bool = True) -> int:
        """A line about the main texts, which 16 bits followed too."""
        if self.wide is None:
            return self.near(what, got, self.texts["main"], wanted)
        quality = Nearness.of(got, self.wide).mean / self.scale
        near = self._near(got, self.texts["main"])
        passed = quality <= QUALITY and self.is_near(got, self.texts["main"])
        return _line(
            passed == wanted, what, f"{quality:.2f} of the reference's distance from 16 bits; {self._said(near)}"
        )

    def near(self, what: str, got: list[list[float]], texts: Sequence[Output], wanted: bool = True) -> int:
        return _line(self.is_near(got, texts) == wanted, what, self._said(self._near(got, texts)))

    def is_near(self, got: list[list[float]], texts: Sequence[Output]) -> bool:
        near = self._near(got, texts)
        mean, worst = ROUNDING if self.wide is None else (APART * self.scale, WORST * self.scale)
        return near.worst <= worst and (near.mean <= mean or len(got) == 1)

    def _near(self, got: list[list[float]], texts: Sequence[Output]) -> Nearness:
        return Nearness.of(got, [logprobs_of(text)[: len(logprobs)] for logprobs, text in zip(got, texts, strict=True)])

    def _said(self, near: Nearness) -> str:
        unit = f" ({near.mean / self.scale:.2f} and {near.worst / self.scale:.1f} of it)" if self.scale else ""
        return f"{near.mean:.4f} nats a token from the reference, {near.worst:.3f} at worst{unit}"


def _line(passed: bool, what: str, detail: str = "") -> int:
    print(f"{'PASS' if passed else 'FAIL'}  {what}{': ' if detail else ''}{detail}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
