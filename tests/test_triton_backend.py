"""The Triton backend without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sawkv import CacheFormat, PageLayout
from sawkv.kernels import unsupported_reason

ROOT = Path(__file__).parents[1]


def test_the_kernels_in_the_interpreter() -> None:
    """In a process of their own: the variable is read when they are imported."""
    pytest.importorskip("triton", minversion="3.9")  # earlier interpreters round fma twice
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_in_interpreter.py"]
    run = subprocess.run(
        command, check=False, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_reasons_not_to_be_chosen() -> None:
    def reason(codec: str, head_dim: int) -> str | None:
        return unsupported_reason("triton", torch.device("cpu"), PageLayout(CacheFormat(codec), 1, head_dim, 16))

    assert reason("int4", 128) == "expected an NVIDIA GPU, got cpu"
    assert reason("int4", 48) == "expected head_dim from 64, got 48"
    assert reason("fp32", 128) == "expected int4, int3, int2, int4v3, int4v2, int3v2, int8, bf16, fp16, got fp32"
