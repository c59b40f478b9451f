"""Architectures with windows, soft-caps, sinks and experts: sawkv's pages against vLLM's own attention, or a refusal by name.

`benchmarks/architectures.py` has the checks and all architectures; these are the ones whose attention differs from plain GQA.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.vllm.engine import REPOSITORY

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("names", [["gemma-2-9b"], ["glm-4.7"]])
def test_unquantized_pages_equal_vllms_own_attention_and_int4_is_near(names: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.architectures", "--only", *names]
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("PASS") == 2 * len(names)
