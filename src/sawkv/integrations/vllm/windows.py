"""Page sizes of sliding windows in INT4 on vLLM before 0.28.

There, `SlidingWindowSpec` counts one byte per INT4 value. An attention backend cannot change that (`customize_spec` is
new in 0.28), and each layer makes its own spec. So the method that makes it is replaced on the objects of our layers. A
worker named by `--worker-cls` would not be enough, because vLLM asks the layers directly when it profiles CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from sawkv.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

VLLM_SIZES_WINDOWS = hasattr(AttentionBackend, "customize_spec")
"""Whether this vLLM sizes them correctly without this module."""


@dataclass(frozen=True, kw_only=True)
class PackedWindowSpec(SlidingWindowSpec):
    """A sliding window whose pages hold two INT4 values per byte, as those of vLLM's `FullAttentionSpec`.

    vLLM also finds specs by their base classes, so it groups and manages this one as a `SlidingWindowSpec` without
    registration.
    """

    @property
    def real_page_size_bytes(self) -> int:
        """Bytes of a page, without scales and zero points."""
        size: int = super(SlidingWindowSpec, self).real_page_size_bytes  # of AttentionSpec, which knows INT4
        return size


def pack_windows(layer: Any) -> None:
    """Make an attention layer report a `PackedWindowSpec` in place of a `SlidingWindowSpec`. May be called again."""
    layer.get_kv_cache_spec = partial(_packed_spec, layer)


def _packed_spec(layer: Any, vllm_config: VllmConfig) -> KVCacheSpec:
    spec = type(layer).get_kv_cache_spec(layer, vllm_config)
    if type(spec) is not SlidingWindowSpec:
        raise UnsupportedError(
            f"sawkv: expected vLLM's SlidingWindowSpec of a layer with a sliding window, got {type(spec).__name__}"
        )
    return PackedWindowSpec(**{field.name: getattr(spec, field.name) for field in fields(spec)})
