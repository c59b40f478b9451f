"""Runs every kernel of our layers while vLLM warms up, so that no request waits for a compiler.

NVRTC, Triton and FlashAttention 4 compile a kernel when it is first called. vLLM's own warm-up calls those of decodes
and, from 0.33 on, of very short prompts, and with --enforce-eager none. It never meets short turns over long contexts,
long prompts, or the rest of a prompt after its first chunk.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


def arrange(worker: Any) -> None:
    """Have a worker warm up our kernels before vLLM warms up its own: CUDA graphs then capture what is there, and
    vLLM's monitor of compilers (0.33) begins afterwards. Called in each worker when its model is loaded.
    """
    compile_or_warm_up = worker.compile_or_warm_up_model

    @functools.wraps(compile_or_warm_up)
    def warm_up_first() -> Any:
        warm_up(worker)
        return compile_or_warm_up()

    worker.compile_or_warm_up_model = warm_up_first


def warm_up(worker: Any) -> None:
    """Run each kernel of each layer. Pages and counts stay as they are."""
    from sawkv.integrations.vllm.backend import SawAttentionImpl

    started, layers = time.monotonic(), worker.vllm_config.compilation_config.static_forward_context
    impls = [impl for layer in layers.values() if isinstance(impl := getattr(layer, "impl", None), SawAttentionImpl)]
    builders = {impl.builder for impl in impls if impl.builder is not None}
    for builder in builders:
        builder.warm_up()
    if builders and worker.device.type == "cuda":
        torch.cuda.synchronize(worker.device)
        logger.info("sawkv: compiled and ran all kernels in %.1f s", time.monotonic() - started)
