"""The part of the page about one evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sawkv.lab.analysis import PREPARED, label
from sawkv.lab.records import FLOOR, Evaluation, MethodResult, Recall
from sawkv.lab.report.verdict import verdict
from sawkv.page import Cell, Column, Table, both, digits, svg, with_error
from sawkv.records import AttentionShape

MAX_LINES = 5
"""Methods drawn by position. More lines would hide each other."""
CONTROLS = ("fp8", "vllm_int4_per_token_head", "int4_plain")
"""Methods that readers know. They are drawn first, after the subject."""
LEAST_COLOURED = 1e-3
"""Tokens with a smaller KL, in nats, are not coloured."""


def view(evaluation: Evaluation) -> dict[str, Any]:
    """Values for evaluation.html, by name."""
    subject, tokens = chosen(evaluation), evaluation.reference.divergence.tokens
    return {
        "title": title(evaluation),
        "setting": (
            f"{shape_line(evaluation.shape)} {tokens:,} predictions on {evaluation.text} text in windows of "
            f"{evaluation.window:,} tokens; {evaluation.dtype} on {evaluation.device}, in {evaluation.seconds:,.0f} s."
        ),
        "subject": label(subject.method) if subject else "",
        "verdict": verdict(evaluation, subject, floor(evaluation)) if subject else None,
        "facts": _facts(evaluation, subject),
        "table": _table(evaluation, subject),
        "table_note": (
            "Dots: mean KL on a logarithmic scale with a line at each power of ten. ±: one standard error. "
            "Same for: greedy tokens until the first that differs from the unquantized model's."
        ),
        "scatter": _scatter(evaluation),
        **_excerpts(evaluation, subject),
        "worst": _worst(evaluation, subject),
        "forks": [(label(result.method), result.forks) for result in _ordered(evaluation, subject) if result.forks],
        "forks_note": _forks_note(subject),
        "by_position": _by_position(evaluation, subject),
        "by_layer": _by_layer(evaluation),
        "worst_layers": _worst_layers(subject),
        "recall": _recall(evaluation, subject),
        "command": evaluation.command,
    }


def title(evaluation: Evaluation) -> str:
    return evaluation.model + (f", stress {evaluation.stress}" if evaluation.stress > 1 else "")


def shape_line(shape: AttentionShape) -> str:
    return (
        f"{shape.num_layers} layers, {shape.num_q_heads} query heads, {shape.num_kv_heads} KV heads of"
        f" {shape.head_dim}."
    )


def methods(evaluation: Evaluation) -> list[MethodResult]:
    """Results without the noise floor."""
    return [result for result in evaluation.results if result.method != FLOOR]


def floor(evaluation: Evaluation) -> MethodResult | None:
    """The noise of 16-bit arithmetic, if measured."""
    return next((result for result in evaluation.results if result.method == FLOOR), None)


def chosen(evaluation: Evaluation) -> MethodResult | None:
    """The subject of the page: `prepared`, or the best method with the fewest bits."""
    found = methods(evaluation)
    prepared = next((result for result in found if result.method == PREPARED), None)
    return prepared or min(found, key=lambda result: (round(2 * result.bits), result.divergence.mean_kl), default=None)


def _ordered(evaluation: Evaluation, subject: MethodResult | None) -> list[MethodResult]:
    """The subject, the controls, then the others."""
    found = methods(evaluation)
    return sorted(found, key=lambda result: (result is not subject, result.method not in CONTROLS))


def _facts(evaluation: Evaluation, subject: MethodResult | None) -> list[tuple[str, str]]:
    if subject is None:
        return []
    found, noise, reference = subject.divergence, floor(evaluation), evaluation.reference
    mean, error = with_error(found.mean_kl, found.kl_se)
    beside = f"; 16-bit noise {digits(noise.divergence.mean_kl, 2)}" if noise else ""
    facts = [
        (
            f"{subject.bits:g} bits",
            f"{label(subject.method)}: {16 / subject.bits:.2f}x the tokens of 16 bits, {8 / subject.bits:.2f}x of fp8",
        ),
        (mean, f"mean KL, {error}{beside}"),
        (f"{found.same_top1:.1%}", "of tokens have the same most likely successor"),
        (f"{found.ppl:.3f}", f"perplexity; unquantized {reference.divergence.ppl:.3f}"),
    ]
    if subject.passkey is not None:
        before = f"; unquantized {reference.passkey:.1%}" if reference.passkey is not None else ""
        facts.append((f"{subject.passkey:.1%}", f"of pass-keys recalled{before}"))
    return facts


def _table(evaluation: Evaluation, subject: MethodResult | None) -> Table:
    reference, noise = evaluation.reference, floor(evaluation)
    with_recall = reference.passkey is not None
    with_runs = any(result.free_run for result in evaluation.results)
    fp8 = next((result.divergence.mean_kl for result in evaluation.results if result.method == "fp8"), 0.0)
    columns = [Column("stored as"), Column("bits", minor=True), Column("mean KL"), Column("", minor=True, drawn=True)]
    columns += [Column("of fp8's")] * (fp8 > 0) + [
        Column("p99.9", minor=True),
        Column("max", minor=True),
        Column("same top-1"),
    ]
    columns += (
        [Column("perplexity")]
        + [Column("pass-key", minor=True)] * with_recall
        + [Column("same for", minor=True)] * with_runs
    )
    measured = [
        *([noise] if noise else []),
        *sorted(methods(evaluation), key=lambda result: (result.bits, result.divergence.mean_kl)),
    ]
    scale = svg.log_scale([result.divergence.mean_kl for result in measured])
    rows, styles = [], []
    for result in (reference, *measured):
        found, is_reference = result.divergence, result is reference
        mean, error = with_error(found.mean_kl, found.kl_se)
        name = f"unquantized, {evaluation.dtype}" if is_reference else label(result.method)
        cells = [Cell(name, result.method), Cell(f"{result.bits:.2f}", result.bits)]
        empty = Cell("")
        cells += (
            [empty, empty]
            if is_reference
            else [Cell(mean, found.mean_kl, error), Cell("", at=svg.on_scale(found.mean_kl, scale))]
        )
        if fp8 > 0:
            ratio = found.mean_kl / fp8
            cells.append(
                empty if is_reference else Cell(f"{digits(ratio, 2) if ratio < 10 else f'{ratio:.0f}'}x", ratio)
            )
        cells += (
            [empty, empty, empty]
            if is_reference
            else [_nats(found.kl_p999), _nats(found.kl_max), _share(found.same_top1, 2)]
        )
        is_alike = found.tokens == reference.divergence.tokens  # the noise is often of less text
        cells.append(Cell(f"{found.ppl:.3f}", found.ppl) if is_alike else empty)
        if with_recall:
            cells.append(empty if result.passkey is None else _share(result.passkey, 1))
        if with_runs:
            run = result.free_run
            cells.append(empty if run is None else Cell(f"{run.mean:.0f} of {run.limit}", run.mean))
        rows.append(cells)
        styles.append("chosen" if result is subject else "quiet" if is_reference or result is noise else "")
    return Table(f"eval-{evaluation.model}", columns, rows, styles, math.log10(scale[1] / scale[0]))


def _nats(value: float) -> Cell:
    return Cell(digits(value, 2), value)


def _share(value: float, places: int) -> Cell:
    return Cell(f"{value:.{places}%}", value)


def _scatter(evaluation: Evaluation) -> str:
    noise = floor(evaluation)
    points = [
        svg.Point(label(result.method), result.bits, result.divergence.mean_kl, result.served == "sawkv")
        for result in methods(evaluation)
    ]
    return both(
        lambda width: svg.scatter(
            points,
            x_title="bits per value, scales included",
            y_title="mean KL, nats",
            title="Bits per value against mean KL, for each method",
            level=("16-bit noise", noise.divergence.mean_kl) if noise else None,
            width=width,
        )
    )


def _excerpts(evaluation: Evaluation, subject: MethodResult | None) -> dict[str, Any]:
    noise = floor(evaluation)
    shown = [result for result in (*_ordered(evaluation, subject), *([noise] if noise else [])) if result.excerpt_kl]
    highest = max((kl for result in shown for kl in result.excerpt_kl), default=1.0)
    found = []
    for result in shown:
        pairs = list(zip(evaluation.excerpt, result.excerpt_kl, strict=False))
        over = sum(kl > 10 * LEAST_COLOURED for _, kl in pairs)
        found.append(
            {
                "name": label(result.method),
                "note": (
                    f"{over} of {len(pairs)} tokens above {10 * LEAST_COLOURED:g} nats, at most"
                    f" {digits(max(result.excerpt_kl), 2)}"
                ),
                "tokens": [
                    {"text": text, "kl": f"{kl:.3g} nats", "share": round(85 * _heat(kl, highest))}
                    for text, kl in pairs
                ],
            }
        )
    return {
        "excerpts": found if evaluation.excerpt else [],
        "excerpt_tokens": len(evaluation.excerpt),
        "excerpt_low": f"{LEAST_COLOURED:g}",
        "excerpt_high": digits(highest, 2),
    }


def _heat(kl: float, highest: float) -> float:
    """Place on a logarithmic scale, 0 to 1."""
    if kl <= LEAST_COLOURED or highest <= LEAST_COLOURED:
        return 0.0
    return min(1.0, math.log(kl / LEAST_COLOURED) / math.log(highest / LEAST_COLOURED))


def _worst(evaluation: Evaluation, subject: MethodResult | None) -> Table | None:
    if subject is None or not subject.worst:
        return None
    columns = [
        Column("text"),
        Column("then"),
        Column("unquantized expects"),
        Column(f"{label(subject.method)} expects"),
    ]
    columns += [Column("KL"), Column("window, position", minor=True)]
    rows = []
    for found in subject.worst:
        cells = [Cell(f"…{_line(found.before)[-46:]}"), Cell(_line(found.token))]
        cells += [
            Cell(_line(found.expected), soft=f"{found.expected_p:.0%}"),
            Cell(_line(found.chosen), soft=f"{found.chosen_p:.0%}"),
        ]
        cells += [_nats(found.kl), Cell(f"{found.window}, {found.position}")]
        rows.append(cells)
    return Table(f"worst-{evaluation.model}", columns, rows)


def _line(text: str) -> str:
    """The text on one line, with control characters made visible."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣" if not text.strip(" ") else " ")


def _forks_note(subject: MethodResult | None) -> str:
    run = subject.free_run if subject else None
    if run is None or subject is None:
        return ""
    whole = sum(tokens >= run.limit for tokens in run.tokens)
    return (
        f"Alike for all {run.limit} tokens with {label(subject.method)}: {whole} of {len(run.tokens)} prompts. The"
        " first that part are shown. Greedy texts part where two words are about as likely, and then go their own"
        " ways: see how far fp8 follows."
    )


def _by_position(evaluation: Evaluation, subject: MethodResult | None) -> str:
    found = [result for result in _ordered(evaluation, subject) if result.by_position]
    if not found:
        return ""
    noise = floor(evaluation)
    lines = [
        svg.Line(label(r.method), [(i, part.mean_kl) for i, part in enumerate(r.by_position)])
        for r in found[:MAX_LINES]
    ]
    if noise and noise.by_position:
        lines.append(
            svg.Line("16-bit noise", [(i, part.mean_kl) for i, part in enumerate(noise.by_position)], dashed=True)
        )
    labels = [f"{part.start:,} to {part.end:,}" for part in found[0].by_position]
    return both(
        lambda width: svg.line_chart(
            lines,
            x_labels=labels if width >= svg.LEGEND_BELOW else [text.partition(" ")[0] for text in labels],
            x_title=(
                "position in the window, tokens" if width >= svg.LEGEND_BELOW else "position in the window, from token"
            ),
            y_title="mean KL, nats",
            title="Mean KL by position of the token",
            width=width,
        )
    )


def _by_layer(evaluation: Evaluation) -> str:
    found = [result for result in methods(evaluation) if result.by_layer]
    if not found:
        return ""
    grid = [[layer.mean_kl for layer in result.by_layer] for result in found]
    return both(
        lambda width: svg.heat_map(
            grid,
            [label(result.method) for result in found],
            [str(layer.layer) for layer in found[0].by_layer],
            show=lambda value: digits(value, 2) if value >= 1e-4 else f"{value:.1g}",
            title="Mean KL of each method in each layer alone",
            column_title="layer",
            low=min((value for row in grid for value in row if value > 0), default=1e-6),
            log=True,
            width=width,
        )
    )


def _worst_layers(subject: MethodResult | None) -> str:
    if subject is None or not subject.by_layer:
        return ""
    total = sum(layer.mean_kl for layer in subject.by_layer) or 1.0
    found = sorted(subject.by_layer, key=lambda layer: -layer.mean_kl)[:3]
    listed = ", ".join(f"layer {layer.layer} with {layer.mean_kl / total:.0%}" for layer in found)
    return f" Most of the sum over layers, {label(subject.method)}: {listed}."


def _recall(evaluation: Evaluation, subject: MethodResult | None) -> list[dict[str, Any]]:
    """Recall as grids. Grids whose cells are all equal become a sentence."""
    results = [evaluation.reference, *_ordered(evaluation, subject)]
    tasks = list(dict.fromkeys(cell.task for result in results for cell in result.recall))
    found = []
    for task in tasks:
        equal: dict[tuple[int, int, int], list[str]] = {}
        maps = []
        for result in results:
            cells = [cell for cell in result.recall if cell.task == task]
            counts = {(cell.correct, cell.asked) for cell in cells}
            if len(counts) == 1:
                (count,) = counts
                equal.setdefault((*count, len(cells)), []).append(label(result.method))
            elif cells:
                maps.append((label(result.method), _recall_map(cells)))
        lengths = sorted({cell.length for result in results for cell in result.recall if cell.task == task})
        depths = len({cell.depth for result in results for cell in result.recall if cell.task == task})
        found.append(
            {
                "what": {"passkey": "a pass-key", "needle": "an entry of a table"}.get(task, task),
                "note": (
                    "Share recalled with every token right, in prompts of"
                    f" {' and '.join(f'{length:,}' for length in lengths)} tokens, at {depths}"
                    f" depths.{_worst_recall(evaluation, subject, task)}"
                ),
                "equal": [
                    f"{correct / max(1, asked):.0%} in each of {cells} cells, {asked} prompt{'s' if asked != 1 else ''}"
                    f" each ({correct * cells} of {asked * cells}): {', '.join(names)}."
                    for (correct, asked, cells), names in equal.items()
                ],
                "maps": maps,
            }
        )
    return found


def _recall_map(cells: Sequence[Recall]) -> str:
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    found = {(cell.length, cell.depth): cell.correct / max(1, cell.asked) for cell in cells}
    return both(
        lambda width: svg.heat_map(
            [[found.get((length, depth), math.nan) for length in lengths] for depth in depths],
            [f"{depth:.0%} deep" for depth in depths],
            [f"{length:,}" for length in lengths],
            show=lambda share: f"{share:.0%}",
            title="Recall by depth and length",
            column_title="tokens of prompt",
            low=0.0,
            high=1.0,
            width=width,
            widest=52,
        )
    )


def _worst_recall(evaluation: Evaluation, subject: MethodResult | None, task: str) -> str:
    """The cell in which the subject is furthest behind the unquantized model."""
    before = {(cell.length, cell.depth): cell for cell in evaluation.reference.recall if cell.task == task}
    behind = [
        (before[key].correct - cell.correct, cell)
        for cell in (subject.recall if subject else ())
        if cell.task == task and (key := (cell.length, cell.depth)) in before
    ]
    if subject is None or not behind:
        return ""
    lost, cell = max(behind, key=lambda pair: pair[0])
    name = label(subject.method)
    if lost <= 0:
        return f" {name} is nowhere behind the unquantized model."
    unquantized = before[cell.length, cell.depth].correct
    return (
        f" Worst cell of {name}: {cell.length:,} tokens, {cell.depth:.0%} deep, "
        f"{cell.correct} of {cell.asked} right where the unquantized model has {unquantized}."
    )
