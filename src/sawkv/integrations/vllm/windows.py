"""INT4 pages of sliding windows in their right size, on vLLM before 0.28.

There `SlidingWindowSpec` gives a byte to each INT4 value. An attention backend has no say in it (`customize_spec` is of
0.28), and though vLLM takes other specs than its own, each layer makes its spec itself. So the method that does is
replaced, on our layers' objects: all that sawkv changes in vLLM. A worker named by `--worker-cls` would not do: vLLM
asks the layers, past the worker, when it profiles CUDA graphs.
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
"""Whether this vLLM needs nothing of this module."""


@dataclass(frozen=True, kw_only=True)
class PackedWindowSpec(SlidingWindowSpec):
    """A sliding window whose pages hold two INT4 values in a byte, as those of vLLM's `FullAttentionSpec` do.

    It need not be registered: vLLM looks specs up by their base classes too, and so groups and manages this one as
    `SlidingWindowSpec`.
    """

    @property
    def real_page_size_bytes(self) -> int:
        """Bytes of a page without scales and zero points."""
        size: int = super(SlidingWindowSpec, self).real_page_size_bytes  # of AttentionSpec, which knows INT4
        return size


def pack_windows(layer: Any) -> None:
    """Make an attention layer report a `PackedWindowSpec` where vLLM's class would report a `SlidingWindowSpec`. May be
    called again.
    """
    layer.get_kv_cache_spec = partial(_packed_spec, layer)


def _packed_spec(layer: Any, vllm_config: VllmConfig) -> KVCacheSpec:
    spec = type(layer).get_kv_cache_spec(layer, vllm_config)
    if type(spec) is not SlidingWindowSpec:
        raise UnsupportedError(
            f"sawkv: expected vLLM's SlidingWindowSpec of a layer with a sliding window, got {type(spec).__name__}"
        )
    return PackedWindowSpec(**{field.name: getattr(spec, field.name) for field in fields(spec)})
