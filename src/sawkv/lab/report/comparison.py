"""The part of the page that compares two evaluations of the same methods, before and after a change."""

from __future__ import annotations

import math
from typing import Any

from sawkv.lab.analysis import label
from sawkv.lab.records import Evaluation
from sawkv.page import Cell, Column, Table, digits, with_error

ERRORS = 2.0
"""A change counts if it exceeds this many standard errors."""


def view(first: tuple[str, Evaluation], second: tuple[str, Evaluation]) -> dict[str, Any]:
    """Values for page.html, by name. Each evaluation comes with the name of its file."""
    (a, before), (b, after) = first, second
    if a == b:
        a, b = "first", "second"
    table, better, worse, same = _table(a, before, b, after)
    counts = f"Mean KL: {better} lower, {worse} higher, {same} within the errors."
    only = [
        f" Only in {name}: {', '.join(label(method) for method in missing)}."
        for name, missing in ((a, _missing(before, after)), (b, _missing(after, before)))
        if missing
    ]
    return {
        "title": f"{b} against {a}",
        "summary": counts + "".join(only),
        "differences": differences(before, after),
        "table": table,
    }


def differences(before: Evaluation, after: Evaluation) -> list[str]:
    """Settings that differ between the two evaluations."""
    found = [
        f"{field}: {getattr(before, field)} / {getattr(after, field)}"
        for field in ("model", "text", "window", "stress", "dtype", "device")
        if getattr(before, field) != getattr(after, field)
    ]
    tokens = [evaluation.reference.divergence.tokens for evaluation in (before, after)]
    found += [f"predictions: {tokens[0]:,} / {tokens[1]:,}"] * (tokens[0] != tokens[1])
    ppl = [evaluation.reference.divergence.ppl for evaluation in (before, after)]
    if not math.isclose(*ppl, rel_tol=1e-3):
        found.append(f"perplexity of the unquantized model: {ppl[0]:.3f} / {ppl[1]:.3f}")
    for name in dict.fromkeys([*before.versions, *after.versions]):
        versions = [evaluation.versions.get(name, "none") for evaluation in (before, after)]
        found += [f"{name}: {versions[0]} / {versions[1]}"] * (versions[0] != versions[1])
    return found


def _missing(one: Evaluation, other: Evaluation) -> list[str]:
    known = {result.method for result in other.results}
    return [result.method for result in one.results if result.method not in known]


def _table(a: str, before: Evaluation, b: str, after: Evaluation) -> tuple[Table, int, int, int]:
    columns = [
        Column("stored as"),
        Column(f"mean KL, {a}"),
        Column(b),
        Column("change"),
        Column("counts"),
        Column("same top-1", minor=True),
    ]
    columns += [Column("perplexity", minor=True)]
    later = {result.method: result for result in after.results}
    rows, counts = [], [0, 0, 0]
    for result in before.results:
        other = later.get(result.method)
        if other is None:
            continue
        x, y = result.divergence, other.divergence
        change = y.mean_kl / x.mean_kl - 1 if x.mean_kl else math.nan
        counted = abs(y.mean_kl - x.mean_kl) > ERRORS * math.hypot(x.kl_se, y.kl_se)
        word = "same" if not counted else "better" if y.mean_kl < x.mean_kl else "worse"
        counts[("better", "worse", "same").index(word)] += 1
        cells = [Cell(label(result.method), result.method)]
        for part in (x, y):
            mean, error = with_error(part.mean_kl, part.kl_se)
            cells.append(Cell(mean, part.mean_kl, error))
        cells.append(Cell(f"{change:+.1%}" if math.isfinite(change) else "", change))
        cells += [Cell("" if word == "same" else word), Cell(f"{x.same_top1:.2%}, {y.same_top1:.2%}")]
        cells.append(Cell(f"{digits(x.ppl, 5)}, {digits(y.ppl, 5)}"))
        rows.append(cells)
    return Table("comparison", columns, rows), *counts  # type: ignore[return-value]
