"""What preparation measures of one attention layer: sums over text, from which `fit` makes centers, gains and feedback.

Not every row's error costs the same. Rows that attention reads much, such as the first token of a text in many models,
count for what the layer's output loses by them. For the error of a value, which attention adds up with weights a, that
is the sum of a^2 over the queries that see it; for an error of a score it is a^2 |v - o|^2, since the output o moves by
a (v - o). Without this the mean is that of rows that hardly matter, and the error of the first token alone is half of
all error (docs/lab/2026-11.md).

No rows are kept, so the memory does not grow with the text. Q and K come after RoPE, as the cache stores K.
"""

from __future__ import annotations

from typing import Final

import torch

from sawkv.errors import UnsupportedError

QUERY_STEP: Final = 4
"""Of every so many queries one is asked what it attends to: a quarter of the work, and as good."""


class LayerStatistics:
    """Sums over the rows of one layer's Q, K and V, in fp64.

    Attributes:
        rows: tokens added.
        weights: [2, num_kv_heads], the sum of what K's and V's rows count.
        sums: [2, num_kv_heads, head_dim], of K and of V, by what they count.
        squares: the same, of the rows' squares.
        plain_sums, plain_squares: the same two with every row counting alike, for what traffic is compared with.
        query_gram: [num_kv_heads, head_dim, head_dim], the sum of q q^T over the queries that read the head.
        queries: how many of them for each head.
        output_gram: [num_kv_heads, head_dim, head_dim], of the columns of the output projection that read the head;
            None if never set.

    Args:
        num_kv_heads: of this rank.
        head_dim: channels in a head, of K and of V.
        device: where rows come from; the sums stay there.
        softmax_scale: factor of q.k; None is head_dim ** -0.5.
        sliding_window: tokens that a query sees, its own included; 0 is all before it.
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
        """Tell what reads the attention's output: errors count as much as it makes of them. To be called before `add`,
        or never.

        Args:
            weight: [hidden_size, num_q_heads * head_dim], of this rank's heads, any float dtype.

        Raises:
            UnsupportedError: its shape does not fit, or rows were added before.
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
        """Add one window of text: tokens that attend causally to each other and to nothing else.

        Args:
            q: [num_tokens, num_q_heads, head_dim], any float dtype, after RoPE. Query head i reads KV head i *
                num_kv_heads // num_q_heads.
            k, v: [num_tokens, num_kv_heads, head_dim], K after RoPE.

        Raises:
            UnsupportedError: a shape is not as said.
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
        for head, queries in enumerate(grouped):  # head by head, for the memory of num_tokens * num_tokens scores
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

    def _importance(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What each row of K and of V counts, [num_tokens] each. q: [group, num_tokens, head_dim]; k, v: [num_tokens,
        head_dim]; fp32.
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
        distance = (length + (weighed * out).sum(-1, keepdim=True) - 2 * weighed @ v.mT).clamp_min(
            0
        )  # |v - o|^2 in the layer's output
        squares = seen.square()
        return (squares * distance).sum((0, 1)), squares.sum((0, 1))
