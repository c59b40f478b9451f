"""`sawkv report`: one HTML page from records of `sawkv eval` and `sawkv analyze`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from sawkv.errors import SawkvError
from sawkv.files import check_writable, reason, writing
from sawkv.lab.analysis import Analysis, label
from sawkv.lab.records import Evaluation
from sawkv.lab.report import analysis as analyses_view
from sawkv.lab.report import comparison
from sawkv.lab.report import evaluation as evaluations_view
from sawkv.page import both, digits, render, svg

MAX_FILE_BYTES = 256 << 20


def run_report(files: Sequence[Path], out: Path) -> int:
    """Write the page of these records.

    Args:
        files: JSON of `sawkv eval` and `sawkv analyze`, in any order. Of two evaluations, the second is also compared
            with the first.
        out: the HTML file.

    Returns:
        0.

    Raises:
        SawkvError: a file is no such record.
    """
    check_writable(out)
    records = [(file.name, read_record(file)) for file in files]
    evaluations = [(name, record) for name, record in records if isinstance(record, Evaluation)]
    page = make_page(evaluations, [record for _, record in records if isinstance(record, Analysis)])
    with writing(out) as part:
        part.write_text(page, encoding="utf-8")
    print(f"wrote {out}")
    return 0


def read_record(file: Path) -> Evaluation | Analysis:
    """The record in a file.

    Raises:
        SawkvError: the file cannot be read, or is neither kind of record.
    """
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise SawkvError(f"{file}: expected a record of at most {MAX_FILE_BYTES} bytes, got {size}")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SawkvError(
            f"{file}: expected a record of `sawkv eval` or `sawkv analyze`, got {reason(error)}"
        ) from error
    kind = Analysis if '"recommendation"' in text else Evaluation
    try:
        return kind.from_json(text)
    except SawkvError as error:
        raise SawkvError(f"{file}: {error}") from error


def make_page(evaluations: Sequence[tuple[str, Evaluation]], analyses: Sequence[Analysis]) -> str:
    """The page's HTML: evaluations, each with the name of its file, then analyses."""
    if not evaluations and not analyses:
        raise SawkvError("report: expected at least one record, got none")
    models = list(dict.fromkeys([e.model for _, e in evaluations] + [a.model for a in analyses]))
    versions = {name: version for _, evaluation in evaluations for name, version in evaluation.versions.items()}
    return render(
        "sawkv.lab.report",
        "page.html",
        models=", ".join(models),
        overview=_overview([evaluation for _, evaluation in evaluations]) if len(evaluations) > 1 else None,
        comparison=comparison.view(*evaluations) if len(evaluations) == 2 else None,
        evaluations=[evaluations_view.view(evaluation) for _, evaluation in evaluations],
        analyses=[analyses_view.view(record) for record in analyses],
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def _overview(evaluations: Sequence[Evaluation]) -> str:
    """Mean KL of every method in every evaluation."""
    methods = list(dict.fromkeys(result.method for evaluation in evaluations for result in evaluation.results))
    found = [{result.method: result.divergence.mean_kl for result in evaluation.results} for evaluation in evaluations]
    grid = [[row.get(method, math.nan) for row in found] for method in methods]
    positive = [value for row in grid for value in row if value > 0]
    return both(
        lambda width: svg.heat_map(
            grid,
            [label(method) for method in methods],
            [evaluations_view.title(evaluation) for evaluation in evaluations],
            show=digits,
            title="Mean KL of each method in each evaluation",
            low=min(positive, default=1e-6),
            log=True,
            width=width,
            widest=180,
        )
    )
