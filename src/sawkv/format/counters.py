"""What `append` counts of the rows that it writes, on the device of the pages. docs/observability.md says what the
numbers mean.

A counters tensor is [2, 6] fp64: one line for K and one for V, with the columns of `COLUMNS`. Layers may share one.
"""

from __future__ import annotations

from typing import Final

import torch

from sawkv.format.constants import SAMPLE, SAMPLE_HASH

COLUMNS: Final = ("rows", "non_finite_rows", "saturated_rows", "squared_error", "squared_norm", "sampled_rows")
"""Rows (of one token and KV head) written; those that decode to NaN or infinity; those whose scale is the largest fp16,
so that their error is not bounded; and over all other rows of sampled slots the sums of (y - decoded)^2 and of y^2, y
being the row after centering, gain and rotation, and how many rows these are.
"""


def new_counters(device: torch.device | str) -> torch.Tensor:
    """Counters at zero: [2, 6] fp64 on `device`."""
    return torch.zeros(2, len(COLUMNS), dtype=torch.float64, device=device)


def is_sampled(slots: torch.Tensor) -> torch.Tensor:
    """Whether each slot is sampled: [num_slots] bool of [num_slots] int64.

    A slot is sampled if the low 32 bits of its hash are small. So no position of a sequence is preferred.
    """
    return ((slots * SAMPLE_HASH) & 0xFFFFFFFF) < 2**32 // SAMPLE
