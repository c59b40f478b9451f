"""Which cache each layer of an engine has, asked in its workers: a baseline that keeps some layers in 16 bits is not
what its name says.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from sawkv.integrations.vllm.worker import Extension

if TYPE_CHECKING:
    from vllm import LLM

EXTENSION: Final = "benchmarks.layers.Layers"
"""For vLLM's `worker_extension_cls`."""


class Layers(Extension):
    """A part of vLLM's worker."""

    vllm_config: Any

    def kv_cache_dtypes(self) -> list[str]:
        """Of all attention layers, in order."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return [layer.kv_cache_dtype for layer in layers if hasattr(layer, "kv_cache_dtype")]


def check_layers(llm: LLM, wanted: str) -> str:
    """Every layer's `kv_cache_dtype` as one line, for the log.

    Args:
        llm: made with `worker_extension_cls=EXTENSION`.
        wanted: what the engine was asked for.

    Raises:
        SystemExit: some layer has another. vLLM's TurboQuant keeps the first and the last layers in 16 bits; a
            checkpoint may ask for FP8.
    """
    counted = Counter(dtype for worker in llm.collective_rpc("kv_cache_dtypes") for dtype in worker)
    shown = ", ".join(f"{count} layers {dtype}" for dtype, count in counted.items())
    if set(counted) != {wanted}:
        raise SystemExit(f"expected kv_cache_dtype {wanted} in all layers, got {shown}: not a baseline of that name")
    return shown
