"""Transformers' `generate` with a SawCache against its own DynamicCache and SDPA: decoding speed and KV memory, in one
run.

    python -m benchmarks.transformers_decode  # on a GPU: an 8B-shaped model with random weights
    python -m benchmarks.transformers_decode --model models/sawkv-6m --device cpu --contexts 256 1024 2048 4096

A step's time is the median over the steps of `generate` after the first two, everything that `generate` does included.
KV memory is the peak of allocated memory while tokens are generated after the prompt, less the model (on a CPU: what
the cache holds). Rows:

    DynamicCache            Transformers' default, SDPA attention
    SawCache                INT4 pages that grow, uncompiled
    SawCache, compiled      INT4 pages of a fixed number, max_cache_len: generate compiles the step, into CUDA graphs
    StaticCache, compiled   with --static: Transformers' own cache of that kind, in 16 bits
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
    Qwen3Config,
    StaticCache,
    logging,
)

from benchmarks.plots import append_record
from sawkv.integrations.transformers import SawCache

QWEN3_8B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
WARM_UP = 2
"""Steps whose time is not counted; where the step is compiled, these compile it and record its graph."""


class Clock(LogitsProcessor):
    """Called by `generate` once a step: notes the time, and starts to watch memory when the prompt is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            if not self.times:
                torch.cuda.reset_peak_memory_stats()
        self.times.append(time.perf_counter())
        return scores


def load(model_path: Path | None, device: torch.device) -> PreTrainedModel:
    """The model of that folder, or one with Qwen3-8B's shape and random weights made on the device."""
    if model_path is not None:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
        model = model.to(device)  # type: ignore[arg-type]  # of a decorated method
    else:
        with device:
            config = Qwen3Config(**QWEN3_8B)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.eval()  # type: ignore[no-untyped-call]
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


def measure(
    model: PreTrainedModel, cache: Any, context: int, batch: int, steps: int, compile_config: CompileConfig | None
) -> dict[str, Any]:
    """Generate `steps` tokens after a random prompt. Seconds a step, seconds of prefill, bytes of KV memory."""
    device = model.device
    held_before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    clock = Clock(device)
    torch.manual_seed(context)
    ids = torch.randint(100, model.config.vocab_size - 100, (batch, context), device=device)
    options = {"compile_config": compile_config} if compile_config else {"disable_compile": True}
    started = time.perf_counter()
    model.generate(  # type: ignore[operator]  # a mixin's
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=steps + 1,
        do_sample=False,
        pad_token_id=0,
        logits_processor=[clock],
        **options,
    )
    if device.type == "cuda":
        kv_bytes = torch.cuda.max_memory_allocated() - held_before
    elif isinstance(cache, SawCache):
        kv_bytes = cache.nbytes
    else:
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    gaps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return {
        "seconds": statistics.median(gaps[WARM_UP:]),
        "prefill_seconds": clock.times[0] - started,
        "kv_bytes": kv_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's folder; without one, random weights of Qwen3-8B's shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--format", default="int4")
    parser.add_argument(
        "--compile",
        choices=["inductor", "cudagraphs", "none"],
        help="what compiles the step: inductor on a GPU, none on a CPU",
    )
    parser.add_argument("--static", action="store_true", help="also StaticCache, compiled")
    parser.add_argument("--out", type=Path, help="append the result as lines of JSON")
    args = parser.parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = torch.device(args.device)
    started = time.perf_counter()
    model = load(args.model, device)
    size = sum(weight.numel() for weight in model.parameters()) / 1e9
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{model.config.model_type}, {model.config.num_hidden_layers} layers, {size:.2f} G parameters, {on}")
    compiler = args.compile or ("inductor" if device.type == "cuda" else "none")
    longest = max(args.contexts) + args.steps + 1
    compiled = CompileConfig(backend=compiler, mode="reduce-overhead" if compiler == "inductor" else "default")
    compiled._compile_all_devices = True  # type: ignore[assignment]
    config = model.config
    rows: dict[str, tuple[str, Callable[[], Any], CompileConfig | None]] = {
        "DynamicCache": ("sdpa", lambda: DynamicCache(config=config), None),
        "SawCache": ("sawkv", lambda: SawCache(config, args.format), None),
    }
    if compiler != "none":
        # One cache for all contexts: its graph is made once.
        kept = SawCache(config, args.format, max_cache_len=longest)
        rows["SawCache, compiled"] = ("sawkv", lambda: kept, compiled)
        if args.static:
            static = StaticCache(config=config, max_cache_len=longest)
            rows["StaticCache, compiled"] = ("sdpa", lambda: static, compiled)
    print(
        f"\n{'context':>8} "
        f" {'cache':<22}{'ms a step':>10}{'tok/s':>8}{'ratio':>7}{'prefill s':>11}{'KV MiB':>9}{'ratio':>7}"
    )
    for context in args.contexts:
        base: dict[str, Any] = {}
        for name, (attention, new_cache, compile_config) in rows.items():
            model.set_attn_implementation(attention)
            if compile_config is None:  # once, untimed: kernels are built and tuned at first use
                measure(model, new_cache(), min(context, 300), args.batch, 4, None)
            cache = new_cache()
            got = measure(model, cache, context, args.batch, args.steps, compile_config)
            if compile_config is not None:
                got["kv_bytes"] = (
                    0  # it also holds the compiler's buffers, and room for the longest context: not comparable
                )
                cache.reset()
            del cache
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            base = base or got
            record = {
                "cache": name,
                "context": context,
                "batch": args.batch,
                "ms": round(got["seconds"] * 1e3, 3),
                "tokens_per_s": round(args.batch / got["seconds"], 1),
                "speed_ratio": round(base["seconds"] / got["seconds"], 2),
                "prefill_s": round(got["prefill_seconds"], 3),
                "kv_mib": round(got["kv_bytes"] / 2**20, 1),
                "memory_ratio": round(base["kv_bytes"] / got["kv_bytes"], 2) if got["kv_bytes"] else None,
                "device": on,
            }
            memory = f"{record['kv_mib']:>9.1f}{record['memory_ratio']:>7.2f}" if got["kv_bytes"] else " " * 16
            print(
                f"{context:>8} "
                f" {name:<22}{record['ms']:>10.2f}{record['tokens_per_s']:>8.1f}{record['speed_ratio']:>7.2f}"
                f"{record['prefill_s']:>11.2f}{memory}",
                flush=True,
            )
            if args.out:
                append_record(args.out, record)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
