"""Run one vLLM engine in a process of its own.

In-process scheduling (no engine-core process) makes a run deterministic, so two formats can be compared bit for bit.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sawkv.errors import SawkvError
from tests.conftest import MODEL

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # models this small run several times as fast without threads that wait for each other
    "PYTHONHASHSEED": "0",
}


def vllms_parser(parser: Any) -> Any:
    """`parser`, which is vLLM's, with the options of vLLM's server, wherever this version has them."""
    places = [f"vllm.entrypoints.{package}.cli_args" for package in ("common", "launchers", "openai")]
    place = next(place for place in places if find_spec(place.rpartition(".")[0]) and find_spec(place))
    return import_module(place).make_arg_parser(parser)


def run_engine(
    mutate: str | None = None,
    waves: list[list[list[int]]] | None = None,
    max_tokens: int = 32,
    scores: bool = False,
    refused: dict[str, Any] | None = None,
    **engine_options: Any,
) -> dict[str, Any]:
    """Generate greedily for waves of prompts (token ids) in a fresh process.

    Args:
        mutate: `simulate_int4`: fp32 pages hold quantize-dequantized rows; `swap_nibbles`: int4 pages have each byte's
            nibbles swapped;
            `lose_v_center`: values are written without their center, which is added all the same when they are read;
            `by_reference`: the reference writes the pages; `lose_feedback`: it does, without feedback;
            `overlap_recent`: the youngest of the tokens behind the newest ones is read twice;
            `leave_windows`: vLLM before 0.28 sizes the pages of windows as it does alone;
            `keep_out`: vLLM loads another plugin alone, which takes the names of backends for itself.
        waves: batches of prompts; a wave starts when the one before has ended.
        max_tokens: tokens to generate for each prompt.
        scores: whether to return the log-probabilities of the prompts' own tokens too.
        refused: options of an engine that is to be refused before, in the same process.
        engine_options: passed to `vllm.LLM`. The model is not prepared unless `additional_config` says so: most tests
            are of the pages.

    Returns:
        `tokens` and `logprobs` for each wave and prompt, `scores` if asked for, `metrics` (counters by name),
        `kv_tokens`,
        `implementation` (classes of the attention layers), or `error`, the text of what refused the start; `log`, lines
        of the log that begin with `sawkv: `.
    """
    job = {
        "mutate": mutate,
        "waves": waves or [],
        "max_tokens": max_tokens,
        "scores": scores,
        "refused": refused,
        "options": engine_options,
    }
    return _run(json.dumps(job, sort_keys=True))


@functools.cache  # runs are deterministic, and a start takes many seconds
def _run(job: str) -> dict[str, Any]:
    return run_process(_generate, job)


def run_process(function: Callable[..., dict[str, Any]], job: str) -> dict[str, Any]:
    """Call a function of a module in a fresh process that has imported vLLM.

    Args:
        function: returns what JSON can hold.
        job: its arguments by name, as JSON.

    Returns:
        its result, and in `log` the lines of the log that begin with `sawkv: `.
    """
    context = multiprocessing.get_context("forkserver")
    # Processes are forked from one that has imported vLLM, and nothing of sawkv: the import takes most of a start. It
    # may also start CUDA, which does not survive a fork.
    context.set_forkserver_preload([] if torch.cuda.device_count() else ["vllm.entrypoints.llm"])
    with tempfile.TemporaryDirectory() as folder:
        with pytest.MonkeyPatch.context() as patch:  # the first start makes that process, with this environment
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            process = context.Process(target=_main, args=(function, job, folder))
            process.start()
        process.join(600)
        if process.exitcode != 0:
            process.kill()
            raise AssertionError(
                f"engine process ended with {process.exitcode}:\n{Path(folder, 'printed').read_text()[-10000:]}"
            )
        result: dict[str, Any] = json.loads(Path(folder, "result").read_text())
        printed = Path(folder, "printed").read_text()
    return result | {"log": [line.partition("] ")[2] for line in printed.splitlines() if "] sawkv: " in line]}


def _main(function: Callable[..., dict[str, Any]], job: str, folder: str) -> None:
    with open(Path(folder, "printed"), "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    Path(folder, "result").write_text(json.dumps(function(**json.loads(job))))


def _generate(
    mutate: str | None,
    waves: list[list[list[int]]],
    max_tokens: int,
    scores: bool,
    refused: dict[str, Any] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    _mutate(mutate)
    common: dict[str, Any] = {
        "model": str(MODEL),
        "enforce_eager": True,
        "max_model_len": 2048,
        "disable_log_stats": False,
        "kv_cache_memory_bytes": 64 << 20,
    }
    options = common | options
    if refused is not None:
        with pytest.raises(SawkvError):
            LLM(**(common | refused))
    if "kv_cache_dtype" in options:
        additional = options.get("additional_config", {})
        options["additional_config"] = additional | {"sawkv": {"prepare": False} | additional.get("sawkv", {})}
    try:
        llm = LLM(**options)
    except Exception as error:
        return {"error": str(error)}
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, prompt_logprobs=0 if scores else None
    )
    tokens, logprobs, scored = [], [], []
    for wave in waves:
        requests = llm.generate([{"prompt_token_ids": p} for p in wave], sampling, use_tqdm=False)
        outputs = [o.outputs[0] for o in requests]
        for prompt, request in zip(wave, requests, strict=True) if scores else ():
            scored.append(
                [step[token].logprob for step, token in zip(request.prompt_logprobs[1:], prompt[1:], strict=True)]
            )
        tokens.append([list(o.token_ids) for o in outputs])
        logprobs.append(
            [[step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
        )
    metrics = {m.name.removeprefix("vllm:"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
    config = llm.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    return {
        "tokens": tokens,
        "logprobs": logprobs,
        "scores": scored,
        "metrics": metrics,
        "kv_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        "implementation": sorted({type(layer.impl).__name__ for layer in layers if hasattr(layer, "impl")}),
    }


def _mutate(kind: str | None) -> None:
    """Change what `append` writes, in this process."""
    if kind is None:
        return
    from benchmarks.simulated import append_by_reference, simulate_int4
    from sawkv.format.codecs import CODECS, IntegerCodec
    from sawkv.format.feedback import Feedback

    int4 = IntegerCodec(4)

    class Swapped(IntegerCodec):
        def encode(self, y: torch.Tensor, feedback: Feedback | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            codes, meta = int4.encode(y, feedback)
            return codes << 4 | codes >> 4, meta

    if kind == "keep_out":
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        os.environ["VLLM_PLUGINS"] = "lora_filesystem_resolver"
        load_general_plugins()
        register_backend(AttentionBackendEnum.CPU_ATTN, "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend")
        return
    if kind == "lose_v_center":
        append_by_reference(v_center=None)
        return
    if kind == "lose_feedback":
        append_by_reference(k_feedback=None, v_feedback=None)
        return
    if kind == "by_reference":
        append_by_reference()
        return
    if kind == "overlap_recent":
        from sawkv.integrations.vllm.recent import RecentTokens

        made = RecentTokens.__init__

        def make(self: RecentTokens, *arguments: Any) -> None:
            made(self, *arguments)
            self.window += 1

        RecentTokens.__init__ = make  # type: ignore[method-assign]
        return
    if kind == "leave_windows":
        from sawkv.integrations.vllm import backend

        backend.VLLM_SIZES_WINDOWS = True  # type: ignore[misc]
        return
    if kind == "simulate_int4":
        simulate_int4()
        return
    CODECS["int4"] = Swapped(4)
    # The mutated codec is Python's, so the reference writes; the backend under test still reads.
    append_by_reference()
