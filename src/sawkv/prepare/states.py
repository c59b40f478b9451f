"""Q, K and V of a model's attention layers, and what attention may read in place of K and V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sawkv.prepare.statistics import LayerStatistics

Reader = Callable[[torch.Tensor], torch.Tensor]
"""Maps rows [num_tokens, num_kv_heads, head_dim] fp32 of one sequence, from its first token on, to what attention would
read after they were stored, same shape and dtype. Does not change its input.
"""


@dataclass(frozen=True)
class Kept:
    """Tokens that a query reads as they are, without quantization.

    Attributes:
        first: tokens at the start of the sequence.
        last: tokens up to the query, itself included.
        tile: those of the query's own tile of so many tokens, which may not be complete yet.
    """

    first: int = 0
    last: int = 0
    tile: int = 1

    def mask(self, length: int) -> torch.Tensor:
        """[length, length] bool, true where the query of the row reads the key of the column as it is."""
        key = torch.arange(length)
        query = key[:, None]
        kept = (key < self.first) | (key > query - self.last) | (key // self.tile == query // self.tile)
        return kept & (key <= query)

    def share(self, length: int) -> float:
        """The share of a sequence's tokens that is kept, at `length` tokens; a mean over its last tile."""
        return float(self.mask(length)[-self.tile :].sum(-1).double().mean()) / length


LayerReaders = tuple[Reader, Reader] | tuple[Reader, Reader, Kept]
"""How attention reads K, how it reads V, and what it reads unquantized."""


@dataclass(frozen=True)
class LayerStates:
    """Q, K and V of one attention layer on some text.

    Attributes:
        q: [num_tokens, num_q_heads, head_dim] fp32, after RoPE.
        k, v: [num_tokens, num_kv_heads, head_dim] fp32, K after RoPE. Windows follow each other.
        output_weight: [hidden_size, num_q_heads * head_dim], the output projection in the model's dtype; None if it is
            not found.
        softmax_scale: factor of q.k.
        sliding_window: tokens that a query sees, itself included; 0 is no limit.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    output_weight: torch.Tensor | None
    softmax_scale: float
    sliding_window: int = 0

    def empty_statistics(self, context: int = 0) -> LayerStatistics:
        """Statistics without rows, for a layer of this shape. `context`: positions that get buckets."""
        statistics = LayerStatistics(
            self.k.shape[1], self.k.shape[2], self.k.device, self.softmax_scale, self.sliding_window, context
        )
        if self.output_weight is not None:
            statistics.set_output_weight(self.output_weight)
        return statistics
