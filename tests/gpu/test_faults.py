"""The faults of docs/reliability.md on a GPU: `pytest -m gpu tests/gpu`. With SAWKV_DRY_RUN=1, on the CPU backend
instead.
"""

from __future__ import annotations

import os

import pytest
import torch

from sawkv import CacheFormat, PageLayout
from sawkv.kernels import unsupported_reason
from tests import faults

pytestmark = pytest.mark.gpu

DRY_RUN = bool(os.environ.get("SAWKV_DRY_RUN"))
DEVICE = "cpu" if DRY_RUN else "cuda"


@pytest.mark.parametrize("backend", ["cpu"] if DRY_RUN else ["cuda", "triton"])
@pytest.mark.parametrize("check", faults.CHECKS, ids=lambda check: check.__name__)
def test_fault(check: faults.Check, backend: str) -> None:
    if not DRY_RUN and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = unsupported_reason(
        backend, torch.device(DEVICE, 0 if DEVICE == "cuda" else None), PageLayout(CacheFormat("int4"), 2, 128, 16)
    )
    if reason is not None:
        pytest.skip(reason)
    check(backend, DEVICE)
