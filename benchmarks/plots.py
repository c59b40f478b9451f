"""Tables and plots of docs/performance.md.

    python -m benchmarks.plots

They are made from the records in docs/results; nothing is shown that was not recorded. Of records of the same thing the
last one counts. Tables stand between the marks of their records' file; the page's words are its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from sawkv.format.layout import ENGINE_PAGE_SIZE
from sawkv.page import svg

DOCS: Final = Path(__file__).parent.parent / "docs"
RESULTS: Final = DOCS / "results"

Record = dict[str, Any]
Found = dict[tuple[Any, ...], Record]
"""Newest records by what was measured."""

SERVING_COLUMNS: Final = {
    "output_tok_s": ("output tok/s", ",.0f"),
    "prefill_tok_s": ("prefill tok/s", ",.0f"),
    "ttft_mean_s": ("first token, mean s", ".2f"),
    "ttft_p99_s": ("p99 s", ".2f"),
    "tpot_p50_ms": ("ms a token, p50", ".1f"),
    "tpot_p99_ms": ("p99", ".1f"),
    "kv_tokens": ("KV tokens", ","),
}
LOAD_COLUMNS: Final = {
    "output_tok_s": ("output tok/s", ",.0f"),
    "p50_ttft_ms": ("first token, p50 ms", ",.0f"),
    "p99_ttft_ms": ("p99", ",.0f"),
    "p50_tpot_ms": ("ms a token, p50", ".1f"),
    "p99_tpot_ms": ("p99", ".1f"),
}
AGENTS_COLUMNS: Final = {
    "output_tok_s": ("output tok/s", ",.0f"),
    "ttft_p50_s": ("first token, p50 s", ".2f"),
    "late_ttft_p50_s": ("in the last third of turns", ".2f"),
    "tpot_p50_ms": ("ms a token, p50", ".1f"),
    "hit_rate": ("of prompts found", ".1%"),
    "computed_tok_s": ("prompt tok/s computed", ",.0f"),
    "preemptions": ("preemptions", ","),
    "kv_tokens": ("KV tokens", ","),
}
SHOWN: Final = {"bf16": "BF16", "int4-k128-v128": "sawkv", "vllm_int4_per_token_head": "vLLM's INT4"}
"""Names in pictures, where they differ from those of records."""
CARD: Final = "NVIDIA H200"
MODEL: Final = "qwen3-8b"
VLLM: Final = "0.26.0"
"""What README shows of docs/results/serving.jsonl: the version in which all loads have run."""
BASE: Final = "fa3_bf16"
WIDER: Final = {BASE: 4, "fa4_bf16": 4, "triton_bf16": 4, "fa3_fp8": 2}
"""Bytes that a kernel's cache has for each channel of K and V; the INT4 ones have one, and 8 a head for scales and zero
points.
"""
FEW_SHAPES: Final = 3


def main() -> None:
    page = DOCS / "performance.md"
    page.write_text(filled(page.read_text(), RESULTS))
    for name, (_, _, plot, picture) in SECTIONS.items():
        if plot is not None and (records := read_records(RESULTS / name)):
            (DOCS / picture).write_text(svg.standalone(plot(records)))


def filled(page: str, results: Path) -> str:
    """The page with new tables between its marks, one pair for each file of records."""
    for name, (table, caption, _, picture) in SECTIONS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, mark, rest = page.partition(begin)
        _, end_mark, after = rest.partition(end)
        if not mark or not end_mark:
            raise SystemExit(f"docs/performance.md: expected the marks {begin.strip()} and {end.strip()}")
        records = read_records(results / name)
        parts = [table(records), *([f"![{caption}]({picture})"] if picture else [])] if records else []
        page = before + begin + "".join(f"\n{part}\n" for part in parts) + ("\n" if parts else "") + end + after
    return page


def read_records(path: Path) -> list[Record]:
    """The records of a file of JSON lines; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []


def record_line(record: Record) -> str:
    """The record as a line of such a file."""
    return json.dumps(record, separators=(",", ":")) + "\n"


def append_record(file: Path, record: Record) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as sink:
        sink.write(record_line(record))


def serving_table(records: Iterable[Record]) -> str:
    """A table for each device and model."""
    latest = {(r["device"], _served(r), load_name(r), r["format"]): r for r in records}
    return _tables(latest, "load", SERVING_COLUMNS)


def load_table(records: Iterable[Record]) -> str:
    """A table for each device, model and size of requests."""
    ordered = sorted(records, key=lambda r: float(r["rate"]))
    latest = {
        (r["device"], f"{_served(r)}, {r['inp']}/{r['out']} tokens a request", f"{r['rate']:g}", r["format"]): r
        for r in ordered
    }
    return _tables(latest, "requests/s", LOAD_COLUMNS)


def agents_table(records: Iterable[Record]) -> str:
    """A table for each device and model: a row for each set of agents and format."""
    latest = {(r["device"], _served(r), agents_name(r), r["format"]): r for r in records}
    return _tables(latest, "agents", AGENTS_COLUMNS, base="fp8")


def _served(record: Record) -> str:
    """What ratios are within: of two versions of vLLM, each has its own 16 bits."""
    return f"{record['model']} in vLLM {record['vllm']}"


def decode_table(records: Iterable[Record]) -> str:
    """A table for each device: shapes down, kernels across."""

    def table(found: Found) -> str:
        kernels = sorted(
            dict.fromkeys(kernel for _, kernel in found),
            key=lambda kernel: (kernel != BASE, not kernel.startswith("sawkv")),
        )
        rows = []
        for shape in dict.fromkeys(shape for shape, _ in found):
            cells = [_decode_cell(found.get((shape, kernel))) for kernel in kernels]
            error = max((r["rel_err"] for (s, _), r in found.items() if s == shape and "rel_err" in r), default=0.0)
            rows.append([_shape_name(shape), *cells, f"{error:.1e}"])
        header = ["batch x context", *(f"{kernel}: ms, graph" for kernel in kernels), "sawkv's relative error"]
        return markdown(header, rows)

    return _device_tables(records, lambda r: (_shape_of(r), r["kernel"]), table)


def by_kernel_table(records: Iterable[Record]) -> str:
    """A table for each device: kernels down; decode's shapes, `append` and `gather` across, in us, replayed in CUDA
    graphs where they can be.
    """

    def table(found: Found) -> str:
        operations = dict.fromkeys(operation for _, operation in found)
        rows = [
            [kernel, *(_time_cell(found.get((kernel, operation))) for operation in operations)]
            for kernel in dict.fromkeys(kernel for kernel, _ in found)
        ]
        return markdown(["kernel", *operations], rows)

    return _device_tables(records, lambda r: (r["kernel"], _operation_of(r)), table)


def append_gather_table(records: Iterable[Record]) -> str:
    """A table for each device."""

    def table(found: Found) -> str:
        rows = []
        for r in found.values():
            graph = f"{r['graph_ms'] * 1e3:.1f}" if "graph_ms" in r else ""
            share = f"{r['of_copy_bandwidth']:.0%}" if "of_copy_bandwidth" in r else ""
            rows.append([_operation_of(r), r["kernel"], f"{r['ms'] * 1e3:.1f}", graph, share])
        header = ["operation", "kernel", "us", "in a graph, us", "of the card's copy bandwidth"]
        return markdown(header, rows)

    return _device_tables(records, lambda r: (_operation_of(r), r["kernel"]), table)


def loads_of_readme(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """The newest records of the model and card that README shows, by load and format."""
    shown = (CARD, MODEL, VLLM)
    return {(load_name(r), r["format"]): r for r in records if (r["device"], r["model"], r["vllm"]) == shown}


def plot_serving(records: Iterable[Record]) -> str:
    """Output tok/s of each format over that of `bf16`, of the model and card that README shows."""
    found = loads_of_readme(records)
    bases = {load: r["output_tok_s"] for (load, name), r in found.items() if name == "bf16"}
    formats = [name for name in dict.fromkeys(name for _, name in found) if name != "bf16"]
    groups = [
        (load, [found[load, name]["output_tok_s"] / base if (load, name) in found else math.nan for name in formats])
        for load, base in bases.items()
    ]
    title = f"Output tok/s over BF16's, by load (INPUT/OUTPUT x REQUESTS), {CARD}"
    return svg.bars(groups, [SHOWN.get(name, name) for name in formats], show="{:.2f}x".format, title=title)


def plot_load(records: Iterable[Record]) -> str:
    """Time to first token over the rate of requests, for the last-named device."""
    device, found = list(_by_device(records, lambda r: (r["inp"], r["out"], r["rate"], r["format"])).items())[-1]
    rates = sorted({key[2] for key in found})
    lines = []
    for i, name in enumerate(dict.fromkeys(key[3] for key in found)):
        for percentile in ("p99", "p50"):
            points = [
                (rates.index(key[2]), r[f"{percentile}_ttft_ms"] / 1e3) for key, r in found.items() if key[3] == name
            ]
            shown = f"{SHOWN.get(name, name)}, {percentile}"
            lines.append(svg.Line(shown, sorted(points), dotted=percentile == "p50", colour=i))
    return svg.line_chart(
        lines,
        x_labels=[f"{rate:g}" for rate in rates],
        x_title="requests per second",
        y_title="time to first token, s",
        title=f"Latency under load, {device}",
    )


def plot_agents(records: Iterable[Record]) -> str:
    """Time to first token turn by turn, for the last-named device and its agents with the most tokens."""
    device, found = list(_by_device(records, lambda r: (agents_name(r), r["format"])).items())[-1]
    most = max(found.values(), key=lambda r: r["work"]["agents"] * r["work"]["grow_to"])
    shown = {name: r for (agents, name), r in found.items() if agents == agents_name(most)}
    return svg.line_chart(
        [svg.Line(SHOWN.get(name, name), list(enumerate(r["ttft_by_turn_s"]))) for name, r in shown.items()],
        x_labels=[str(turn + 1) for turn in range(most["work"]["turns"])],
        x_title=f"turn of {agents_name(most)}",
        y_title="median time to first token, s",
        title=f"Agents, {device}",
    )


def plot_roofline(records: Iterable[Record]) -> str:
    """Bandwidth over bytes to read, for the last-named device. Kernels of few shapes are in the table alone."""
    device, found = list(_by_device(records, lambda r: (r["shape"], r["kernel"])).items())[-1]
    roof = max(r["read_gb_s"] for r in found.values())
    series = []
    for kernel in dict.fromkeys(kernel for _, kernel in found):
        shown = [r for (_, k), r in found.items() if k == kernel and r["query_len"] == 1 and "shared_prefix" not in r]
        if len(shown) > FEW_SHAPES:
            series.append((kernel, [_own_bytes_and_speed(r) for r in shown]))
    return svg.cloud(
        series,
        level=(f"this card reads {roof:,} GB/s", roof),
        x_title="KV cache to read, MB",
        y_title="GB/s",
        title=f"Decode attention, {device}",
    )


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["-"] * len(header), *rows])


def _tables(
    latest: dict[tuple[str, str, str, str], Record],
    first_column: str,
    columns: dict[str, tuple[str, str]],
    base: str = "bf16",
) -> str:
    """For each device and what was served, a row for each load and format; ratios are to `base` of the same load."""
    parts = []
    for device, served in dict.fromkeys(key[:2] for key in latest):
        rows = []
        for load in dict.fromkeys(key[2] for key in latest if key[:2] == (device, served)):
            group = {key[3]: r for key, r in latest.items() if key[:3] == (device, served, load)}
            basis = group.get(base, {})
            for name, r in sorted(group.items(), key=lambda item: item[0] != base):
                cells = [
                    _cell(r.get(field), None if name == base else basis.get(field), form)
                    for field, (_, form) in columns.items()
                ]
                rows.append([load, name, *cells, r["commit"]])
        header = [first_column, "KV cache", *(name for name, _ in columns.values()), "commit"]
        parts.append(f"{served} on {device}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def _cell(value: float | None, base: float | None, form: str) -> str:
    if value is None:
        return ""
    return f"{value:{form}}" + (f" ({value / base:.2f}x)" if base else "")


def _decode_cell(record: Record | None) -> str:
    if record is None:
        return ""
    speedups = [record.get(f"{kind}speedup_vs_{BASE}") for kind in ("", "graph_")]
    times = [record["ms"], record["graph_ms"]]
    shown = [
        f"{ms:.4g}" + (f" ({s:.2f}x)" if s and record["kernel"] != BASE else "")
        for ms, s in zip(times, speedups, strict=True)
    ]
    return ", ".join(shown)


def _operation_of(record: Record) -> str:
    if "shape" in record:
        return _shape_name(_shape_of(record))
    if "tokens" in record:
        return f"{record['operation']}, {record['tokens']:,} tokens"
    return f"{record['operation']}, {'rotated' if record['rotated'] else 'rotated back'}"


def _time_cell(record: Record | None) -> str:
    """Microseconds, and the speed-up over the base or the share of the card's bandwidth, where there is one."""
    if record is None:
        return ""
    ms = record["graph_ms"] if "graph_ms" in record else record["ms"]
    us = f"{ms * 1e3:.1f}"
    if record.get("kernel") != BASE and (ratio := record.get(f"graph_speedup_vs_{BASE}")):
        return f"{us} ({ratio:.2f}x)"
    return f"{us} ({record['of_copy_bandwidth']:.0%})" if "of_copy_bandwidth" in record else us


def _own_bytes_and_speed(record: Record) -> tuple[float, float]:
    """Megabytes of the kernel's own cache, and GB/s in a CUDA graph."""
    head_dim = record["head_dim"]
    int4_bytes = record["useful_gb_s"] * record["ms"] * 1e6
    wider = WIDER.get(record["kernel"])
    own = int4_bytes * wider * head_dim / (head_dim + 8) if wider else int4_bytes
    return own / 1e6, own / 1e6 / record["graph_ms"]


def _device_tables(
    records: Iterable[Record], key: Callable[[Record], tuple[Any, ...]], table: Callable[[Found], str]
) -> str:
    return "\n\n".join(
        f"{device}, {_commits(found.values())}\n\n{table(found)}" for device, found in _by_device(records, key).items()
    )


def _by_device(records: Iterable[Record], key: Callable[[Record], tuple[Any, ...]]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for record in records:
        found.setdefault(record["device"], {})[key(record)] = record
    return found


def _commits(records: Iterable[Record]) -> str:
    return "commit " + ", ".join(dict.fromkeys(record["commit"] for record in records))


def _shape_of(record: Record) -> str:
    """Shapes name the size of their pages only where it is not the engine's; earlier records were made with another
    one.
    """
    return str(record["shape"]).removesuffix(f" page {ENGINE_PAGE_SIZE}")


def _shape_name(shape: str) -> str:
    return shape.replace("x", " x ", 1) if shape[0].isdigit() and "x" in shape.split(" ")[0] else shape


def load_name(record: Record) -> str:
    """INPUT/OUTPUT x REQUESTS, or PREFIX+NEW/OUTPUT x REQUESTS."""
    prefix = record.get("shared_prefix", 0)
    inp = f"{prefix}+{record['inp'] - prefix}" if prefix else f"{record['inp']}"
    return f"{inp}/{record['out']} x {record['requests']}"


def agents_name(record: Record) -> str:
    """Agents, the tokens to which each grows, and its turns."""
    work = record["work"]
    return f"{work['agents']} x {work['grow_to']:,} in {work['turns']} turns"


SECTIONS: Final[
    dict[str, tuple[Callable[[Iterable[Record]], str], str, Callable[[Iterable[Record]], str] | None, str]]
] = {
    "serving.jsonl": (
        serving_table,
        "Output tokens per second of each cache over those of BF16",
        plot_serving,
        "serving.svg",
    ),
    "fp8_weights.jsonl": (serving_table, "", None, ""),
    "load.jsonl": (load_table, "Time to first token over the rate of requests", plot_load, "load.svg"),
    "agents.jsonl": (agents_table, "Median time to first token by turn", plot_agents, "agents.svg"),
    "decode.jsonl": (
        decode_table,
        "Bandwidth of decode kernels over the bytes that they must read",
        plot_roofline,
        "roofline.svg",
    ),
    "turns.jsonl": (decode_table, "", None, ""),
    "append_gather.jsonl": (append_gather_table, "", None, ""),
    "fewer_bits/decode.jsonl": (by_kernel_table, "", None, ""),
    "fewer_bits/append_gather.jsonl": (by_kernel_table, "", None, ""),
}
"""For each file of records: table, and where there is one, the picture's caption, plot and file."""

if __name__ == "__main__":
    main()
