"""The part of the page about one analysis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from sawkv.lab.analysis import Analysis, Grid, label, mean, pair_energy
from sawkv.lab.report.evaluation import shape_line
from sawkv.page import Cell, Column, Table, both, svg


def view(analysis: Analysis) -> dict[str, Any]:
    """Values for analysis.html, by name."""
    advice = analysis.recommendation
    shown = next((error for error in analysis.methods if error.method == advice.method), analysis.methods[0])
    layers = analysis.layers
    heads = [f"KV head {i}" for i in range(analysis.shape.num_kv_heads)]
    queries = [f"query head {i}" for i in range(analysis.shape.num_q_heads)]
    maps = [
        _by_head(
            "Offset of K",
            "Share of the energy of keys that is one static vector. It costs range and carries nothing: a center"
            " removes it.",
            [layer.k.offset for layer in layers],
            heads,
            "{:.0%}".format,
            1.0,
        ),
        _by_head(
            "Offset of V",
            "The same for values. Attention adds the center back to its output, once.",
            [layer.v.offset for layer in layers],
            heads,
            "{:.0%}".format,
            1.0,
        ),
        _by_head(
            "Outlier channels of K",
            "The largest channel over the median one. A rotation spreads what sticks out.",
            [layer.k.outlier for layer in layers],
            heads,
            "{:.1f}".format,
        ),
        _by_head(
            f"Lost attention output, {label(shown.method)}",
            "Squared error of the attention output as a share of its variance over queries, each layer"
            f" alone.{_worst(shown.output)}",
            shown.output,
            heads,
            "{:.2%}".format,
        ),
        {"title": "Where the energy of K is", "note": _pair_note(analysis), "drawn": _pair_map(analysis)},
        _by_head(
            "Attention that the first token gets",
            "Mean over queries. Where it is large the first token is an attention sink, and its key must survive.",
            [layer.sink for layer in layers],
            queries,
            "{:.0%}".format,
            1.0,
        ),
    ]
    return {
        "title": analysis.name,
        "setting": (
            f"{shape_line(analysis.shape)} {analysis.windows} windows of {analysis.window:,} tokens of {analysis.text}"
            f" text; {analysis.dtype} on {analysis.device}, in {analysis.seconds:,.0f} s."
        ),
        "advice": advice,
        "table": _table(analysis),
        "maps": maps,
        "command": analysis.command,
    }


def _by_head(
    title: str,
    note: str,
    grid: Sequence[Sequence[float]],
    rows: Sequence[str],
    show: Callable[[float], str],
    high: float | None = None,
) -> dict[str, Any]:
    """A heat map of `grid`, [layers][heads], with layers from left to right."""
    drawn = both(
        lambda width: svg.heat_map(
            list(zip(*grid, strict=True)),
            rows,
            [str(i) for i in range(len(grid))],
            show=show,
            title=title,
            column_title="layer",
            low=0.0,
            high=high,
            width=width,
        )
    )
    return {"title": title, "note": note, "drawn": drawn}


def _worst(output: Grid) -> str:
    worst = sorted(enumerate(sum(heads) / len(heads) for heads in output), key=lambda pair: -pair[1])[:3]
    return " Worst layers: " + ", ".join(f"{layer} ({share:.2%})" for layer, share in worst) + "."


def _table(analysis: Analysis) -> Table:
    titles = ("stored as", "bits", "error of K", "of V", "of scores, nats", "of attention output", "worst layer")
    columns = [Column(title, minor=title in ("error of K", "of V", "of scores, nats")) for title in titles]
    ordered = sorted(analysis.methods, key=lambda error: (error.bits, error.mean_output))
    rows = []
    for error in ordered:
        layer, value = error.worst
        cells = [Cell(label(error.method), error.method), Cell(f"{error.bits:.2f}", error.bits)]
        cells += [Cell(f"{mean(grid):.3%}", mean(grid)) for grid in (error.k, error.v)]
        cells.append(Cell(f"{mean(error.score):.4f}", mean(error.score)))
        cells += [Cell(f"{error.mean_output:.3%}", error.mean_output), Cell(f"{value:.3%} in {layer}")]
        rows.append(cells)
    styles = ["chosen" if error.method == analysis.recommendation.method else "" for error in ordered]
    return Table(f"analysis-{analysis.model}", columns, rows, styles)


def _pair_map(analysis: Analysis) -> str:
    rows = [pair_energy(layer.k) for layer in analysis.layers]
    top = max(max(row) for row in rows)
    return both(
        lambda width: svg.heat_map(
            rows,
            [f"layer {i}" for i in range(len(rows))],
            [str(i) for i in range(len(rows[0]))],
            show=lambda x: f"{x:.3g}",
            title="Energy of K by RoPE pair",
            column_title="pair of channels (i, i + head_dim / 2)",
            low=top * 1e-4,
            high=top,
            log=True,
            width=width,
        )
    )


def _pair_note(analysis: Analysis) -> str:
    half = analysis.shape.head_dim // 2
    text = (
        "Mean square of keys in the pairs of channels that RoPE turns together, the fastest first; logarithmic over"
        " four decades. "
    )
    if analysis.rope_theta:
        turning = sum(2 * math.pi * analysis.rope_theta ** (i / half) < analysis.window for i in range(half))
        text += (
            f"Pairs 0 to {turning - 1} turn at least once in a window and keep no mean; the slower {half - turning} may"
            " hold an offset."
        )
    return text
