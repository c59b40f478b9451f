"""Counters that `append` updates on the device of the pages. docs/observability.md explains the numbers.

A counters tensor is [2, 6] fp64: one line for K and one for V, with the columns `COLUMNS`. Layers may share one.
"""

from __future__ import annotations

from typing import Final

import torch

from sawkv.format.constants import SAMPLE, SAMPLE_HASH

COLUMNS: Final = ("rows", "non_finite_rows", "saturated_rows", "squared_error", "squared_norm", "sampled_rows")
"""Rows written, a row being one token and KV head; rows that decode to NaN or infinity; rows whose scale is the largest
fp16, so that their error is not bounded. Over all other rows of sampled slots: the sum of |y - decoded|^2, the sum of
|y|^2, and the number of these rows. y is the row after centering, gain and rotation.
"""


def new_counters(device: torch.device | str) -> torch.Tensor:
    """Counters at zero: [2, 6] fp64 on `device`."""
    return torch.zeros(2, len(COLUMNS), dtype=torch.float64, device=device)


def is_sampled(slots: torch.Tensor) -> torch.Tensor:
    """Whether each slot is sampled: [num_slots] bool of [num_slots] int64.

    A slot is sampled if the low 32 bits of its hash are small. So no position of a sequence is preferred.
    """
    return ((slots * SAMPLE_HASH) & 0xFFFFFFFF) < 2**32 // SAMPLE
