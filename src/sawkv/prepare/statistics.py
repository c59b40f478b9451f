"""Statistics of one attention layer on text. `fit` turns them into centers, gains and feedback.

Rows are weighted by how much their errors cost. An error of a value changes the layer's output by the attention weight
a, so its row counts with the sum of a^2 over the queries that see it. An error of a score moves the output o by a (v -
o), so the key's row counts with the sum of a^2 |v - o|^2. Without weights the mean would be that of rows that hardly
matter, and the first token alone would make half of the error (docs/lab/2026-11.md, What to fit).

Rows are not kept, so memory does not grow with the text. Q and K are taken after RoPE, as the cache stores K.

K has a center per bucket of positions, because RoPE turns the mean of K. All of them follow from one mean: that of rows
which are turned back to position 0 (`turning`).

Q has one Gram matrix for all positions, and RoPE turns it too. A few windows stand at few positions. So each query is
turned to a position of its own, and together they cover the context.
"""

from __future__ import annotations

import itertools
from copy import copy
from functools import cached_property
from typing import Final

import torch

from sawkv.errors import UnsupportedError
from sawkv.format.constants import BUCKET_SIZE
from sawkv.prepare.corpus import LONGEST_CONTEXT
from sawkv.prepare.turning import Turning, buckets_in, find_turning

QUERY_STEP: Final = 4
"""Every fourth query is used for the weights of rows: a quarter of the work for the same result."""
GOLDEN: Final = (5**0.5 - 1) / 2
"""Fractional parts of its multiples fill the unit interval evenly, however many there are."""


class LayerStatistics:
    """Sums over the rows of one layer's Q, K and V, in fp64.

    Attributes:
        rows: tokens added, by bucket.
        weights: [num_buckets, 2, num_kv_heads], sum of the weights of rows of K and of V.
        sums: [num_buckets, 2, num_kv_heads, head_dim], weighted sum of rows of K and of V.
        squares: [2, num_kv_heads, head_dim], weighted sum of squares.
        plain_sums, plain_squares: the same sums without weights, for comparison with traffic.
        turned_sums: [num_kv_heads, head_dim], weighted sum of rows of K, each turned back to position 0.
        query_gram: [num_kv_heads, head_dim, head_dim], the sum of q q^T over the queries that read the head, turned to
            positions all over the context.
        queries: number of such queries per head.
        output_gram: [num_kv_heads, head_dim, head_dim], Gram matrix of the output projection's columns that read the
            head; None if never set.

    Args:
        num_kv_heads: of this rank.
        head_dim: channels per head of K and of V.
        device: of the rows; the sums stay there.
        softmax_scale: factor of q.k; None is head_dim ** -0.5.
        sliding_window: tokens that a query sees, itself included; 0 is no limit.
        context: positions that get buckets; 0 is one bucket for all.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        softmax_scale: float | None = None,
        sliding_window: int = 0,
        context: int = 0,
    ) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.sliding_window = sliding_window
        num_buckets = buckets_in(context)
        self.rows, self.queries = [0] * num_buckets, 0
        self.weights = zeros(num_buckets, 2, num_kv_heads)
        self.sums, self.plain_sums = (zeros(num_buckets, 2, num_kv_heads, head_dim) for _ in range(2))
        self.squares, self.plain_squares = (zeros(2, num_kv_heads, head_dim) for _ in range(2))
        self.turned_sums = zeros(num_kv_heads, head_dim)
        self._probes: dict[int, torch.Tensor] = {}
        self._turning = Turning.none(head_dim, device)
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
        if any(self.rows):
            raise UnsupportedError(f"output projection: expected before the first rows, got it after {sum(self.rows)}")
        columns = (
            weight.double().view(len(weight), self.num_kv_heads, -1, self.head_dim).permute(1, 2, 0, 3).flatten(1, 2)
        )
        self.output_gram = columns.mT @ columns

    @torch.no_grad()
    def add(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor | None = None,
        is_probe: bool = False,
    ) -> None:
        """Add one pass over text. Its tokens attend causally to each other and to nothing else.

        Args:
            q: [num_tokens, num_q_heads, head_dim], any float dtype, after RoPE. Query head i reads KV head i *
                num_kv_heads // num_q_heads.
            k, v: [num_tokens, num_kv_heads, head_dim], K after RoPE.
            positions: [num_tokens] int64 on the CPU; None is 0, 1, 2, ...
            is_probe: whether the pass only shows how K turns. Probes come first (`corpus.passes`).

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
        positions = torch.arange(len(k), device="cpu") if positions is None else positions
        if is_probe:  # once, if layers share K
            self._probes.setdefault(int(positions[0]), k.clone())
            return
        if self._probes:
            self._turning, self._probes = find_turning([*self._probes.values()]) or self._turning, {}
        turned_q = self._turning.turn(q, self._places(len(q)) - positions)
        spread: torch.Tensor = torch.unflatten(turned_q, 1, (self.num_kv_heads, -1))
        grouped = q.float().view(len(q), self.num_kv_heads, -1, self.head_dim).permute(1, 2, 0, 3)
        weights = []
        for head, queries in enumerate(grouped):  # head by head: scores take num_tokens * num_tokens of memory
            weights.append(torch.stack(self._importance(queries, k[:, head].float(), v[:, head].float(), head)))
            flat = spread[:, head].flatten(0, 1)
            self.query_gram[head] += flat.mT @ flat
        weight = torch.stack(weights, 1).double()  # [2, num_kv_heads, num_tokens]
        rows = torch.stack([k, v]).transpose(1, 2).double()  # [2, num_kv_heads, num_tokens, head_dim]
        turned = self._turning.turn(k, -positions).transpose(0, 1)
        self.turned_sums += (weight[0, :, None] @ turned)[:, 0]
        self.squares += (weight[:, :, None] @ rows.square())[:, :, 0]
        self.plain_squares += rows.square().sum(2)
        for bucket, part in _runs((positions // BUCKET_SIZE).clamp_max(len(self.rows) - 1)):
            self.rows[bucket] += part.stop - part.start
            self.weights[bucket] += weight[..., part].sum(-1)
            self.sums[bucket] += (weight[:, :, None, part] @ rows[:, :, part])[:, :, 0]
            self.plain_sums[bucket] += rows[:, :, part].sum(2)
        self.queries += grouped.shape[1] * len(q)

    @cached_property
    def centers(self) -> torch.Tensor:
        """Centers of K and of V, [num_buckets, 2, num_kv_heads, head_dim] fp32, once all rows are added. Those of V are
        equal in all buckets.
        """
        total = self.weights.sum(0)[..., None].clamp_min(torch.finfo(torch.float64).tiny)
        of_k = self._turning.bucket_means(self.turned_sums / total[0], len(self.rows))
        of_v = self.sums[:, 1].sum(0) / total[1]
        return torch.stack([of_k, of_v.expand_as(of_k)], 1).float()

    def squares_about_centers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the squared distances of rows from their centers, with weights and without: [2, num_kv_heads,
        head_dim] fp64 each.
        """
        centers, rows = self.centers.double(), self.sums.new_tensor(self.rows)[:, None, None]
        weighted, plain = (
            (squares - 2 * (centers * sums).sum(0) + (centers.square() * weights[..., None]).sum(0)).clamp_min(0)
            for squares, sums, weights in (
                (self.squares, self.sums, self.weights),
                (self.plain_squares, self.plain_sums, rows),
            )
        )
        return weighted, plain

    def split(self, parts: int) -> LayerStatistics:
        """The same sums for heads cut into `parts` rows each, as pages store them: num_kv_heads * parts heads."""
        if parts == 1:
            return self
        heads, size = self.num_kv_heads * parts, self.head_dim // parts

        def blocks(gram: torch.Tensor) -> torch.Tensor:
            split = gram.view(-1, parts, size, parts, size)
            return torch.stack([split[:, i, :, i] for i in range(parts)], 1).flatten(0, 1)

        cut = copy(self)
        cut.num_kv_heads, cut.head_dim = heads, size
        cut.weights = self.weights.repeat_interleave(parts, 2)
        for name in ("sums", "squares", "plain_sums", "plain_squares", "centers"):  # turned as whole heads
            whole = getattr(self, name)
            setattr(cut, name, whole.view(*whole.shape[:-2], heads, size))
        cut.query_gram = blocks(self.query_gram)
        cut.output_gram = None if self.output_gram is None else blocks(self.output_gram)
        return cut

    def _places(self, count: int) -> torch.Tensor:
        """Positions to which the next queries are turned, [count] on the CPU. They are spread evenly over the square
        root of the context's positions: over positions they would cost short contexts 7 % in the error of K, and over
        octaves gain nothing at the end of long ones (docs/lab/2026-11.md, Queries at positions).
        """
        numbers = sum(self.rows) + torch.arange(count, dtype=torch.float64, device="cpu")
        return min(len(self.rows) * BUCKET_SIZE, LONGEST_CONTEXT) * (numbers * GOLDEN % 1).square()

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


def _runs(values: torch.Tensor) -> list[tuple[int, slice]]:
    """The runs of equal values of a tensor on the CPU: each value with the places that it fills."""
    runs, end = [], 0
    for value, group in itertools.groupby(values.tolist()):
        start, end = end, end + len(list(group))
        runs.append((value, slice(start, end)))
    return runs
