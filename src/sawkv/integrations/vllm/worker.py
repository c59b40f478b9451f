"""The class for vLLM's `--worker-extension-cls`: each worker imports it, so no worker runs without sawkv.

The plugin alone cannot ensure that: `VLLM_PLUGINS` may exclude it, and an installation may lack the entry point. vLLM
would start without it, and its CPU build would read an INT4 cache as 8-bit pages without scales.
"""

from __future__ import annotations

from sawkv.integrations.vllm.layers import Layers
from sawkv.integrations.vllm.selection import install

install()


class Extension(Layers):
    """What every worker gets that serves from our pages."""
