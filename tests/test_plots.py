"""docs/performance.md: made of records, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import plots

SERVED: dict[str, Any] = {
    "device": "card A",
    "commit": "abc",
    "vllm": "0.1",
    "model": "m",
    "inp": 96,
    "out": 8,
    "requests": 4,
    "output_tok_s": 100.0,
    "prefill_tok_s": 1000.0,
    "ttft_mean_s": 2.0,
    "ttft_p99_s": 3.0,
    "tpot_p50_ms": None,
    "tpot_p99_ms": None,
    "kv_tokens": 1000,
}


def test_no_record_no_table(tmp_path: Path) -> None:
    assert "|" not in plots.page(tmp_path)


def test_ratios_are_to_the_same_device_and_load_and_the_last_record_counts(tmp_path: Path) -> None:
    records = [
        SERVED | {"format": "bf16", "output_tok_s": 1.0},
        SERVED | {"format": "bf16"},
        SERVED | {"format": "int4", "output_tok_s": 190.0, "kv_tokens": 3760},
        SERVED | {"format": "int4", "output_tok_s": 7.0, "shared_prefix": 64},
        SERVED | {"format": "int4", "output_tok_s": 5.0, "device": "card B"},
    ]
    (tmp_path / "serving.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = plots.page(tmp_path).splitlines()
    assert "| 96/8 x 4 | bf16 | 100 | 1,000 | 2.00 | 3.00 |  |  | 1,000 | abc |" in lines
    assert "| 96/8 x 4 | int4 | 190 (1.90x) | 1,000 (1.00x) | 2.00 (1.00x) | 3.00 (1.00x) |  |  | 3,760 (3.76x) | abc |" in lines
    assert "| 64+32/8 x 4 | int4 | 7 | 1,000 | 2.00 | 3.00 |  |  | 1,000 | abc |" in lines
    assert "| 96/8 x 4 | int4 | 5 | 1,000 | 2.00 | 3.00 |  |  | 1,000 | abc |" in lines
    assert lines.index("m on card A, vLLM 0.1") < lines.index("m on card B, vLLM 0.1")


def test_the_page_is_that_of_the_records() -> None:
    page = (plots.DOCS / "performance.md").read_text()
    assert page == plots.page(plots.RESULTS), "docs/results has changed: run python -m benchmarks.plots"
