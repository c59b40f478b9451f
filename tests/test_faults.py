"""The faults of docs/reliability.md, on the backends that run without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests import faults
from tests.conftest import make_batch


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("check", faults.CHECKS, ids=lambda check: check.__name__)
def test_fault(check: faults.Check, backend: str) -> None:
    check(backend, "cpu")


def test_a_lost_page_is_noticed() -> None:
    """The control: the checks above compare bits, and one byte of one page changes them."""
    batch = make_batch("int4", [100], backend="cpu")
    q = torch.randn(1, 8, 128)
    before = faults.attend(batch, q, [1], "cpu")
    batch.cache.pages[batch.block_table[0, 2], 1, 3, 5] ^= 0x10
    assert not torch.equal(faults.attend(batch, q, [1], "cpu"), before)
