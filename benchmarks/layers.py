"""The cache dtype of each layer of an engine, as its workers report it. A baseline that keeps some layers in 16 bits is
not what its name says.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sawkv.integrations.vllm.client import check_layers

if TYPE_CHECKING:
    from vllm import LLM


def check_engine(llm: LLM, wanted: str) -> str:
    """Every layer's `kv_cache_dtype` as one line, for the log.

    Args:
        llm: made with `worker_extension_cls=config.WORKER_EXTENSION`.
        wanted: what the engine was asked for.

    Raises:
        UnsupportedError: some layer has another.
    """
    counted = Counter(dtype for worker in llm.collective_rpc("kv_cache_dtypes") for dtype in worker)
    check_layers(counted, wanted)
    return ", ".join(f"{count} layers {dtype}" for dtype, count in counted.items())
