"""Statistics of one attention layer on text. `fit` turns them into centers, gains and feedback.

Rows are weighted by how much their errors cost. An error of a value changes the layer's output by the attention weight
a, so its row counts with the sum of a^2 over the queries that see it. An error of a score moves the output o by a (v -
o), so the key's row counts with the sum of a^2 |v - o|^2. Without weights the mean would be that of rows that hardly
matter, and the first token alone made half of the error (docs/lab/2026-11.md).

Rows are not kept, so memory does not grow with the text. Q and K are taken after RoPE, as the cache stores K.
"""

from __future__ import annotations

from copy import copy
from typing import Final

import torch

from sawkv.errors import UnsupportedError

QUERY_STEP: Final = 4
"""Every fourth query is used for the weights of rows: a quarter of the work for the same result."""


class LayerStatistics:
    """Sums over the rows of one layer's Q, K and V, in fp64.

    Attributes:
        rows: tokens added.
        weights: [2, num_kv_heads], sum of the weights of rows of K and of V.
        sums: [2, num_kv_heads, head_dim], weighted sum of rows of K and of V.
        squares: [2, num_kv_heads, head_dim], weighted sum of squares.
        plain_sums, plain_squares: the same sums without weights, for comparison with traffic.
        query_gram: [num_kv_heads, head_dim, head_dim], the sum of q q^T over the queries that read the head.
        queries: number of such queries per head.
        output_gram: [num_kv_heads, head_dim, head_dim], Gram matrix of the output projection's columns that read the
            head; None if never set.

    Args:
        num_kv_heads: of this rank.
        head_dim: channels per head of K and of V.
        device: of the rows; the sums stay there.
        softmax_scale: factor of q.k; None is head_dim ** -0.5.
        sliding_window: tokens that a query sees, itself included; 0 is no limit.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        softmax_scale: float | None = None,
        sliding_window: int = 0,
    ) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.sliding_window = sliding_window
        self.rows = self.queries = 0
        self.weights = zeros(2, num_kv_heads)
        self.sums, self.squares, self.plain_sums, self.plain_squares = (
            zeros(2, num_kv_heads, head_dim) for _ in range(4)
        )
        self.query_gram = zeros(num_kv_heads, head_dim, head_dim)
        self.output_gram: torch.Tensor | None = None

    @torch.no_grad()
    def set_output_weight(self, weight: torch.Tensor) -> None:
        """Set the output projection, which weights errors of V. Call it before `add`, or never.

        Args:
            weight: [hidden_size, num_q_heads * head_dim], of this rank's heads, any float dtype.

        Raises:
            UnsupportedError: the shape does not fit, or rows were added before.
        """
        if weight.ndim != 2 or weight.shape[1] % (self.num_kv_heads * self.head_dim):
            raise UnsupportedError(
                f"output projection: expected [hidden_size, a multiple of {self.num_kv_heads * self.head_dim}], got"
                f" {list(weight.shape)}"
            )
        if self.rows:
            raise UnsupportedError(f"output projection: expected before the first rows, got it after {self.rows}")
        columns = (
            weight.double().view(len(weight), self.num_kv_heads, -1, self.head_dim).permute(1, 2, 0, 3).flatten(1, 2)
        )
        self.output_gram = columns.mT @ columns

    @torch.no_grad()
    def add(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add one window of text. Its tokens attend causally to each other and to nothing else.

        Args:
            q: [num_tokens, num_q_heads, head_dim], any float dtype, after RoPE. Query head i reads KV head i *
                num_kv_heads // num_q_heads.
            k, v: [num_tokens, num_kv_heads, head_dim], K after RoPE.

        Raises:
            UnsupportedError: a shape does not fit.
        """
        expected = [len(k), self.num_kv_heads, self.head_dim]
        if list(k.shape) != expected or list(v.shape) != expected:
            raise UnsupportedError(
                f"preparation: expected K and V of {expected}, got {list(k.shape)} and {list(v.shape)}"
            )
        if q.ndim != 3 or q.shape[1] % self.num_kv_heads or q.shape[::2] != k.shape[::2]:
            raise UnsupportedError(
                f"preparation: expected Q of [{len(k)}, a multiple of {self.num_kv_heads}, {self.head_dim}], got"
                f" {list(q.shape)}"
            )
        grouped = q.float().view(len(q), self.num_kv_heads, -1, self.head_dim).permute(1, 2, 0, 3)
        for head, queries in enumerate(grouped):  # head by head: scores take num_tokens * num_tokens of memory
            rows = k[:, head].float(), v[:, head].float()
            for kind, (x, weight) in enumerate(zip(rows, self._importance(queries, *rows, head), strict=True)):
                exact, weight = x.double(), weight.double()
                self.weights[kind, head] += weight.sum()
                self.sums[kind, head] += weight @ exact
                self.squares[kind, head] += weight @ exact.square()
                self.plain_sums[kind, head] += exact.sum(0)
                self.plain_squares[kind, head] += exact.square().sum(0)
            flat = queries.flatten(0, 1).double()
            self.query_gram[head] += flat.mT @ flat
        self.queries += grouped.shape[1] * len(q)
        self.rows += len(k)

    def split(self, parts: int) -> LayerStatistics:
        """The same sums for heads cut into `parts` rows each, as pages store them: num_kv_heads * parts heads."""
        if parts == 1:
            return self
        heads, size = self.num_kv_heads * parts, self.head_dim // parts

        def blocks(gram: torch.Tensor) -> torch.Tensor:
            split = gram.view(-1, parts, size, parts, size)
            return torch.stack([split[:, i, :, i] for i in range(parts)], 1).flatten(0, 1)

        whole = copy(self)
        whole.num_kv_heads, whole.head_dim = heads, size
        whole.weights = self.weights.repeat_interleave(parts, 1)
        for name in ("sums", "squares", "plain_sums", "plain_squares"):
            setattr(whole, name, getattr(self, name).view(2, heads, size))
        whole.query_gram = blocks(self.query_gram)
        whole.output_gram = None if self.output_gram is None else blocks(self.output_gram)
        return whole

    def _importance(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of rows of K and of V, [num_tokens] each.

        Args:
            q: [group, num_tokens, head_dim] fp32.
            k, v: [num_tokens, head_dim] fp32.
        """
        place = torch.arange(len(k), device=k.device)
        asked = place.flip(0)[::QUERY_STEP, None]
        hidden = place > asked
        if self.sliding_window:
            hidden |= place <= asked - self.sliding_window
        seen = (q[:, asked[:, 0]] @ k.mT * self.softmax_scale).masked_fill(hidden, -torch.inf).softmax(-1)
        out = seen @ v
        metric = (
            torch.eye(self.head_dim, device=k.device) if self.output_gram is None else self.output_gram[head].float()
        )
        weighed = out @ metric
        length = ((v @ metric) * v).sum(-1)
        # |v - o|^2 in the layer's output.
        distance = (length + (weighed * out).sum(-1, keepdim=True) - 2 * weighed @ v.mT).clamp_min(0)
        squares = seen.square()
        return (squares * distance).sum((0, 1)), squares.sum((0, 1))
