"""docs/performance.md: made of records, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import plots
from benchmarks.engines import recorded_name
from sawkv.page import svg

PAGE = "".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in plots.SECTIONS)

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
    assert "|" not in plots.filled(PAGE, tmp_path)


def test_ratios_are_to_the_same_device_version_and_load_and_the_last_record_counts(tmp_path: Path) -> None:
    records = [
        SERVED | {"format": "bf16", "output_tok_s": 1.0},
        SERVED | {"format": "bf16"},
        SERVED | {"format": "int4", "output_tok_s": 190.0, "kv_tokens": 3760},
        SERVED | {"format": "int4", "output_tok_s": 7.0, "shared_prefix": 64},
        SERVED | {"format": "int4", "output_tok_s": 5.0, "device": "card B"},
        SERVED | {"format": "int4", "output_tok_s": 6.0, "vllm": "0.2"},
    ]
    (tmp_path / "serving.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = plots.filled(PAGE, tmp_path).splitlines()
    assert "| 96/8 x 4 | bf16 | 100 | 1,000 | 2.00 | 3.00 |  |  | 1,000 | abc |" in lines
    assert (
        "| 96/8 x 4 | int4 | 190 (1.90x) | 1,000 (1.00x) | 2.00 (1.00x) | 3.00 (1.00x) |  |  | 3,760 (3.76x) | abc |"
        in lines
    )
    assert "| 64+32/8 x 4 | int4 | 7 | 1,000 | 2.00 | 3.00 |  |  | 1,000 | abc |" in lines
    assert "| 96/8 x 4 | int4 | 5 | 1,000 | 2.00 | 3.00 |  |  | 1,000 | abc |" in lines
    assert "| 96/8 x 4 | int4 | 6 | 1,000 | 2.00 | 3.00 |  |  | 1,000 | abc |" in lines
    titles = [line for line in lines if line.startswith("m in vLLM")]
    assert titles == ["m in vLLM 0.1 on card A", "m in vLLM 0.1 on card B", "m in vLLM 0.2 on card A"]


AGENTS = {
    **{name: SERVED[name] for name in ("device", "commit", "vllm", "model")},
    **{"output_tok_s": 100.0, "ttft_p50_s": 2.0, "late_ttft_p50_s": 4.0, "tpot_p50_ms": 50.0, "hit_rate": 0.25},
    **{"computed_tok_s": 9000.0, "preemptions": 0, "kv_tokens": 1000, "ttft_by_turn_s": [1.0, 2.0, 4.0]},
    "work": {"agents": 4, "grow_to": 512, "turns": 3},
}


def test_agents_have_a_row_for_each_set_and_a_picture_of_the_largest(tmp_path: Path) -> None:
    small = AGENTS | {"format": "fp8", "work": {"agents": 2, "grow_to": 512, "turns": 3}}
    unprepared = AGENTS | {"format": recorded_name("int4", no_prepare=True), "output_tok_s": 320.0}
    fp8 = AGENTS | {"format": recorded_name("fp8", no_prepare=True)}
    records = [fp8, AGENTS | {"format": "int4", "output_tok_s": 310.0, "hit_rate": 0.75}, unprepared, small]
    (tmp_path / "agents.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = plots.filled(PAGE, tmp_path)
    row = "| 4 x 512 in 3 turns | int4 | 310 (3.10x) | 2.00 (1.00x) | 4.00 (1.00x) | 50.0 (1.00x) | 75.0% (3.00x) |"
    assert row in page
    assert "| 2 x 512 in 3 turns | fp8 | 100 |" in page
    assert "| 4 x 512 in 3 turns | int4, unprepared | 320 (3.20x) |" in page
    assert "(agents.svg)" in page
    drawing = plots.plot_agents(records)
    assert "turn of 4 x 512 in 3 turns" in drawing
    assert all(f">{name}<" in drawing for name in ("fp8", "int4"))


def test_the_page_is_that_of_the_records() -> None:
    page = (plots.DOCS / "performance.md").read_text()
    assert page == plots.filled(page, plots.RESULTS), "docs/results has changed: run python -m benchmarks.plots"


def test_a_page_without_a_mark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected the marks <!-- decode.jsonl -->"):
        plots.filled(PAGE.replace("<!-- end of decode.jsonl -->", ""), tmp_path)


DRAWN = [
    name for name, (*_, plot, _) in plots.SECTIONS.items() if plot is not None and (plots.RESULTS / name).is_file()
]


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_are_those_of_the_records_and_serve_light_and_dark(name: str) -> None:
    _, _, plot, picture = plots.SECTIONS[name]
    assert plot is not None
    text = (plots.DOCS / picture).read_text()
    assert text == svg.standalone(plot(plots.read_records(plots.RESULTS / name))), "run python -m benchmarks.plots"
    drawing = ElementTree.fromstring(text)
    assert "prefers-color-scheme: dark" in text
    marks = [element for element in drawing.iter() if element.tag.endswith(("rect", "circle"))]
    assert len(marks) > 8, "a plot without marks is no plot"
    assert not any(element.tag.endswith("rect") and element.get("width") == "100%" for element in drawing.iter()), (
        "a ground hides the page"
    )
    tilted = [
        element
        for element in drawing.iter()
        if "rotate" in element.get("transform", "") and element.get("class") != "axis"
    ]
    assert tilted == []
    width, height = (float(drawing.get(side) or 0) for side in ("width", "height"))
    for element in drawing.iter():
        for side, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(element.get(side) or 0) <= limit
