"""Named by vLLM's `--worker-extension-cls`, so that each worker imports it: with it no worker runs without sawkv.

The plugin alone cannot promise that. `VLLM_PLUGINS` may leave it out, and an installation may have lost its entry
point; vLLM then starts all the same, and its CPU build reads an INT4 cache as 8-bit pages without scales.
"""

from __future__ import annotations

from sawkv.integrations.vllm.selection import install

install()


class Extension:
    """Adds nothing to the worker."""
