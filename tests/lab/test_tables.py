"""The accuracy page's tables and records: cells replaced, ratios right, the page changed between its marks alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import accuracy, accuracy_tables


def record(method: str, mean_kl: float, bits: float = 4.25, stress: int = 1) -> dict[str, object]:
    shared = {"kl_se": 0.001, "kl_p999": 0.5, "kl_max": 1.0, "same_top1": 0.9, "ppl": 5.0, "passkey": None}
    return {"model": "m", "stress": stress, "method": method, "bits": bits, "mean_kl": mean_kl, **shared}


def test_new_lines_replace_those_of_their_cell(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "a.jsonl"
    accuracy.add_lines(file, [record("x", 1.0), record("y", 2.0)])
    accuracy.add_lines(file, [record("x", 3.0), record("x", 4.0, stress=4)])
    stored = [(r["method"], r["stress"], r["mean_kl"]) for r in map(json.loads, file.read_text().splitlines())]
    assert stored == [("y", 1, 2.0), ("x", 1, 3.0), ("x", 4, 4.0)]


def test_page_gets_the_tables_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        record("default", 0.02),
        record("vllm_int4_per_token_head", 0.04),
        record("reference", 0.0, 16.0),
        record("best", 0.01, 4.125),
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, record("fp8", 0.001, 8.0)]))
    page = tmp_path / "page.md"
    page.write_text(f"above\n{accuracy_tables.BEGIN}\nold\n{accuracy_tables.END}\nbelow\n")
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "a.jsonl"), "--write", str(page)])
    accuracy_tables.main()
    written = page.read_text()
    assert written.startswith("above\n")
    assert written.endswith("\nbelow\n")
    assert "old" not in written
    assert "| m s=1 | 0.0200 | 0.0400 | 0.50 | best | 0.0100 | 2.00 | -, -, - |" in written
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="expected the marks"):
        accuracy_tables.main()
