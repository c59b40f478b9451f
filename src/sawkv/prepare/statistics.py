"""What preparation measures of one attention layer: sums over text, from which `fit` makes centers, gains and feedback.

No rows are kept, so the memory does not grow with the text. Q and K come after RoPE, as the cache stores K.
"""

from __future__ import annotations

import torch

from sawkv.errors import UnsupportedError


class LayerStatistics:
    """Sums over the rows of one layer's Q, K and V, in fp64.

    Attributes:
        rows: tokens added.
        windows: calls of `add`.
        sums: [2, num_kv_heads, head_dim], of K and of V.
        squares: the same, of the rows' squares.
        window_squares: the same, of the squares of each window's mean, times its tokens: how far the mean moves from window to window.
        query_gram: [num_kv_heads, head_dim, head_dim], the sum of q q^T over the queries that read the head.
        queries: how many of them for each head.
        output_gram: [num_kv_heads, head_dim, head_dim], of the columns of the output projection that read the head; None if never set.

    Args:
        num_kv_heads: of this rank.
        head_dim: channels in a head, of K and of V.
        device: where rows come from; the sums stay there.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, device: torch.device | str) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.rows = self.windows = self.queries = 0
        self.sums, self.squares, self.window_squares = (zeros(2, num_kv_heads, head_dim) for _ in range(3))
        self.query_gram = zeros(num_kv_heads, head_dim, head_dim)
        self.output_gram: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add one window of text.

        Args:
            q: [num_tokens, num_q_heads, head_dim], any float dtype, after RoPE. Query head i reads KV head i * num_kv_heads // num_q_heads.
            k, v: [num_tokens, num_kv_heads, head_dim], K after RoPE.

        Raises:
            UnsupportedError: a shape is not as said.
        """
        expected = [len(k), self.num_kv_heads, self.head_dim]
        if list(k.shape) != expected or list(v.shape) != expected:
            raise UnsupportedError(f"preparation: expected K and V of {expected}, got {list(k.shape)} and {list(v.shape)}")
        if q.ndim != 3 or q.shape[1] % self.num_kv_heads or q.shape[::2] != k.shape[::2]:
            raise UnsupportedError(
                f"preparation: expected Q of [{len(k)}, a multiple of {self.num_kv_heads}, {self.head_dim}], got {list(q.shape)}"
            )
        for kind, x in enumerate((k, v)):
            rows = x.double()
            total = rows.sum(0)
            self.sums[kind] += total
            self.squares[kind] += rows.square().sum(0)
            self.window_squares[kind] += total.square() / max(1, len(x))
        queries = q.double().view(len(q), self.num_kv_heads, -1, self.head_dim).transpose(0, 1).flatten(1, 2)
        self.query_gram += queries.mT @ queries
        self.queries += queries.shape[1]
        self.rows += len(k)
        self.windows += 1

    @torch.no_grad()
    def set_output_weight(self, weight: torch.Tensor) -> None:
        """Tell what reads the attention's output: errors of V count as much as it makes of them.

        Args:
            weight: [hidden_size, num_q_heads * head_dim], of this rank's heads, any float dtype.

        Raises:
            UnsupportedError: its shape does not fit.
        """
        if weight.ndim != 2 or weight.shape[1] % (self.num_kv_heads * self.head_dim):
            raise UnsupportedError(
                f"output projection: expected [hidden_size, a multiple of {self.num_kv_heads * self.head_dim}], got {list(weight.shape)}"
            )
        columns = weight.double().view(len(weight), self.num_kv_heads, -1, self.head_dim).permute(1, 2, 0, 3).flatten(1, 2)
        self.output_gram = columns.mT @ columns
