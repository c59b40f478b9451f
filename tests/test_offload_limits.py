"""`benchmarks.offload` fails where a limit is broken, and where nothing came from host memory."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.offload import check

RECORD = {
    "prefixes": 2,
    "whole": 512,
    "cached": [512, 512],
    "external_hits": 1024.0,
    "kv_tokens": 600,
    "computed_s": 1.0,
    "restored_s": 0.3,
}
BF16 = RECORD | {"format": "bf16", "load_bytes_per_token": 5120.0, "restored_s": 0.9}
INT4 = RECORD | {"format": "int4-k128-v128", "load_bytes_per_token": 1360.0}


def test_what_is_within_the_limits_passes() -> None:
    assert check([BF16, INT4]) == []
    assert check([INT4]) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cached": [512, 480]}, "expected 2 prefixes back, of 512 tokens"),
        ({"cached": [512]}, "expected 2 prefixes back"),
        ({"external_hits": 512.0}, "expected 1,024 tokens from host memory, got 512: the GPU's cache holds 600"),
        ({"restored_s": 0.36}, "at most 0.35 of the time to compute, got 0.360"),
        ({"load_bytes_per_token": 1440.0}, "at most 0.28 of 16 bits' bytes, got 0.28125"),
    ],
)
def test_what_breaks_a_limit_is_said(changes: dict[str, Any], said: str) -> None:
    (fault,) = check([BF16, INT4 | changes])
    assert said in fault
