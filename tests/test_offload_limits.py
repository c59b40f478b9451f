"""`benchmarks.offload` fails where a limit is broken, and where nothing came from host memory. What other benchmarks of
pages that leave the engine take for a fault.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from benchmarks import disaggregation, offload, soak
from benchmarks.offload import check
from sawkv import CacheFormat

RECORD = {
    "prefixes": 2,
    "whole": 512,
    "cached": [512, 512],
    "kv_tokens": 600,
    "computed_s": 1.0,
    "restored_s": 0.3,
}
BF16 = RECORD | {"format": "bf16", "page_bytes_per_token": 5243.0, "load_bytes_per_token": 5120.0, "restored_s": 0.9}
INT4 = RECORD | {"format": "int4-k128-v128", "page_bytes_per_token": 1360.0, "load_bytes_per_token": 1360.0}


def test_what_is_within_the_limits_passes() -> None:
    assert check([BF16, INT4]) == []
    assert check([INT4]) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cached": [512, 480]}, "expected 2 prefixes back, of 512 tokens"),
        ({"cached": [512]}, "expected 2 prefixes back"),
        ({"load_bytes_per_token": 680.0}, "expected 1,360 bytes per token from host memory, got 680: the GPU's cache"),
        ({"restored_s": 0.36}, "at most 0.35 of the time to compute, got 0.360"),
        ({"load_bytes_per_token": 1440.0}, "at most 0.28 of 16 bits' bytes, got 0.28125"),
    ],
)
def test_what_breaks_a_limit_is_said(changes: dict[str, Any], said: str) -> None:
    (fault,) = check([BF16, INT4 | changes])
    assert said in fault


def test_counters_are_read_under_either_name_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    with pytest.raises(SystemExit, match="expected the metric vllm:kv_offload_load_time"):
        offload._counter("kv_offload_load_time")
    older = prometheus_client.Counter("vllm:kv_offload_total_time", "", ["transfer_type"], registry=registry)
    older.labels("GPU_to_CPU").inc(5)
    older.labels("CPU_to_GPU").inc(0.25)
    assert offload._counter("kv_offload_load_time") == 0.25
    prometheus_client.Counter("vllm:kv_offload_load_time", "", registry=registry).inc(0.75)
    assert offload._counter("kv_offload_load_time") == 0.75


def test_the_soaks_arguments_are_its_load_and_the_servers_options() -> None:
    load, log = soak.read_arguments(["model", "--offload", "folder", "--server-log", "log", "--enforce-eager"])
    assert load.cache_format == CacheFormat("int4")
    assert log == Path("log")
    option, connector, *rest = load.server_options()
    assert option == "--kv-transfer-config"
    assert '"root_dir": "folder"' in connector
    assert rest == ["--enforce-eager"]
    assert soak.read_arguments(["model"])[0].server_options() == []


EQUAL = {"expected": [1, 2], "answer": [1, 2], "finish": "length", "offered": disaggregation.PROMPT, "refusal": ""}
REFUSED = EQUAL | {"answer": [], "finish": "error", "refusal": "Local: a sawkv b, Remote: a sawkv c"}


@pytest.mark.parametrize(
    ("case", "found", "good"),
    [
        ("equal", EQUAL, True),
        ("equal", EQUAL | {"answer": [1, 3]}, False),
        ("equal", EQUAL | {"offered": 0}, False),
        ("format", REFUSED, True),
        ("format", EQUAL, False),
        ("format", REFUSED | {"refusal": "Local: a, Remote: a"}, False),
        ("control", EQUAL | {"answer": [1, 3]}, True),
        ("control", EQUAL, False),
        ("control", REFUSED, False),
    ],
)
def test_what_is_not_as_a_case_expects_is_a_fault(case: str, found: dict[str, Any], good: bool) -> None:
    assert (disaggregation.check(case, found) is None) == good
