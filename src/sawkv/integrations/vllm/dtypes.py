"""sawkv's own names of `--kv-cache-dtype`, in vLLM from 0.33 on.

Under vLLM's names a GPU serves vLLM's own slower caches wherever sawkv is not chosen. Under these, vLLM stops: without
the plugin it does not know them, and `selection` refuses any other backend.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch

from sawkv.integrations.vllm.config import OWN_DTYPE_CODECS, VLLM_DTYPE_CODECS


class Handler:
    """What vLLM asks about a name: all is as for its own name of the same bits, whose size of pages ours have.

    Args:
        name: the new name.
        like: vLLM's.
    """

    def __init__(self, name: str, like: str) -> None:
        self.name, self._like = name, like

    def torch_dtype(self) -> torch.dtype:
        from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

        return STR_DTYPE_TO_TORCH_DTYPE[self._like]

    def quant_mode(self) -> Any:
        """Not KVQuantMode.CUSTOM: in vLLM 0.33 that is another name of a format of its own."""
        from vllm.v1.kv_cache_interface import get_kv_quant_mode

        return get_kv_quant_mode(self._like)


def install() -> None:
    """Register the names, once. Older vLLM takes none."""
    cache: Any = import_module("vllm.config.cache")
    register = getattr(cache, "register_kv_cache_dtype", None)
    if register is None:
        return
    vllms = {codec: name for name, codec in VLLM_DTYPE_CODECS.items()}
    for name, codec in OWN_DTYPE_CODECS.items():
        if not cache.is_known_kv_cache_dtype(name):
            register(name)(partial(Handler, name, vllms[codec]))
