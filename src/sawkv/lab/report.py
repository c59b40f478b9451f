"""`sawkv report`: records of `sawkv eval` and `sawkv analyze` as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from sawkv.errors import SawkvError
from sawkv.files import check_writable, writing
from sawkv.lab import svg
from sawkv.lab.analyze import PREPARED, Analysis, Grid, label, mean, pair_energy
from sawkv.lab.records import Evaluation, MethodResult, ModelShape, Recall

MAX_FILE_BYTES = 256 << 20
MAX_LINES = 5
"""Methods drawn by position; more would hide each other."""
CONTROLS = ("fp8", "vllm_int4_per_token_head", "int4_plain")
"""What a reader knows, and so is drawn first beside the default."""


def run_report(files: Sequence[Path], out: Path) -> int:
    """Write the page of these records. Returns 0.

    Args:
        files: JSON of `sawkv eval` and `sawkv analyze`, in any order.
        out: the HTML file.

    Raises:
        SawkvError: a file is not such a record.
    """
    check_writable(out)
    evaluations, analyses = [], []
    for file in files:
        record = read_record(file)
        if isinstance(record, Evaluation):
            evaluations.append(record)
        else:
            analyses.append(record)
    page = render(evaluations, analyses)
    with writing(out) as part:
        part.write_text(page, encoding="utf-8")
    print(f"wrote {out}")
    return 0


def read_record(file: Path) -> Evaluation | Analysis:
    """The record in a file.

    Raises:
        SawkvError: it cannot be read, or is neither kind.
    """
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise SawkvError(f"{file}: expected a record of at most {MAX_FILE_BYTES} bytes, got {size}")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SawkvError(f"{file}: expected a record of `sawkv eval` or `sawkv analyze`, got {error}") from error
    problems = []
    for kind in (Evaluation, Analysis):
        try:
            return kind.from_json(text)
        except SawkvError as error:
            problems.append(str(error))
    raise SawkvError(f"{file}: {'; '.join(problems)}")


def render(evaluations: Sequence[Evaluation], analyses: Sequence[Analysis]) -> str:
    """The page. Evaluations come first, then analyses, each with its own sections."""
    if not evaluations and not analyses:
        raise SawkvError("report: expected at least one record, got none")
    models = list(dict.fromkeys([e.model for e in evaluations] + [a.model for a in analyses]))
    entries = [(f"eval-{i}", f"Evaluation of {_name(record)}", _evaluation(record)) for i, record in enumerate(evaluations)]
    entries += [(f"analysis-{i}", f"K and V of {record.name}", _analysis(record)) for i, record in enumerate(analyses)]
    links = "".join(f'<a href="#{key}">{_e(title)}</a>' for key, title, _ in entries)
    sections = "".join(f'<section id="{key}"><h2>{_e(title)}</h2>{body}</section>' for key, title, body in entries)
    style = resources.files("sawkv.lab").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>KV cache of {_e(", ".join(models))}</title>
<style>{style}</style>
</head>
<body><main>
<h1>What a smaller KV cache costs {_e(", ".join(models))}</h1>
<p class="setting">Divergences are in nats a token, from the same model with its cache unquantized. Hover over a cell for its value.</p>
{f"<nav>{links}</nav>" if len(entries) > 1 else ""}
{_across(evaluations)}{sections}
<footer>{_versions(evaluations)}Made by <code>sawkv report</code>.</footer>
</main></body>
</html>
"""


def _name(evaluation: Evaluation) -> str:
    return evaluation.model + (f", stress {evaluation.stress}" if evaluation.stress > 1 else "")


def _across(evaluations: Sequence[Evaluation]) -> str:
    """All evaluations at a glance, if there are several."""
    if len(evaluations) < 2:
        return ""
    methods = list(dict.fromkeys(result.method for evaluation in evaluations for result in evaluation.results))
    found = [{result.method: result.divergence.mean_kl for result in evaluation.results} for evaluation in evaluations]
    grid = [[row.get(method, math.nan) for row in found] for method in methods]
    positive = [value for row in grid for value in row if value > 0]
    drawn = svg.heat_map(
        grid,
        [label(method) for method in methods],
        [_name(evaluation) for evaluation in evaluations],
        show=_nats,
        title="Mean KL of each method in each evaluation",
        low=min(positive, default=1e-6),
        log=True,
        cell_width=max(90, min(180, 800 // len(evaluations))),
    )
    return f"<section><h2>All evaluations</h2><p class='note'>Mean KL, nats a token.</p>{_scroll(drawn)}</section>"


# ---- sawkv eval


def _evaluation(evaluation: Evaluation) -> str:
    shape, reference = evaluation.shape, evaluation.reference
    parts = [
        f'<p class="setting">{_shape(shape)} '
        f"{reference.divergence.tokens:,} predictions on {_e(evaluation.text)} text in windows of {evaluation.window:,} tokens; "
        f"{_e(evaluation.dtype)} on {_e(evaluation.device)}; {evaluation.seconds:,.0f} s.</p>",
        _facts(evaluation),
        "<h3>Every method</h3>",
        _results_table(evaluation),
        "<h3>Bits against divergence</h3>",
        '<p class="note">Down and left is better. The thin line joins what nothing beats in both; sawkv serves the filled ones.</p>',
        _pareto(evaluation),
    ]
    if any(result.by_position for result in _methods(evaluation)):
        parts += ["<h3>By position in the context</h3>", _by_position(evaluation)]
    if any(result.by_layer for result in _methods(evaluation)):
        parts += [
            "<h3>By layer</h3>",
            '<p class="note">Mean KL when only this layer\'s cache is stored that way, and all others are unquantized.</p>',
            _by_layer(evaluation),
        ]
    parts.append(_recall(evaluation))
    return "".join(parts)


def _methods(evaluation: Evaluation) -> list[MethodResult]:
    """Without the floor and the reference."""
    return [result for result in evaluation.results if result.method != "bf16_floor"]


def _floor(evaluation: Evaluation) -> MethodResult | None:
    return next((result for result in evaluation.results if result.method == "bf16_floor"), None)


def _subject(evaluation: Evaluation) -> MethodResult | None:
    """The method that the summary is about: `prepared`, or the best of the fewest bits."""
    methods = _methods(evaluation)
    prepared = next((result for result in methods if result.method == PREPARED), None)
    return prepared or min(methods, key=lambda result: (round(2 * result.bits), result.divergence.mean_kl), default=None)


def _facts(evaluation: Evaluation) -> str:
    subject, floor = _subject(evaluation), _floor(evaluation)
    if subject is None:
        return ""
    found = subject.divergence
    noise = f"; 16-bit noise {_nats(floor.divergence.mean_kl, 2)}" if floor else ""
    facts = [
        (f"{subject.bits:g} bits", f"{label(subject.method)}, {16 / subject.bits:.2f}x the tokens of 16 bits"),
        (_nats(found.mean_kl), f"mean KL, ± {_nats(found.kl_se, 2)}{noise}"),
        (f"{found.same_top1:.1%}", "of tokens have the same most likely successor"),
        (f"{found.ppl:.3f}", f"perplexity; unquantized {evaluation.reference.divergence.ppl:.3f}"),
    ]
    if subject.passkey is not None:
        before = evaluation.reference.passkey
        facts.append((f"{subject.passkey:.1%}", "of pass-keys recalled" + ("" if before is None else f"; unquantized {before:.1%}")))
    return '<div class="facts">' + "".join(f'<div class="fact"><b>{_e(a)}</b><span>{_e(b)}</span></div>' for a, b in facts) + "</div>"


def _results_table(evaluation: Evaluation) -> str:
    subject = _subject(evaluation)
    worst = max((kl for result in _methods(evaluation) if math.isfinite(kl := result.divergence.mean_kl)), default=0.0)
    with_recall = evaluation.reference.passkey is not None
    with_runs = any(result.free_run for result in evaluation.results)
    head = ["stored as", "bits", "mean KL", "", "p99.9", "max", "same top-1", "perplexity"]
    head += ["pass-key"] * with_recall + ["same for"] * with_runs
    rows = []
    ordered = sorted(_methods(evaluation), key=lambda result: (result.bits, result.divergence.mean_kl))
    for result in (evaluation.reference, *([floor] if (floor := _floor(evaluation)) else []), *ordered):
        found = result.divergence
        measured = result is not evaluation.reference
        cells = [
            _e(label(result.method)),
            f"{result.bits:.2f}",
            _with_error(found.mean_kl, found.kl_se) if measured else "",
            svg.bar(_log_share(found.mean_kl, worst)) if measured else "",
            _nats(found.kl_p999, 2) if measured else "",
            _nats(found.kl_max, 2) if measured else "",
            f"{found.same_top1:.2%}" if measured else "",
            f"{found.ppl:.3f}",
        ]
        cells += ["" if result.passkey is None else f"{result.passkey:.1%}"] * with_recall
        cells += ["" if result.free_run is None else f"{result.free_run.mean:.0f} of {result.free_run.limit}"] * with_runs
        style = "chosen" if result is subject else "quiet" if result.method in ("reference", "bf16_floor") else ""
        rows.append((style, cells))
    note = "Bars: mean KL on a logarithmic scale. ±: one standard error."
    if with_runs:
        note += " Same for: greedy tokens until the first that differs from the unquantized model's."
    return _table(head, rows) + f'<p class="note">{note}</p>'


def _pareto(evaluation: Evaluation) -> str:
    floor = _floor(evaluation)
    points = [
        svg.Point(label(result.method), result.bits, result.divergence.mean_kl, result.served == "sawkv") for result in _methods(evaluation)
    ]
    return _scroll(
        svg.scatter(
            points,
            x_title="bits a value, scales included",
            y_title="mean KL, nats",
            title="Bits a value against mean KL, for each method",
            level=("16-bit noise", floor.divergence.mean_kl) if floor else None,
        )
    )


def _by_position(evaluation: Evaluation) -> str:
    methods = [result for result in _methods(evaluation) if result.by_position]
    subject, floor = _subject(evaluation), _floor(evaluation)
    first = [result for result in methods if result is subject]
    first += [result for result in methods if result.method in CONTROLS and result is not subject]
    first += [result for result in methods if result not in first]
    lines = [
        svg.Line(label(result.method), [(i, part.mean_kl) for i, part in enumerate(result.by_position)]) for result in first[:MAX_LINES]
    ]
    if floor and floor.by_position:
        lines.append(svg.Line("16-bit noise", [(i, part.mean_kl) for i, part in enumerate(floor.by_position)], dashed=True))
    labels = [f"{part.start:,} to {part.end:,}" for part in methods[0].by_position]
    return _scroll(
        svg.line_chart(
            lines,
            x_labels=labels,
            x_title="position in the window, tokens",
            y_title="mean KL, nats",
            title="Mean KL by position of the token",
        )
    )


def _by_layer(evaluation: Evaluation) -> str:
    methods = [result for result in _methods(evaluation) if result.by_layer]
    grid = [[layer.mean_kl for layer in result.by_layer] for result in methods]
    return _scroll(
        svg.heat_map(
            grid,
            [label(result.method) for result in methods],
            [str(layer.layer) for layer in methods[0].by_layer],
            show=_short,
            title="Mean KL of each method in each layer alone",
            column_title="layer",
            low=min((value for row in grid for value in row if value > 0), default=1e-6),
            log=True,
        )
    )


def _recall(evaluation: Evaluation) -> str:
    """One small map a method and task; the worst cell is said in words."""
    results = [evaluation.reference, *_methods(evaluation)]
    tasks = list(dict.fromkeys(cell.task for result in results for cell in result.recall))
    parts = []
    for task in tasks:
        asked = max(cell.asked for result in results for cell in result.recall if cell.task == task)
        prompts = f"{asked} prompt{'s' if asked != 1 else ''}"
        parts.append(f"<h3>Recall: {_e({'passkey': 'a pass-key', 'needle': 'a sentence'}.get(task, task))} hidden in text</h3>")
        parts.append(f'<p class="note">Share recalled with every token right, {prompts} a cell.{_worst_recall(evaluation, task)}</p>')
        maps = {
            result.method: f"<figure><figcaption>{_e(label(result.method))}</figcaption>{_recall_map(cells)}</figure>"
            for result in results
            if (cells := [cell for cell in result.recall if cell.task == task])
        }
        subject = _subject(evaluation)
        first = (evaluation.reference.method, subject.method if subject else "", *CONTROLS)
        others = "".join(drawn for method, drawn in maps.items() if method not in first)
        parts.append(f'<div class="maps">{"".join(drawn for method in first if (drawn := maps.get(method)))}</div>')
        if others:
            parts.append(f'<details><summary>Other methods</summary><div class="maps">{others}</div></details>')
    return "".join(parts)


def _recall_map(cells: Sequence[Recall]) -> str:
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    found = {(cell.length, cell.depth): cell.correct / max(1, cell.asked) for cell in cells}
    return svg.heat_map(
        [[found.get((length, depth), math.nan) for length in lengths] for depth in depths],
        [f"{depth:.0%} deep" for depth in depths],
        [f"{length:,}" for length in lengths],
        show=lambda share: f"{share:.0%}",
        title="Recall by depth and length",
        column_title="tokens of prompt",
        low=0.0,
        high=1.0,
        cell_width=52,
    )


def _worst_recall(evaluation: Evaluation, task: str) -> str:
    """The cell where the summary's method falls furthest behind the unquantized model."""
    subject = _subject(evaluation)
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
        return f" {_e(name)} is nowhere behind the unquantized model."
    wanted = before[cell.length, cell.depth].correct
    return (
        f" Worst cell of {_e(name)}: {cell.length:,} tokens, {cell.depth:.0%} deep, "
        f"{cell.correct} of {cell.asked} right where the unquantized model has {wanted}."
    )


# ---- sawkv analyze


def _analysis(analysis: Analysis) -> str:
    shape, advice = analysis.shape, analysis.recommendation
    layers = [str(i) for i in range(shape.num_layers)]
    heads = [f"KV head {i}" for i in range(shape.num_kv_heads)]
    chosen = advice.method
    shown = next((error for error in analysis.methods if error.method == chosen), analysis.methods[0])

    def by_head(grid: Grid, title: str, note: str, show: str, high: float | None = None) -> str:
        drawn = svg.heat_map(
            list(zip(*grid, strict=True)),
            heads,
            layers,
            show=lambda x: format(x, show),
            title=title,
            column_title="layer",
            low=0.0,
            high=high,
        )
        return f"<figure><h3>{_e(title)}</h3><p class='note'>{_e(note)}</p>{_scroll(drawn)}</figure>"

    return "".join(
        [
            f'<p class="setting">{_shape(shape)} '
            f"{analysis.windows} windows of {analysis.window:,} tokens of {_e(analysis.text)} text; "
            f"{_e(analysis.dtype)} on {_e(analysis.device)}; {analysis.seconds:,.0f} s.</p>",
            f'<div class="advice"><b>Recommended: {_e(advice.title)}</b>',
            *(f"<p>{_prose(sentence)}</p>" for sentence in advice.reason),
            f"<p class='note'>Next: <code>{_e(advice.command)}</code></p></div>",
            "<h3>What each way of storing does to attention</h3>",
            _errors_table(analysis, chosen),
            '<div class="maps">',
            by_head(
                tuple(layer.k.offset for layer in analysis.layers),
                "Offset of K",
                "Share of the energy of keys that is one static vector. It costs range and carries nothing: a center removes it.",
                ".0%",
                1.0,
            ),
            by_head(
                tuple(layer.v.offset for layer in analysis.layers),
                "Offset of V",
                "The same for values. Attention adds the center back to its output, once.",
                ".0%",
                1.0,
            ),
            by_head(
                tuple(layer.k.outlier for layer in analysis.layers),
                "Outlier channels of K",
                "The largest channel over the median one. A rotation spreads what sticks out.",
                ".1f",
            ),
            by_head(
                shown.output,
                f"Lost attention output, {label(shown.method)}",
                "Squared error of the attention output as a share of its variance over queries, each layer alone.",
                ".2%",
            ),
            "</div>",
            "<h3>Where the energy of K is</h3>",
            f"<p class='note'>{_e(_pair_note(analysis))}</p>",
            _scroll(_pair_map(analysis)),
            "<h3>Attention that the first token gets</h3>",
            "<p class='note'>Mean over queries. Where it is large the first token is an attention sink, and its key must survive.</p>",
            _scroll(
                svg.heat_map(
                    list(zip(*(layer.sink for layer in analysis.layers), strict=True)),
                    [f"query head {i}" for i in range(shape.num_q_heads)],
                    layers,
                    show=lambda x: f"{x:.0%}",
                    title="Attention to the first token",
                    column_title="layer",
                    low=0.0,
                    high=1.0,
                )
            ),
        ]
    )


def _errors_table(analysis: Analysis, chosen: str) -> str:
    rows = []
    for error in sorted(analysis.methods, key=lambda error: (error.bits, error.mean_output)):
        layer, value = error.worst
        cells = [
            _e(label(error.method)),
            f"{error.bits:.2f}",
            f"{mean(error.k):.3%}",
            f"{mean(error.v):.3%}",
            f"{mean(error.score):.4f}",
            f"{error.mean_output:.3%}",
            f"{value:.3%} in {layer}",
        ]
        rows.append(("chosen" if error.method == chosen else "", cells))
    head = ["stored as", "bits", "error of K", "of V", "of scores, nats", "of attention output", "worst layer"]
    note = (
        "Squared errors, as shares of the variance of K, of V and of the attention output. Scores: standard deviation of their "
        "error under the attention itself."
    )
    return _table(head, rows) + f'<p class="note">{note}</p>'


def _pair_map(analysis: Analysis) -> str:
    rows = [pair_energy(layer.k) for layer in analysis.layers]
    columns = [str(i) for i in range(len(rows[0]))]
    top = max(max(row) for row in rows)
    return svg.heat_map(
        rows,
        [f"layer {i}" for i in range(len(rows))],
        columns,
        show=lambda x: f"{x:.3g}",
        title="Energy of K by RoPE pair",
        column_title="pair of channels (i, i + head_dim / 2)",
        low=top * 1e-4,
        high=top,
        log=True,
    )


def _pair_note(analysis: Analysis) -> str:
    half = analysis.shape.head_dim // 2
    text = "Mean square of keys in the pairs of channels that RoPE turns together, the fastest first; logarithmic over four decades. "
    if analysis.rope_theta:
        turning = sum(2 * math.pi * analysis.rope_theta ** (i / half) < analysis.window for i in range(half))
        text += f"Pairs 0 to {turning - 1} turn at least once in a window and keep no mean; the slower {half - turning} may hold an offset."
    return text


# ---- HTML


def _shape(shape: ModelShape) -> str:
    return f"{shape.num_layers} layers, {shape.num_q_heads} query heads, {shape.num_kv_heads} KV heads of {shape.head_dim}."


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Cells are HTML; the class of each row comes first."""
    body = "".join(f"<tr{f' class={style}' if style else ''}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for style, cells in rows)
    return _scroll(f"<table><thead><tr>{''.join(f'<th>{_e(cell)}</th>' for cell in head)}</tr></thead><tbody>{body}</tbody></table>")


def _scroll(inner: str) -> str:
    """Wide things scroll by themselves, not the page."""
    return f'<div class="scroll">{inner}</div>'


def _versions(evaluations: Sequence[Evaluation]) -> str:
    versions = {name: version for evaluation in evaluations for name, version in evaluation.versions.items()}
    return _e(", ".join(f"{name} {version}" for name, version in versions.items()) + ". ") if versions else ""


def _nats(value: float, digits: int = 3) -> str:
    """So many digits, without an exponent down to a millionth."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _short(value: float) -> str:
    """Two digits, for a cell of a map."""
    return _nats(value, 2) if value >= 1e-4 else f"{value:.1g}"


def _with_error(mean_value: float, error: float) -> str:
    """`0.0210 ± 0.0008`: the error to the mean's last place."""
    shown = _nats(mean_value)
    if error <= 0 or "e" in shown:
        return shown
    places = len(shown.partition(".")[2])
    return f"{shown} <span class='soft'>± {error:.{places}f}</span>"


def _log_share(value: float, worst: float) -> float:
    """Length of a bar: 1 for the worst, 0 for a ten-thousandth of it."""
    return 1 + (math.log10(min(value, worst)) - math.log10(worst)) / 4 if value > 0 and worst > 0 else 0.0


def _e(text: str) -> str:
    return html.escape(text)


def _prose(text: str) -> str:
    """Text in which `backquotes` mark code."""
    return re.sub("`(.*?)`", r"<code>\1</code>", _e(text))
