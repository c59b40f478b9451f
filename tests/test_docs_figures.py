"""Figures in the documentation: tables are those of the records, and prose repeats no measured ratio that no table
holds.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import docs_tables, fidelity_tables
from benchmarks.plots import RESULTS, read_records
from sawkv.page import svg

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/lab/methods.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
RATIO = re.compile(r"(?<![\w.^*])\d+\.\d+x(?!\w)")
"""A speed-up or a saving, such as 2.13x."""


def prose_and_tables(page: str) -> tuple[str, str]:
    """A page's text outside of tables and code, and its tables."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    lines = text.splitlines()
    return "\n".join(line for line in lines if not line.startswith("|")), "\n".join(
        line for line in lines if line.startswith("|")
    )


def unfounded(prose: str, tables: str) -> list[str]:
    """Ratios of the prose that stand in none of the tables."""
    held = set(RATIO.findall(tables))
    return [ratio for ratio in RATIO.findall(prose) if ratio not in held]


@pytest.mark.parametrize("page", docs_tables.PAGES)
def test_marked_tables_are_those_of_the_records(page: str) -> None:
    text = (ROOT / page).read_text()
    assert docs_tables.MARKED.search(text), "the page has lost its marks"
    assert text == docs_tables.filled(text), "run python -m benchmarks.docs_tables"


def test_a_changed_figure_is_noticed() -> None:
    """The control."""
    text = (ROOT / "README.md").read_text()
    table = docs_tables.MARKED.search(text)
    assert table is not None
    figure = RATIO.search(text, table.start())
    assert figure is not None
    changed = f"{text[: figure.start()]}9.99x{text[figure.end() :]}"
    assert docs_tables.filled(changed) != changed


def test_accuracy_tables_are_those_of_the_records() -> None:
    page = (ROOT / "docs/accuracy.md").read_text()
    recall = fidelity_tables.read(RESULTS / "real_recall.jsonl")
    real = fidelity_tables.read(RESULTS / "real_models.jsonl")
    assert fidelity_tables.tables(real, recall) in page
    assert (ROOT / "docs" / fidelity_tables.PICTURE).read_text() == svg.standalone(fidelity_tables.curves(real))


@pytest.mark.parametrize("page", PAGES)
def test_prose_repeats_only_ratios_that_a_table_holds(page: str) -> None:
    prose, _ = prose_and_tables((ROOT / page).read_text())
    tables = "\n".join(prose_and_tables((ROOT / other).read_text())[1] for other in PAGES)
    assert unfounded(prose, tables) == [], "a measured ratio needs a table of docs/results behind it"


def test_an_invented_ratio_is_noticed() -> None:
    """The control."""
    assert unfounded("serves 2.13x and 9.87x of it, at 4.25 bits", "| a | 1,255 (2.13x) |") == ["9.87x"]


def test_claims_of_the_accuracy_page_follow_from_the_records() -> None:
    records = read_records(RESULTS / "real_models.jsonl")
    served = {
        (r["model"].split("-")[0].split(" ")[0], r["text"], r["method"]): r
        for r in records
        if r["through"] == "server" and r["window"] == 512
    }

    def ratio(model: str, text: str, peer: str) -> float:
        return float(served[model, text, "served"]["mean_kl"]) / float(served[model, text, peer]["mean_kl"])

    for text in ("prose", "python"):
        assert ratio("Qwen2.5", text, "fp8") < 1  # less than fp8 on the model with biased keys
        assert 1 < ratio("SmolLM2", text, "fp8") <= 1.75  # more on the others, up to 1.7 times
        assert 1 < ratio("Gemma", text, "fp8") <= 1.75
        assert ratio("SmolLM2", text, "vllm_int4_per_token_head") == pytest.approx(1 / 3, abs=0.02)
        assert ratio("Qwen2.5", text, "vllm_int4_per_token_head") < 0.015
    for found in fidelity_tables.comparable(records).values():
        formats, rivals = ([r for r in found if fidelity_tables.ours(r["method"]) == own] for own in (True, False))
        for rival in rivals:  # each is beaten by a format of at most as many bits
            if rival["method"] != "fp8":
                assert any(r["bits"] <= rival["bits"] and r["mean_kl"] < rival["mean_kl"] for r in formats), rival
    ours = [r for (_, _, method), r in served.items() if method == "served"]
    assert len(ours) == 6
    assert all(r["ppl"] <= 1.03 * r["ppl_16bit"] for r in ours)


def test_accuracy_is_compared_within_one_place_and_sample_only() -> None:
    """The picture takes the place with the most caches. Limits leave out records of other windows."""
    shared = {"model": "M-Instruct", "text": "prose", "window": 512, "bits": 4.5, "mean_kl": 0.5, "ppl": 1.0}
    served = {
        **shared,
        **{"method": "served", "through": "server", "device": "G", "tokens": 1022, "kl_by_window": [0.4, 0.6]},
        **{"ppl_16bit": 1.0, "ppl_ratio_ci95": [1.0, 1.0]},
    }
    small = {**shared, "through": "lab", "device": "C", "tokens": 511, "kl_by_window": [0.1]}
    records = [served, *({**small, "method": name} for name in ("prepared", "fp8"))]
    assert fidelity_tables.comparable(records) == {"M-Instruct": records[1:]}
    drawing = fidelity_tables.curves([*records, {**small, "method": "unprepared", "bits": 4.0, "mean_kl": 0.123}])
    assert all(f">{name}<" in drawing for name in ("M-Instruct", "int4", "vLLM&#x27;s fp8")), "a point of each"
    assert "0.123" not in drawing
    assert [what for _, what in fidelity_tables.checks(records) if "KL" in what] == []
    alike = {**small, "method": "prepared", "tokens": 1022, "kl_by_window": [0.4, 0.6]}
    assert [passed for passed, what in fidelity_tables.checks([served, alike]) if "KL" in what] == [True]
