"""Architectures that vLLM serves, from their shapes with random weights, shrunk: sawkv's pages against vLLM's own
attention.

    python -m benchmarks.architectures  # all of them, one engine after the other in this process
    python -m benchmarks.architectures --only gemma-2-9b --formats int4
    python -m benchmarks.architectures --only qwen3-8b --weights fp8  # made by vLLM; int8: compressed-tensors

Heads, head_dim, soft-caps, sinks and rotary embeddings are the model's; depth, width, vocabulary and experts are cut
down, and windows to fewer tokens than the prompts have. Weights are large enough for softmax to be sharp. For each
architecture:

    16-bit   vLLM's own attention: what the others are compared with
    plain    sawkv's pages, rotated but not quantized: equal up to near-ties, or the plumbing is wrong
    int4     what users run: starts, answers, and its log-probabilities stay near (random weights make 4 bits look worse
             than they are)

or sawkv refuses the model at start-up, by name. One line each; the exit status is the number that failed.

With quantized weights rounding moves codes of activations, so that no two kernels write the same text: `plain` is
judged by its log-probabilities too, beside a control, vLLM's own Triton attention in 16 bits (on a GPU; its CPU build
has one attention).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from benchmarks.agreement import Agreement, Nearness, Output, follow, generate, logprobs_of
from benchmarks.shapes import SHAPES, write_config
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.config import engine_options

if TYPE_CHECKING:
    import torch
    from vllm import LLM

T = TypeVar("T")

WINDOW: Final = 64
PROMPT_LENGTHS: Final = (3, 40, 70, 200, 333)
OUT: Final = 24
LIMITS: Final = {"float32": (0.01, 2e-3), "float16": (0.05, 2e-2), "bfloat16": (0.2, 0.1)}
"""Of the model's dtype: nats of a near-tie, and mean difference of log-probabilities, that rounding may cause."""
NEEDS_BFLOAT16: Final = ("gemma-2-9b", "gemma-3-1b", "gpt-oss-20b")
"""vLLM does not serve these in float16 on a GPU."""
ROUNDED: Final = 0.15
"""Nats a token, of the 16-bit text, that other rounding may cause where activations are quantized. Seen: 0.02 to 0.07.
"""
QUANTIZED: Final = 0.5
"""Nats a token, of the 16-bit text, that the format may cause. Seen: 0.02 to 0.25. Logits deviate by some 1.6: others
differ by over 1.
"""
SHRUNK: Final[dict[str, Any]] = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,  # sharp softmax
}
# Without a norm of queries and keys their size is the weights': scores as large as the other models' take smaller ones.
SHRUNK_BY_NAME: Final[dict[str, dict[str, Any]]] = {
    "glm-4.7": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
    },
    "llama-3-8b": {"head_dim": 128, "initializer_range": 0.06},
    # head_dim is the ratio of these
    "qwen2.5-7b": {
        "hidden_size": 1792,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "initializer_range": 0.038,
    },
    "mistral-7b": {"sliding_window": WINDOW, "initializer_range": 0.06},
    "gemma-2-9b": {"sliding_window": WINDOW},
    "gemma-3-1b": {"sliding_window": WINDOW, "num_hidden_layers": 6},
    "gpt-oss-20b": {
        "sliding_window": WINDOW,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 256,
        "initializer_range": 0.06,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", choices=["plain", "int4", "int8"], default=["plain", "int4"])
    parser.add_argument(
        "--dtype", choices=list(LIMITS), help="of the model (default: float16 on a GPU, float32 on a CPU)"
    )
    parser.add_argument(
        "--weights",
        choices=["fp8", "int8"],
        help="quantized weights and activations, for all engines; dense models only",
    )
    parser.add_argument(
        "--graphs", action="store_true", help="compile and capture CUDA graphs, as vLLM does unless told otherwise"
    )
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine is in this process, so that it ends with its object
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch

    dtype = args.dtype or ("float16" if torch.cuda.is_available() else "float32")
    failures = 0
    with tempfile.TemporaryDirectory(prefix="sawkv-architectures-") as folder:
        for name in args.only:
            suits = "bfloat16" if dtype == "float16" and name in NEEDS_BFLOAT16 else dtype
            model = make_model(Path(folder, name), name)
            options = {"enforce_eager": not args.graphs} | ({"quantization": "fp8"} if args.weights == "fp8" else {})
            if args.weights == "int8":
                quantize_checkpoint(Path(model))
            control = ["control"] if args.weights and torch.cuda.is_available() else []
            failures += _check(name, [*control, *args.formats], suits, model, options, bool(args.weights))
    return failures


def make_model(folder: Path, name: str) -> str:
    """Write a shrunk model of the architecture with random weights; returns its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(write_config(folder, name, **{**SHRUNK, **SHRUNK_BY_NAME.get(name, {})}))
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("bias", "sinks")):  # they start as zeros, which would hide an error
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return str(folder)


def quantize_checkpoint(folder: Path, **scheme: Any) -> None:
    """Make it one of compressed-tensors: INT8 weights, a scale for each output; activations INT8 too, a scale for each
    token.

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


def _check(name: str, formats: Sequence[str], dtype: str, model: str, common: dict[str, Any], codes_move: bool) -> int:
    """`common`: what all engines get; `codes_move`: no two engines write the same text."""
    wide = _with_engine(model, dtype, common, _write)
    if isinstance(wide, str):
        return _line("memory" not in wide, name, f"vLLM itself cannot serve it here: {wide}")  # a full GPU is no answer
    failures = 0
    head_dim = json.loads(Path(model, "config.json").read_text()).get("head_dim", 128)
    order = min(head_dim & -head_dim, 128)
    for kind in formats:
        if kind == "control":
            options = common | {"attention_backend": "TRITON_ATTN"}
        else:
            codec = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype] if kind == "plain" else kind
            options = engine_options(CacheFormat(codec, order, order), prepare=False) | common
        if kind == "plain" and not codes_move:
            work = partial(_equality, wide, dtype)
        else:
            work = partial(_nearness, wide, ROUNDED if kind in ("control", "plain") else QUANTIZED)
        said = _with_engine(model, dtype, options, work)
        passed, detail = ("sawkv" in said, f"refused: {said}") if isinstance(said, str) else said
        failures += _line(passed, f"{name}, {kind}", detail)
    return failures


def _equality(wide: Sequence[Output], dtype: str, llm: LLM) -> tuple[bool, str]:
    tie, drift_limit = LIMITS[dtype]
    agreement = Agreement.of(_write(llm), wide, tie)
    return not agreement.wrong and agreement.drift <= drift_limit, str(agreement)


def _nearness(wide: Sequence[Output], limit: float, llm: LLM) -> tuple[bool, str]:
    followers = follow(wide, partial(generate, llm))
    near = Nearness.of([follower.logprobs for follower in followers], [logprobs_of(text) for text in wide])
    return near.mean <= limit, f"{near.mean:.3f} nats a token from 16 bits, over {near.tokens} tokens"


def _write(llm: LLM) -> list[Output]:
    vocab_size = SHRUNK["vocab_size"]
    prompts = [
        [(i * 7919 + j * j * 31 + j) % (vocab_size - 10) + 5 for j in range(length)]
        for i, length in enumerate(PROMPT_LENGTHS)
    ]
    return generate(llm, prompts, [OUT] * len(prompts))


def _with_engine(model: str, dtype: str, options: dict[str, Any], work: Callable[[LLM], T]) -> T | str:
    """What `work` makes with an engine, or the error that stopped it."""
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    common: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,  # the longest prompt takes two chunks
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 128 << 20,
        "gpu_memory_utilization": 0.3,  # must be free, though the cache takes what the line above says
    }
    llm = None
    try:
        llm = LLM(**common, **options)
        return work(llm)
    except Exception as error:  # whatever stops vLLM is the result
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return next((line for line in lines if "sawkv" in line), lines[0])[:300]
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _line(passed: bool, what: str, detail: str) -> int:
    print(f"{'PASS' if passed else 'FAIL'}  {what}: {detail}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
