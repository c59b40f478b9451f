"""The class for vLLM's `--worker-extension-cls`: each worker imports it, so no worker runs without sawkv.

The plugin alone cannot ensure that: `VLLM_PLUGINS` may exclude it, and an installation may lack the entry point. vLLM
would start without it, and its CPU build would read an INT4 cache as 8-bit pages without scales.
"""

from __future__ import annotations

from typing import Any

from sawkv.integrations.vllm.selection import install

install()


class Extension:
    """A method of each worker."""

    vllm_config: Any

    def kv_cache_dtypes(self) -> list[str]:
        """Of all attention layers, in order."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return [layer.kv_cache_dtype for layer in layers if hasattr(layer, "kv_cache_dtype")]
