"""docs/models.md is what its records say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.architectures import Task, record_of
from benchmarks.families import FAMILIES
from benchmarks.models import RECORDS, page


def test_the_page_is_made_of_the_records() -> None:
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    assert Path(RECORDS.parents[1], "models.md").read_text() == page(records)
    assert all(record["expected"] for record in records)
    assert {record["family"] for record in records} <= set(FAMILIES)


def test_a_family_without_a_record_is_said_not_to_have_run_and_a_wrong_one_to_be_wrong() -> None:
    common = {
        "engine": "vllm",
        "device": "cpu",
        "checks": {},
        "vllm": "1",
        "transformers": "1",
        "commit": "abc",
        "failed": [],
    }
    wrong = common | {"family": "llama-3", "outcome": "served wrong", "detail": "", "failed": ["plain"]}
    rows = {line.split("`")[1]: line for line in page([wrong]).splitlines() if line.startswith("| ") and "`" in line}
    assert set(rows) == set(FAMILIES)
    assert rows["llama-3"].endswith("| d128/kv2 | **wrong**: plain |"), "other engines and devices have no column"
    assert rows["qwen3"].endswith("| d128/kv2 | not run |")


def test_a_process_that_died_on_a_gpu_is_a_row_of_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    died = {"outcome": "served wrong", "checks": {}, "failed": ["process"], "detail": "the process died: -11"}
    record = record_of(Task("qwen3", "vllm", ("int4",)), died, gpu=True)
    assert record["device"] == "NVIDIA H200"
    assert not record["expected"]
    assert "| d128/kv2 | **wrong**: process |" in page([record])
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    assert re.search(r"\| served: [^|]* \| \*\*wrong\*\*: process \| served: ", page([*records, record]))
