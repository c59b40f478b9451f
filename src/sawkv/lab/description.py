"""An analysis as text for the terminal."""

from __future__ import annotations

import math
import textwrap

from sawkv.lab.analysis import Analysis, ChannelStats, average, label, mean, pair_energy

PAIR_CELLS = 26


def describe(analysis: Analysis) -> str:
    """The analysis as text for a terminal, of at most 80 columns."""
    shape = analysis.shape
    lines = [
        (
            f"{analysis.name}: {shape.num_layers} layers, {shape.num_q_heads} query heads, {shape.num_kv_heads} KV"
            f" heads of {shape.head_dim}"
        ),
        (
            f"{analysis.text} text, {analysis.windows} x {analysis.window:,} tokens, {analysis.dtype} on"
            f" {analysis.device}, in {analysis.seconds:.0f} s"
        ),
        "",
        f"{'':5}{'K':^47}{'V':^14}{'first token':>14}",
        (
            f"{'layer':5}{'offset':>8}{'outlier':>9}  {'by RoPE pair, fast to slow':<{PAIR_CELLS}}"
            f"{'offset':>8}{'outlier':>9}{'attn':>6}{'|k|':>7}"
        ),
    ]
    for index, layer in enumerate(analysis.layers):
        lines.append(
            f"{index:>5}{average(layer.k.offset):>8.0%}{average(layer.k.outlier):>8.1f}x "
            f" {_pairs(layer.k):<{PAIR_CELLS}}"
            f"{average(layer.v.offset):>8.0%}{average(layer.v.outlier):>8.1f}x"
            f"{average(layer.sink):>6.0%}{average(layer.sink_norm):>6.1f}x"
        )
    lines += [
        "offset: energy in one static vector.  outlier: largest channel / median one.",
        "",
        f"{'  stored as':<22}{'bits':>6}{'K':>9}{'V':>9}{'scores':>12}{'attention':>10}{'worst':>12}",
    ]
    for error in sorted(analysis.methods, key=lambda error: (error.bits, error.mean_output)):
        worst_layer, worst = error.worst
        mark = "->" if error.method == analysis.recommendation.method else "  "
        place = f"{percent(worst)} in {worst_layer}"
        lines.append(
            f"{mark}{label(error.method):<20}{error.bits:>6.2f}{percent(mean(error.k)):>9}{percent(mean(error.v)):>9}"
            f"{mean(error.score):>7.4f} nats{percent(error.mean_output):>10}{place:>12}"
        )
    advice = analysis.recommendation
    lines += [
        "Squared errors, as shares of the variance of K, V and the attention output.",
        "",
        f"Recommended: {advice.title}",
    ]
    lines += [
        line
        for sentence in advice.reason
        for line in textwrap.wrap(sentence, 78, initial_indent="  ", subsequent_indent="  ")
    ]
    return "\n".join([*lines, f"  $ {advice.command}"])


def percent(share: float) -> str:
    """A percentage of at most seven columns."""
    return f"{share:.2%}" if share < 1 else f"{min(share, 9999):.0%}"


def _pairs(stats: ChannelStats) -> str:
    """Energy by RoPE pair as a line of blocks, on a log scale of three decades."""
    energy = pair_energy(stats)
    width = min(PAIR_CELLS, len(energy))
    cells = [max(energy[len(energy) * i // width : len(energy) * (i + 1) // width]) for i in range(width)]
    top = max(cells) or 1.0
    levels = [max(0.0, 1 + math.log10(max(cell / top, 1e-9)) / 3) for cell in cells]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * level))] for level in levels)
