"""The HTML report: every number of the records is in it, it is well-formed, and it asks for nothing from outside."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from sawkv import SawkvError, cli
from sawkv.lab import report, svg
from sawkv.lab.analyze import Analysis
from sawkv.lab.records import Divergence, Evaluation, FreeRun, LayerKL, MethodResult, ModelShape, PositionKL, Recall
from tests.lab.test_analyze import run

VOID = {"meta", "link", "br", "hr", "img", "input"}
METHODS = {"prepared": 4.25, "fp8": 8.0, "int4_plain": 4.25, "kmeans_rotated": 4.25, "vllm_int4_per_token_head": 4.25, "svd_int8": 4.5}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
    )


def make_evaluation(model: str = "a-model", stress: int = 1) -> Evaluation:
    floor = dataclasses.replace(make_result("bf16_floor", 16.0, 2e-5), by_layer=(), recall=(), free_run=None)
    results = (floor, *(make_result(name, bits, 0.01 * (i + 1)) for i, (name, bits) in enumerate(METHODS.items())))
    reference = dataclasses.replace(make_result("reference", 32.0, 0.0, correct=10), by_position=(), by_layer=(), free_run=None)
    return Evaluation(
        model, ModelShape(3, 4, 2, 128), "a cpu", "float32", "held-out", 256, stress, reference, results, 12.0, {"sawkv": "0.1.0"}
    )


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
    assert all(link.startswith("#") and link[1:] in checker.ids for link in checker.links)
    assert not re.search(r"url\(|@import|https?:", page)
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        for number in ElementTree.fromstring(drawing).iter():
            assert "nan" not in " ".join(number.attrib.values()).lower()
    return checker


def test_a_page_holds_every_method_and_asks_for_nothing() -> None:
    page = report.render([make_evaluation(), make_evaluation("a-model", 16)], [make_analysis()])
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
    assert "Worst cell of prepared: 512 tokens, 0% deep, 9 of 10 right where the unquantized model has 10." in text


def test_a_hostile_name_stays_text() -> None:
    evaluation = make_evaluation('<script>alert("x")</script>&amp;')
    evil = dataclasses.replace(evaluation.results[1], method="</text></svg><img src=x onerror=y>")
    page = report.render([dataclasses.replace(evaluation, results=(*evaluation.results, evil))], [])
    check(page)
    assert "<img" not in page


def test_missing_parts_and_odd_numbers_are_drawn_or_left_out() -> None:
    evaluation = make_evaluation()
    odd = [Divergence(9, value, value, value, value, 0.0, math.inf) for value in (0.0, 1e-12, 40.0, math.inf)]
    results = tuple(MethodResult(f"m{i}", 4.25, "", False, divergence) for i, divergence in enumerate(odd))
    bare = dataclasses.replace(evaluation, results=results, reference=dataclasses.replace(evaluation.reference, recall=()))
    check(report.render([bare], []))
    check(report.render([dataclasses.replace(bare, results=())], []))
    with pytest.raises(SawkvError, match="at least one record"):
        report.render([], [])


def test_records_are_read_from_files_and_others_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "eval.json", tmp_path / "analysis.json"]
    files[0].write_text(make_evaluation().to_json())
    files[1].write_text(make_analysis().to_json())
    out = tmp_path / "page.html"
    assert cli.main(["report", *map(str, files), "--out", str(out)]) == 0
    assert out.read_text() == report.render([make_evaluation()], [make_analysis()])
    for content in ("", "[]", "{}", '{"model": "x"}', "\x00"):
        files[0].write_text(content)
        assert cli.main(["report", str(files[0]), "--out", str(out)]) == 2
        assert "expected a record" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none"), "--out", str(out)]) == 2


def test_the_frontier_holds_what_nothing_beats() -> None:
    points = [svg.Point("a", 4, 3), svg.Point("b", 4, 2), svg.Point("c", 8, 2.5), svg.Point("d", 8, 1), svg.Point("e", 9, 1)]
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


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium; the other tests check the page without one")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    page, image = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(report.render([make_evaluation()], [make_analysis()]), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1600"]
    done = subprocess.run([*command, f"--screenshot={image}", page.as_uri()], check=True, capture_output=True, text=True, timeout=120)
    assert "Refused to" not in done.stderr, "the page breaks its own content security policy"
    assert image.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert image.stat().st_size > 30_000, "an empty page is smaller"
