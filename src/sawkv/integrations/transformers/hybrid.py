"""Layers of a cache with K and V, and recurrent states beside them."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from sawkv.integrations.transformers.layer import SawLayer


class SawHybridLayer(SawLayer, LinearAttentionCacheLayerMixin):  # type: ignore[no-untyped-call, override]
    """Pages of K and V, and Transformers' own states of the recurrent part of the same layer (Falcon-H1, Zamba2).

    Models ask the layer for what they keep in `LinearAttentionLayer`, and get that of `recurrent`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.recurrent = LinearAttentionLayer()

    def __getattr__(self, name: str) -> Any:
        if name == "recurrent" or name.startswith("__"):  # not made yet: a copy is
            raise AttributeError(name)
        return getattr(self.recurrent, name)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.recurrent.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.recurrent.update_recurrent_state(*args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.recurrent = LinearAttentionLayer()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        reorder_states(self.recurrent, beam_idx)


def reorder_states(layer: LinearAttentionLayer, beam_idx: torch.Tensor) -> None:
    """Reorder or subset the batch of a layer's states, if it has any yet."""
    if layer.device is not None:
        layer.reorder_cache(beam_idx)
