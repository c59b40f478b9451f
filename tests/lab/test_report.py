"""The HTML report: every number of the records is in it, it is well-formed, and it asks for nothing from outside."""

from __future__ import annotations

import base64
import csv
import functools
import io
import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from msgspec.structs import replace

from sawkv import SawkvError, cli
from sawkv.lab import report
from sawkv.lab.analysis import Analysis
from sawkv.lab.records import (
    Divergence,
    Evaluation,
    Fork,
    FreeRun,
    LayerKL,
    MethodResult,
    PositionKL,
    Recall,
    Surprise,
)
from sawkv.lab.report.verdict import verdict
from sawkv.lab.table import table
from sawkv.page import Cell, Column, Table, digits, svg
from sawkv.records import AttentionShape
from tests.lab.test_analyze import run

VOID = {"meta", "link", "br", "hr", "img", "input"}
METHODS = {
    "prepared": 4.25,
    "fp8": 8.0,
    "int4_plain": 4.25,
    "kmeans_rotated": 4.25,
    "vllm_int4_per_token_head": 4.25,
    "svd_int8": 4.5,
}


def make_result(method: str, bits: float, kl: float, correct: int = 9) -> MethodResult:
    return MethodResult(
        method=method,
        bits=bits,
        served="sawkv" if bits == 4.25 else "",
        calibrated=False,
        divergence=Divergence(4096, kl, kl / 20, 20 * kl, 90 * kl, 0.9, 5.5),
        by_position=tuple(PositionKL(start, end, kl, kl / 9) for start, end in ((0, 16), (16, 64), (64, 255))),
        by_layer=tuple(LayerKL(layer, kl / 3, kl / 30) for layer in range(3)),
        recall=tuple(
            Recall(task, length, depth, correct, 10)
            for task in ("passkey", "needle")
            for length in (512, 2048)
            for depth in (0.0, 0.5, 1.0)
        ),
        free_run=FreeRun(64, (3, 64)),
        excerpt_kl=(0.0, kl, 50 * kl),
        worst=(Surprise(0, 7, 90 * kl, "the text <before>", " then", " expected", 0.5, " chosen", 0.25),),
        forks=(Fork(0, 3, "a common end", "as the model goes on", "as the cache goes on"),),
    )


def make_evaluation(model: str = "a-model", stress: int = 1) -> Evaluation:
    floor = replace(make_result("bf16_floor", 16.0, 2e-5), by_layer=(), recall=(), free_run=None)
    results = (floor, *(make_result(name, bits, 0.01 * (i + 1)) for i, (name, bits) in enumerate(METHODS.items())))
    reference = replace(make_result("reference", 32.0, 0.0, correct=10), by_position=(), by_layer=(), free_run=None)
    return Evaluation(
        model,
        AttentionShape(3, 4, 2, 128),
        "a cpu",
        "float32",
        "held-out",
        256,
        stress,
        reference,
        results,
        12.0,
        {"sawkv": "0.1.0"},
        excerpt=("of ", "<the> ", "excerpt"),
        command="sawkv eval a-model --tokens 4096",
    )


def test_the_noise_floor_is_explained_where_it_stands() -> None:
    evaluation = make_evaluation()
    said = "\nbf16_floor: what 16-bit arithmetic alone changes; its cache is not quantized\n"
    assert said in table(evaluation)
    assert said not in table(replace(evaluation, results=evaluation.results[1:]))


def test_perplexities_side_by_side_are_of_one_text() -> None:
    """The noise of 16 bits is often measured on less: its perplexity would look like a gain."""
    evaluation = make_evaluation()
    floor, *others = evaluation.results
    short = replace(floor, divergence=replace(floor.divergence, tokens=1024))
    less = replace(evaluation, results=(short, *others))
    assert table(evaluation).count("5.500") == len(METHODS) + 2
    assert table(less).count("5.500") == len(METHODS) + 1
    assert render([less], []).count(">5.500<") == render([evaluation], []).count(">5.500<") - 1


def render(evaluations: list[Evaluation], analyses: list[Analysis]) -> str:
    return report.make_page([(f"{i}.json", evaluation) for i, evaluation in enumerate(evaluations)], analyses)


@functools.cache
def make_analysis() -> Analysis:
    torch.manual_seed(0)  # of some random models other rotations are recommended
    return run()


class Checker(HTMLParser):
    """Collects what a page loads and links to, its text, and tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [tag] if tag not in VOID else []
        for name, value in attrs:
            assert not name.startswith("on"), "no scripts"
            self.links += [value or ""] if name in ("href", "src", "srcset", "data", "action", "poster") else []
            self.ids += [value or ""] if name == "id" else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert "script" not in checker.tags
    assert not {"img", "link", "iframe", "object", "embed"} & set(checker.tags)
    assert all(
        link.startswith("data:text/") or (link.startswith("#") and link[1:] in checker.ids) for link in checker.links
    )
    assert not re.search(r"url\(|@import|https?:", page)
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        for number in ElementTree.fromstring(drawing).iter():
            assert "nan" not in " ".join(number.attrib.values()).lower()
    return checker


def test_a_page_holds_every_method_and_asks_for_nothing() -> None:
    page = render([make_evaluation(), make_evaluation("a-model", 16)], [make_analysis()])
    checker = check(page)
    text = " ".join(checker.text)
    for name in (
        "prepared",
        "int4, unrotated",
        "kmeans_rotated",
        "svd_int8",
        "16-bit noise",
        "stress 16",
        "All evaluations",
    ):
        assert name in text
    assert checker.tags.count("svg") > 20
    assert "0.0100 ± 0.0005" in re.sub("<.*?>", "", page)
    assert "as the model goes on" in text
    assert "as the cache goes on" in text
    assert "sawkv eval a-model --tokens 4096" in text
    assert "<the>" in text
    assert "Most of the sum over layers, prepared: layer 0 with 33%" in text
    assert "Worst cell of prepared: 512 tokens, 0% deep, 9 of 10 right where the unquantized model has 10." in text


def test_a_hostile_name_stays_text() -> None:
    evaluation = make_evaluation('<script>alert("x")</script>&amp;')
    evil = replace(evaluation.results[1], method="</text></svg><img src=x onerror=y>")
    page = render([replace(evaluation, results=(*evaluation.results, evil))], [])
    check(page)
    assert "<img" not in page


def test_missing_parts_and_odd_numbers_are_drawn_or_left_out() -> None:
    evaluation = make_evaluation()
    odd = [Divergence(9, value, value, value, value, 0.0, math.inf) for value in (0.0, 1e-12, 40.0, math.inf)]
    results = tuple(MethodResult(f"m{i}", 4.25, "", False, divergence) for i, divergence in enumerate(odd))
    bare = replace(evaluation, results=results, reference=replace(evaluation.reference, recall=()))
    check(render([bare], []))
    check(render([replace(bare, results=())], []))
    with pytest.raises(SawkvError, match="at least one record"):
        render([], [])


def test_records_are_read_from_files_and_others_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "eval.json", tmp_path / "analysis.json"]
    files[0].write_text(make_evaluation().to_json())
    files[1].write_text(make_analysis().to_json())
    out = tmp_path / "page.html"
    assert cli.main(["report", *map(str, files), "--out", str(out)]) == 0
    assert out.read_text() == report.make_page([("eval.json", make_evaluation())], [make_analysis()])
    for content in ("", "[]", "{}", '{"model": "x"}', "\x00"):
        files[0].write_text(content)
        assert cli.main(["report", str(files[0]), "--out", str(out)]) == 2
        assert "expected a record" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none"), "--out", str(out)]) == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"seconds": 12.0', '"seconds": "12"', "Expected `float`, got `str` - at `$.seconds`"),
        ('"mean_kl": 0.01,', '"mean_kl": null,', "Expected `float`, got `null` - at `$.results[1].divergence.mean_kl`"),
        ('"model": "a-model"', '"modal": "a-model"', "unknown field `modal`"),
        ('"correct": 9', '"correct": 9.5', "Expected `int`, got `float`"),
    ],
)
def test_a_value_of_another_type_is_named(old: str, new: str, said: str) -> None:
    text = make_evaluation().to_json()
    assert old in text
    with pytest.raises(SawkvError, match=re.escape(said)) as caught:
        Evaluation.from_json(text.replace(old, new))
    assert "expected a record of `sawkv eval`" in str(caught.value)


def test_numbers_that_json_lacks_pass_through() -> None:
    odd = replace(make_evaluation(), seconds=math.inf)
    assert Evaluation.from_json(odd.to_json()) == odd
    assert make_analysis() == Analysis.from_json(make_analysis().to_json())


def saved(page: str, kind: str, number: int = 0) -> str:
    """What the n-th link of a kind saves."""
    return base64.b64decode(re.findall(f'href="data:text/{kind};charset=utf-8;base64,([^"]*)"', page)[number]).decode()


def test_tables_are_saved_without_a_script() -> None:
    page = render([make_evaluation()], [])
    rows = list(csv.DictReader(io.StringIO(saved(page, "csv"))))
    found = {row["stored as"]: row for row in rows}
    assert set(found) == {"reference", "bf16_floor", *METHODS}
    assert float(found["fp8"]["mean KL"]) == 0.02
    assert float(found["fp8"]["mean KL ±"]) == 0.001
    assert float(found["prepared"]["of fp8's"]) == 0.5
    lines = saved(page, "markdown").splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    assert "| fp8 | 8.00 | 0.0200 ± 0.0010 |" in "\n".join(lines)


def test_a_saved_name_is_no_formula() -> None:
    table = Table("t", [Column("a|b")], [[Cell("=1+1")], [Cell("x", -2.5)]])
    assert table.csv() == "a|b\n'=1+1\n-2.5\n"
    assert table.markdown().splitlines()[0] == "| a\\|b |"


def test_the_light_is_the_worst_of_all() -> None:
    evaluation = make_evaluation()
    floor, subject, *others = evaluation.results
    fp8 = others[0]

    def lights(ppl: float, kl: float, correct: int, with_fp8: bool = True) -> tuple[str, list[str]]:
        result = replace(
            make_result("prepared", 4.25, kl, correct),
            divergence=replace(subject.divergence, mean_kl=kl, kl_se=kl / 20, ppl=ppl),
        )
        changed = replace(evaluation, results=(floor, result, *([fp8] if with_fp8 else [])))
        found = verdict(changed, result, floor)
        return found.light, [lamp.light for lamp in found.lamps]

    ppl = evaluation.reference.divergence.ppl
    assert lights(ppl * 1.005, 0.01, 10) == ("good", ["good", "good", "good"])
    assert lights(ppl * 1.02, 0.01, 10) == ("fair", ["fair", "good", "good"])
    assert lights(ppl * 1.2, 0.01, 10) == ("poor", ["poor", "good", "good"])
    assert lights(ppl, 0.0201, 10)[1][1] == "good", "within the errors of fp8's 0.02"
    assert lights(ppl, 0.05, 10)[1][1] == "fair"
    assert lights(ppl, 0.2, 10)[1][1] == "poor"
    assert lights(ppl, 0.01, 5) == ("poor", ["good", "good", "poor"])
    assert lights(ppl, 2e-5, 10, with_fp8=False) == ("good", ["good", "good", "good"])
    assert lights(ppl, 1.0, 10, with_fp8=False)[1][1] == "poor"
    assert lights(math.nan, 0.01, 10)[0] == "poor"


def test_grids_that_are_equal_everywhere_are_a_sentence() -> None:
    page = render([make_evaluation()], [])
    text = re.sub("<.*?>", "", page)
    assert "100% in each of 6 cells, 10 prompts each (60 of 60): unquantized." in text
    assert "90% in each of 6 cells, 10 prompts each (54 of 60): prepared, fp8" in text
    assert "Recall by depth and length" not in page
    assert "Recall: an entry of a table hidden in text" in page
    uneven = make_evaluation()
    cells = (replace(uneven.results[1].recall[0], correct=1), *uneven.results[1].recall[1:])
    uneven = replace(uneven, results=(uneven.results[0], replace(uneven.results[1], recall=cells), *uneven.results[2:]))
    assert render([uneven], []).count("Recall by depth and length") == 2, "wide and narrow, of one method and task"


def test_two_runs_are_compared(tmp_path: Path) -> None:
    before = make_evaluation()
    halved = replace(before.results[1], divergence=replace(before.results[1].divergence, mean_kl=0.005, kl_se=0.0002))
    alike = replace(before.results[2], divergence=replace(before.results[2].divergence, mean_kl=0.0201))
    after = replace(
        before,
        results=(before.results[0], halved, alike, before.results[3]),
        versions={"sawkv": "0.2.0"},
        device="a gpu",
    )
    files = [tmp_path / "A.json", tmp_path / "B.json"]
    for file, record in zip(files, (before, after), strict=True):
        file.write_text(record.to_json())
    assert cli.main(["report", *map(str, files), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    text = " ".join(check(page).text)
    assert "B.json against A.json" in text
    assert "Mean KL: 1 lower, 0 higher, 3 within the errors." in text
    assert "Only in A.json: kmeans_rotated, vLLM's own int4, svd_int8." in text
    assert "sawkv: 0.1.0 / 0.2.0" in text
    assert "device: a cpu / a gpu" in text
    rows = {row["stored as"]: row for row in csv.DictReader(io.StringIO(saved(page, "csv")))}
    assert (rows["prepared"]["counts"], float(rows["prepared"]["change"])) == ("better", -0.5)
    assert rows["fp8"]["counts"] == ""
    same = report.make_page([("x", before), ("x", before)], [])
    assert "Both were made in the same way" in same


def test_the_frontier_holds_what_nothing_beats() -> None:
    points = [
        svg.Point("a", 4, 3),
        svg.Point("b", 4, 2),
        svg.Point("c", 8, 2.5),
        svg.Point("d", 8, 1),
        svg.Point("e", 9, 1),
    ]
    assert [point.name for point in svg.frontier(points)] == ["b", "d"]


def test_labels_do_not_cover_each_other() -> None:
    wanted = [50.0, 51.0, 52.0, 200.0, 51.5, 10.0]
    places = sorted(svg._spread(wanted, 15, 0, 300))
    assert all(b - a > 14.5 for a, b in itertools.pairwise(places))
    assert places[0] >= 0
    assert places[-1] <= 300


def test_a_cells_share_of_the_scale() -> None:
    assert [svg._share(value, 0, 10, False) for value in (-1, 0, 5, 10, 99)] == [0, 0, 0.5, 1, 1]
    assert svg._share(1e-2, 1e-4, 1, True) == pytest.approx(0.5)
    assert svg._share(3, 3, 3, False) == 0.5
    assert svg.log_scale([0.012, 0.9]) == pytest.approx((0.01, 10)), "room beside the ends"
    assert [digits(value) for value in (0.0123456, 12.3456, 0.0, 1e-9)] == ["0.0123", "12.3", "0", "1.00e-09"]
