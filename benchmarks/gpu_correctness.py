"""vLLM on a GPU, end to end: what users switch on must not change greedy outputs.

    python -m benchmarks.gpu_correctness models/sawkv-6m                       # all engines, one after the other
    python -m benchmarks.gpu_correctness models/sawkv-6m --engines reference serving --minutes 10

Each engine runs in a process of its own, and its outputs are kept in `--work`, so a later command may run the rest. Engines:

    reference    the reference kernels, eager, in one process: what all others are compared with
    serving      the kernels under test: CUDA graphs, torch.compile, asynchronous scheduling, prefix caching, LoRA; then a soak of --minutes
    cache        a cache too small for its requests (preemption); sleep levels 1 and 2, and the same again after waking
    ngram, draft speculative decoding by n-grams, and by a draft model (the model itself, so that most drafts are accepted)
    control      unrotated pages: must be found different, or the checks are blind

Greedy text follows the best token, and where two are almost equally likely rounding decides. So outputs are compared up to the first token
that differs; there the reference's log-probabilities of both must be within `TIE`, and before it those of the same tokens within `DRIFT`
on average. Anything else is a failure. Each check prints one line; the exit status is the number of failures.
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

import numpy as np

from benchmarks.agreement import Agreement, Output, as_output, first_difference, is_tie
from sawkv.integrations.vllm.server import engine_options
from sawkv.spec import CacheFormat

if TYPE_CHECKING:
    from vllm import LLM

TIE: Final = 0.15
"""Nats between log-probabilities of tokens that rounding may swap: two steps of 16-bit logits, and 4-bit codes that flip at near-ties."""
DRIFT: Final = 0.02
"""Nats, mean over tokens of |difference| of log-probabilities."""
ENGINES: Final = ("reference", "serving", "cache", "ngram", "draft", "control")
LORA_RANK: Final = 8


def main() -> int:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.engine:
        Engine(args).run()
        return 0
    failures = 0
    for name in args.engines:
        command = [sys.executable, "-m", "benchmarks.gpu_correctness", *sys.argv[1:], "--work", str(args.work), "--engine", name]
        alone = name in ("reference", "control")
        env = os.environ | {"VLLM_USE_FLASHINFER_SAMPLER": "0"} | ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if alone else {})
        start, log = time.monotonic(), args.work / f"{name}.log"
        (args.work / f"{name}.json").unlink(missing_ok=True)
        with log.open("w") as sink:
            status = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, env=env, check=False).returncode
        print(f"--- {name}: {time.monotonic() - start:.0f} s, log in {log}", flush=True)
        if status:
            failures += _line(False, f"{name}: ended with {status}", log.read_text()[-1500:])
            continue
        failures += _judge(name, args.work)
    return failures


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--format", default="int4", help="cache format (default: %(default)s)")
    parser.add_argument("--dtype", default="float16", help="of the model; less rounding than bfloat16 (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="to generate for each request (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1, help="of the soak, with random aborts (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "sawkv-gpu-correctness"), help="default: %(default)s")
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
            **engine_options(CacheFormat.parse("int4-k0-v0" if self.name == "control" else args.format)),
        }
        if self.name in ("reference", "serving"):
            options |= {"enable_lora": True, "max_lora_rank": LORA_RANK}
        if self.name in ("reference", "control"):
            _use_reference_kernels()
            options["enforce_eager"] = True
        if self.name == "cache":
            block_size = 128 if self.on_cpu else 16
            options |= {"num_gpu_blocks_override": 8192 // block_size, "enable_sleep_mode": not self.on_cpu}
        if self.name == "ngram":
            options["speculative_config"] = {
                "method": "ngram",
                "num_speculative_tokens": 4,
                "prompt_lookup_max": 4,
                "prompt_lookup_min": 2,
            }
        if self.name == "draft":
            options["speculative_config"] = {"method": "draft_model", "model": str(args.model), "num_speculative_tokens": 3}
        from vllm import LLM

        self.llm: LLM = LLM(**(options | args.options))

    def run(self) -> None:
        main, again = _prompts(self.args.model, self.args.requests, self.args.longest)
        self.results["main"] = self.generate(main)
        if self.name in ("reference", "serving"):
            self.results["hits"] = self.generate(again)
            adapter = _adapter(self.args.model, self.args.work / "adapter")
            self.results["lora"] = self.generate(main[:8], adapter)
        if self.name == "cache" and not self.on_cpu:
            self._sleep_and_wake(main[:16])
        if self.name == "serving":
            self.results["soak"] = self._soak()
        counters = {metric.name.removeprefix("vllm:"): getattr(metric, "value", None) for metric in self.llm.get_metrics()}
        self.results["metrics"] = {name: value for name, value in counters.items() if value is not None}
        (self.args.work / f"{self.name}.json").write_text(json.dumps(self.results))

    def generate(self, prompts: Sequence[list[int]], adapter: Path | None = None) -> list[Output]:
        from vllm.lora.request import LoRARequest

        lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
        inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(inputs, _sampling(self.args.tokens), use_tqdm=False, lora_request=lora)
        return [as_output(output) for output in outputs]

    def _sleep_and_wake(self, prompts: Sequence[list[int]]) -> None:
        for level in (1, 2):
            self.llm.sleep(level)
            self.llm.wake_up()
            if level == 2:  # it gave the weights away
                self.llm.collective_rpc("reload_weights")
            self.llm.reset_prefix_cache()
            self.results[f"sleep {level}"] = self.generate(prompts)

    def _soak(self) -> dict[str, Any]:
        """Random requests that come, end and are dropped, for `--minutes`; finished ones are compared with the reference."""
        reference = json.loads((self.args.work / "reference.json").read_text())["main"]
        engine, draw = self.llm.llm_engine, random.Random(0)
        running: dict[str, tuple[Output, int]] = {}
        counts = {"finished": 0, "dropped": 0, "wrong": 0, "lost": 0, "ties": 0, "tokens": 0}
        deadline, sent = time.monotonic() + 60 * self.args.minutes, 0
        while running or time.monotonic() < deadline:
            while len(running) < self.args.requests and time.monotonic() < deadline and draw.random() < 0.7:
                want, length = draw.choice(reference), draw.randint(1, self.args.tokens)
                engine.add_request(f"soak-{sent}", {"prompt_token_ids": want["prompt"]}, _sampling(length))
                running[f"soak-{sent}"] = want, length
                sent += 1
            if running and draw.random() < 0.05:
                dropped = draw.choice(list(running))
                engine.abort_request([dropped])
                counts["dropped"] += running.pop(dropped) is not None
            for output in engine.step() if engine.has_unfinished_requests() else ():
                if not output.finished or output.request_id not in running:
                    continue
                want, length = running.pop(output.request_id)
                tokens = as_output(output)["tokens"]
                first = first_difference(tokens, want["tokens"][:length])
                counts["finished"] += 1
                counts["tokens"] += len(tokens)
                counts["lost"] += len(tokens) != length
                if first is not None and len(tokens) == length:
                    counts["ties" if is_tie(want, first, tokens[first], TIE) else "wrong"] += 1
            if time.monotonic() > deadline + 120:
                counts["lost"] += len(running)
                break
        return counts


def _has_gpu() -> bool:
    import torch

    return torch.cuda.device_count() > 0  # is_available() would start CUDA here, and vLLM could not fork


def _sampling(max_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=5, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def _use_reference_kernels() -> None:
    """In this process, where the engine runs too: no backend but the reference is looked for."""
    from sawkv import kernels

    kernels.PREFERENCE = ("reference",)  # type: ignore[misc, assignment]


def _prompts(model: Path, count: int, longest: int) -> tuple[list[list[int]], list[list[int]]]:
    """Real text of mixed lengths, some sharing prefixes; and a second turn of some, which hits the prefix cache."""
    text, draw = np.load(model / "held_out.npy").tolist(), random.Random(0)
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


def _judge(name: str, work: Path) -> int:
    """Print the checks of one engine against the reference; the number that failed."""
    got, reference = (json.loads((work / f"{n}.json").read_text()) if (work / f"{n}.json").is_file() else {} for n in (name, "reference"))
    metrics = got["metrics"]
    if not reference:
        return _line(False, f"{name}: nothing to compare with", "run the engine `reference` first")
    if name == "reference":
        failed = _line(got["lora"][0]["tokens"] != got["main"][0]["tokens"], "reference: the adapter changes the text")
        return failed + _line(_hits(got) > 0, "reference: prefix hits", f"{_hits(got)} tokens")
    if name == "control":
        return _compare("control: unrotated pages are noticed", got["main"], reference["main"], wanted=False)
    failed = _compare(f"{name}: {len(got['main'])} mixed requests", got["main"], reference["main"])
    if name == "serving":
        failed += _compare("serving: second turns, prefix hits", got["hits"], reference["hits"])
        failed += _line(_hits(got) > 0, "serving: prefix hits", f"{_hits(got)} tokens")
        failed += _compare("serving: LoRA", got["lora"], reference["lora"])
        soak = got["soak"]
        failed += _line(not soak["wrong"] and not soak["lost"] and soak["finished"] > 0, "serving: soak", json.dumps(soak))
    if name == "cache":
        failed += _line(metrics["num_preemptions"] > 0, "cache: preemption happened", f"{metrics['num_preemptions']} times")
        for level in (1, 2):
            if f"sleep {level}" in got:
                failed += _compare(f"cache: after sleep level {level}", got[f"sleep {level}"], reference["main"])
    if name in ("ngram", "draft"):
        accepted, drafted = (metrics.get(f"spec_decode_num_{kind}_tokens", 0) for kind in ("accepted", "draft"))
        failed += _line(accepted > 0, f"{name}: drafts were accepted", f"{accepted} of {drafted} tokens")
    return failed


def _hits(results: dict[str, Any]) -> int:
    return sum(output["cached"] for output in results["hits"])


def _compare(what: str, got: Sequence[Output], want: Sequence[Output], wanted: bool = True) -> int:
    agreement = Agreement.of(got, want, TIE)
    passed = not agreement.wrong and agreement.drift <= DRIFT
    return _line(passed == wanted, what, str(agreement))


def _line(passed: bool, what: str, detail: str = "") -> int:
    print(f"{'PASS' if passed else 'FAIL'}  {what}{': ' if detail else ''}{detail}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
