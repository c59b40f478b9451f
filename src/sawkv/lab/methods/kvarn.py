"""KVarN: tiles of 128 tokens whose tokens and channels get equal deviations before they are rounded. A comparison.

A head's tile of rotated rows is divided by a scale per token and a scale per channel, until the standard deviations of
tokens and of channels are as equal as 16 turns make them. K is then rounded per channel and V per token, between the
smallest and the largest value. The first 128 tokens and those of the last, incomplete tile stay in 16 bits (`Kept`).
Source: KVarN, arXiv 2606.03458, and github.com/huawei-csl/KVarN, whose preset `kvarn_k4v2_g128` has K of 4 bits and V
of 2. Not token-wise: the scales of a tile are known when its last token is. Here a query that reads a tile from its
codes reads those of the whole tile, so `kvarn_codes` looks ahead by up to 127 tokens; `kvarn` does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.format.rotation import rotate
from sawkv.lab.methods.integer import nearest
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Kept, Reader

TILE = 128
TURNS = 16
LOG_SCALES = (-0.3, 10.0)
DEVIATIONS = (1e-3, 1e3)
KEPT = Kept(first=TILE, tile=TILE)


@dataclass(frozen=True)
class KVarN:
    """Tiles of one head.

    Attributes:
        bits_per_code: bits per code.
        by_channel: whether each channel of a tile has a range (K), or each token (V).
    """

    bits_per_code: int
    by_channel: bool

    def bits(self, head_dim: int) -> float:
        one, two = (TILE, head_dim) if self.by_channel else (head_dim, TILE)
        return self.bits_per_code + 32 / one + 16 / two

    def fit(self, sample: Sample) -> Reader:
        order = sample.head_dim & -sample.head_dim

        def read(rows: torch.Tensor) -> torch.Tensor:
            return rotate(torch.cat([self._through(tile) for tile in torch.split(rotate(rows, order), TILE)]), order)

        return read

    def _through(self, tile: torch.Tensor) -> torch.Tensor:
        """A tile [num_tokens, num_kv_heads, head_dim] as it is read back."""
        there, back = ((1, 2, 0), (2, 0, 1)) if self.by_channel else ((1, 0, 2), (1, 0, 2))
        tile = tile.permute(there)
        columns, lines = equal_deviations(tile)
        coded = nearest(tile / columns / lines, self.bits_per_code) * lines * columns.half().float()
        return coded.permute(back)


def equal_deviations(tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [num_heads, 1, num_columns] and [num_heads, num_lines, 1] by which a tile [num_heads, num_lines,
    num_columns] is divided: of all turns, those after which deviations are the most equal.
    """
    log_columns, log_lines = tile.new_zeros(len(tile), 1, tile.shape[2]), tile.new_zeros(len(tile), tile.shape[1], 1)
    even, best = tile, (log_columns, log_lines)
    least = _inequality(tile)
    for _ in range(TURNS):
        log_columns = (log_columns + _deviation(even, -2).log()).clamp(*LOG_SCALES)
        even = tile / (log_columns + log_lines).exp()
        log_lines = (log_lines + _deviation(even, -1).log()).clamp(*LOG_SCALES)
        even = tile / (log_columns + log_lines).exp()
        inequality = _inequality(even)
        better = inequality <= least
        least = inequality.where(better, least)
        best = (log_columns.where(better, best[0]), log_lines.where(better, best[1]))
    return best[0].exp(), best[1].exp()


def _deviation(tile: torch.Tensor, axis: int) -> torch.Tensor:
    # That of a single value is not a number.
    return tile.std(axis, keepdim=True).nan_to_num(1.0).clamp(*DEVIATIONS)


def _inequality(tile: torch.Tensor) -> torch.Tensor:
    """[num_heads, 1, 1]: the largest deviation over the smallest, of columns and of lines."""
    sides = (tile.std(axis).nan_to_num(1.0) for axis in (-2, -1))
    ratios = [side.amax(-1) / side.amin(-1).clamp_min(1e-8) for side in sides]
    return (ratios[0] + ratios[1])[:, None, None]
