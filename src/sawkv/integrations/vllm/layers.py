"""What a worker of vLLM is asked about its layers. Importing this does not bring sawkv into a worker."""

from __future__ import annotations

from typing import Any


class Layers:
    """A method for vLLM's `--worker-extension-cls`."""

    vllm_config: Any

    def kv_cache_dtypes(self) -> list[str]:
        """Of all attention layers, in order."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return [layer.kv_cache_dtype for layer in layers if hasattr(layer, "kv_cache_dtype")]
