"""Notices that other weights are loaded into a running engine, by `reload_weights` or after sleep level 2.

Centers, gains and feedback were fitted to the weights of the start, and are kept. With the same weights that is right.
With others the cache is less accurate, which is a warning. Pages that leave the engine are bound to the weights of the
start, so an engine that stores or sends them stops.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import torch
from vllm.logger import init_logger

from sawkv.errors import UnsupportedError
from sawkv.integrations.vllm.connectors import leaves_the_engine

PLACES: Final = 16
"""Most values that are read along each axis of a parameter."""

logger = init_logger(f"vllm.{__name__}")


def watch(worker: Any) -> None:
    """Remember a worker's weights. vLLM calls `process_weights_after_loading` of attention layers when all are loaded,
    and the last layer then compares.
    """
    from sawkv.integrations.vllm.backend import SawAttentionImpl

    model = worker.model_runner.get_model()
    impls = [impl for layer in model.modules() if isinstance(impl := getattr(layer, "impl", None), SawAttentionImpl)]
    if not impls:
        return
    known, leaves = sample(model), leaves_the_engine(worker.vllm_config.kv_transfer_config)

    def compare() -> None:
        nonlocal known
        if (found := sample(model)) == known:
            return
        known = found
        logger.warning(
            "sawkv: other weights were loaded. Centers, gains and feedback stay those of the weights of the start, and"
            " its pages stay cached until /reset_prefix_cache?reset_external=true. Start again to prepare anew"
        )
        if leaves:
            impls[-1].stopped = UnsupportedError(
                "sawkv: expected the weights of the start, which the pages that leave this engine are bound to"
                " (--kv-transfer-config), got others: start again"
            )

    impls[-1].reloaded = compare


def sample(model: torch.nn.Module) -> str:
    """A digest over some values of each parameter: another training step changes it, and reading it takes no time."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        steps = tuple(slice(None, None, max(1, -(-size // PLACES))) for size in parameter.shape)
        values = parameter.detach()[steps].cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
