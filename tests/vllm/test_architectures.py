"""Architectures with windows, soft-caps and sinks: sawkv's pages against vLLM's own attention, or a refusal by name.

`benchmarks/architectures.py` has the checks and all architectures; these are the ones whose attention differs most from
plain GQA.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.vllm.engine import REPOSITORY

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("name", "formats"), [("gemma-2-9b", ["plain", "int4"]), ("gpt-oss-20b", ["plain"])])
def test_pages_equal_vllms_own_attention_or_the_model_is_refused(name: str, formats: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.architectures", "--only", name, "--formats", *formats]
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "PASS" in done.stdout
