"""How an attention layer turns its keys with their position, measured on the layer itself.

RoPE (arXiv 2104.09864) turns pairs of channels: pair i of a key at position p is turned by p * angle_i. So the static
part of keys has a direction at each position. Models differ in which channels are pairs and in the angles, also between
layers. Both show in the keys: if every token of a text stands P positions later, each key is turned by P * angle_i, and
nothing else changes. So a short text is read at position 0 and at a few later ones, its *probes*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from sawkv.format.constants import BUCKET_SIZE

MAX_BUCKETS: Final = 128
"""Most buckets, of 262,144 positions. Some models claim ten million positions, whose centers would take a gigabyte."""
PROBE_TOKENS: Final = 32
"""Tokens of a probe."""
SHIFTS: Final = (1, 8, 64, 512, 4096, 32768)
"""Positions by which probes are shifted. The angle after one shift tells how many whole turns the next one holds."""
EXPLAINED: Final = 0.99
"""Least share of the keys' energy that must follow the angles at every shift. In bf16 real models have 0.999."""


@dataclass(frozen=True)
class Turning:
    """Pairs of channels and their angles.

    Attributes:
        pairs: [head_dim / 2, 2] int64, channels that turn together; each channel is in one pair.
        angles: [head_dim / 2] fp64, radians per position; 0 where a pair does not turn.
    """

    pairs: torch.Tensor
    angles: torch.Tensor

    @classmethod
    def none(cls, head_dim: int, device: torch.device | str) -> Turning:
        """That of keys that do not turn."""
        pairs = torch.arange(head_dim, device=device).view(-1, 2)
        return cls(pairs, torch.zeros(len(pairs), dtype=torch.float64, device=device))

    def turn(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turn rows [num_tokens, num_kv_heads, head_dim] by positions [num_tokens]; negative ones turn back."""
        phase = positions.to(self.angles.device, torch.float64)[:, None, None] * self.angles
        return self._apply(rows, phase.cos(), phase.sin())

    def bucket_means(self, rows: torch.Tensor, num_buckets: int) -> torch.Tensor:
        """Mean of rows [num_kv_heads, head_dim] turned to each position of each bucket: [num_buckets, num_kv_heads,
        head_dim].
        """
        phase = torch.arange(BUCKET_SIZE, device=rows.device)[:, None] * self.angles
        first = self._apply(rows, phase.cos().mean(0), phase.sin().mean(0))
        return self.turn(first.expand(num_buckets, -1, -1), BUCKET_SIZE * torch.arange(num_buckets))

    def _apply(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = rows[..., self.pairs[:, 0]].double(), rows[..., self.pairs[:, 1]].double()
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
        return turned.flatten(-2)[..., self.pairs.flatten().argsort()]


def buckets_in(context: int) -> int:
    """Buckets of `BUCKET_SIZE` positions in a context, from 1 to `MAX_BUCKETS`. The last one holds all later ones."""
    return max(1, min(-(-context // BUCKET_SIZE), MAX_BUCKETS))


def bucketed_context(config: object, context: int) -> int:
    """The positions of a context that get buckets: all, or 0 under M-RoPE (arXiv 2409.12191), where an image shifts the
    positions of what follows from its places in the sequence, by which buckets go.

    Args:
        config: a Transformers configuration, of the text model.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return 0 if any("rope_section" in name for part in parts for name in part) else context


def find_turning(probes: Sequence[torch.Tensor]) -> Turning | None:
    """The turning of one layer, or None if its keys do not turn as RoPE's do.

    Args:
        probes: keys [num_tokens, num_kv_heads, head_dim] of the same tokens: from position 0 on, then shifted by
            those of `SHIFTS` that the model's context holds.
    """
    start, shifted = probes[0].double(), [k.double() for k in probes[1:]]
    found = [_explain(start, shifted, pairs) for pairs in _pairings(start.shape[-1], start.device)]
    turning, share = max(found, key=lambda entry: entry[1])
    return turning if share >= EXPLAINED else None


def _pairings(head_dim: int, device: torch.device) -> list[torch.Tensor]:
    """Pairs that models use: neighbours, or a channel of the first half of the channels that turn and one of the second
    half. Channels that do not turn are paired as neighbours.
    """
    found = [torch.arange(head_dim, device=device).view(-1, 2)]
    for turned in sorted({*range(head_dim, 0, -16), *range(head_dim, 0, -max(2, head_dim // 8))}, reverse=True):
        half, rest = torch.arange(turned // 2, device=device), torch.arange(turned // 2 * 2, head_dim, device=device)
        found.append(torch.cat([torch.stack([half, half + turned // 2], 1), rest.view(-1, 2)]))
    return found


def _explain(start: torch.Tensor, shifted: Sequence[torch.Tensor], pairs: torch.Tensor) -> tuple[Turning, float]:
    """The angles of pairs, and the least share over the shifts of the keys' energy that follows them."""

    def rows(x: torch.Tensor) -> torch.Tensor:
        return torch.complex(x[..., pairs[:, 0]], x[..., pairs[:, 1]]).flatten(0, 1)

    before, afters = rows(start), [rows(keys) for keys in shifted]
    products = torch.stack([(before.conj() * after).sum(0) for after in afters])
    angles = torch.zeros(len(pairs), dtype=torch.float64, device=start.device)
    for shift, product in zip(SHIFTS, products, strict=False):
        turns = ((angles * shift - product.angle()) / (2 * math.pi)).round()
        angles = (product.angle() + 2 * math.pi * turns) / shift
    phases = torch.tensor(SHIFTS[: len(afters)], device=start.device)[:, None] * angles
    explained = (products * torch.polar(torch.ones_like(phases), -phases)).real.sum(1)
    energies = torch.stack([(before.abs().square().sum() * after.abs().square().sum()).sqrt() for after in afters])
    return Turning(pairs, angles), float((explained / energies).min())
