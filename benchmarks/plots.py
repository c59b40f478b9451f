"""Tables and plots of docs/performance.md.

    python -m benchmarks.plots

They are made from the records in docs/results; nothing is shown that was not recorded. Of records of the same thing the last one counts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from sawkv.format.layout import ENGINE_PAGE_SIZE

DOCS: Final = Path(__file__).parent.parent / "docs"
RESULTS: Final = DOCS / "results"

Record = dict[str, Any]

INTRODUCTION: Final = """# Performance

Made by `python -m benchmarks.plots` from the records in [results](results): to change a number, measure again. Tables name their device,
vLLM and commit. What was tried, and why it did or did not work, is in the [lab log](lab/README.md).
"""
SERVING: Final = """## Whole engine

Qwen3-8B's shape with random weights in vLLM, `gpu_memory_utilization` 0.90, all requests of a load sent at once: INPUT/OUTPUT x REQUESTS,
and PREFIX+NEW where requests share a prefix. Ratios are to the newest record of vLLM's own 16-bit cache (`bf16`); rows of one commit were
measured on one card, one format after the other, those of other commits perhaps on another card. Prefill counts the time in the queue.
`benchmarks/serving.py` says what each column is. Command: `python -m benchmarks.serving`.
"""
FP8_WEIGHTS: Final = """## Whole engine, FP8 weights

The same with weights and activations in FP8: products take less of a step, and the cache more. Command: `python -m benchmarks.serving
--formats bf16 int4-k128-v128 --engine '{"quantization": "fp8"}' --loads 256/1024x256 16384/1024x8 --output docs/results/fp8_weights.jsonl`.
"""
LOAD: Final = """## Latency under load

vLLM's load generator against its server; requests arrive at random (Poisson), 20 for each request a second, so p99 is nearly the worst.
Command: `python -m benchmarks.load`.
"""
DECODE: Final = """## Decode attention

One layer, bf16 queries; sawkv's time includes rotating Q and un-rotating the output. `ms` is the median of triton's do_bench, which empties
the L2 cache before each run; `graph` is the replay of a CUDA graph over caches that are together larger than the L2 cache, which is how
vLLM decodes. Speed-ups, in brackets, are over FlashAttention-3 in bf16 in the same run. Outputs of sawkv's kernels are first compared with
fp32 attention over the decoded cache. Pages have 64 tokens, but 16 in what was measured before 6a7209b, if a row does not name them.
Command: `python -m benchmarks.kernels`.

The picture shows the bytes of each kernel's own cache, divided by its time in a CUDA graph: at the dashed line a kernel runs at the speed
of reading its cache.
"""
APPEND: Final = """## Append and gather

append writes new tokens' K and V of 8 heads of 128 channels; gather decodes 8 sequences of 16,384 tokens into a 16-bit workspace.
Command: `python -m benchmarks.kernels`.
"""

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
BASE: Final = "fa3_bf16"
WIDER: Final = {BASE: 4, "fa3_fp8": 2}
"""Bytes that a kernel's cache has for each channel of K and V; the INT4 ones have one, and 8 a head for scales and zero points."""


def main() -> None:
    (DOCS / "performance.md").write_text(page(RESULTS))
    for name, (_, _, _, plot, picture) in SECTIONS.items():
        if plot is not None and (records := read_records(RESULTS / name)):
            plot(records, DOCS / picture)


def page(results: Path) -> str:
    """docs/performance.md: a section for each file of records that exists."""
    parts = [INTRODUCTION]
    for name, (text, table, caption, _, picture) in SECTIONS.items():
        if records := read_records(results / name):
            parts += [text, table(records) + "\n"]
            parts += [f"![{caption}]({picture})\n"] if picture else []
    return "\n".join(parts)


def read_records(path: Path) -> list[Record]:
    """The records of a file of JSON lines; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []


def serving_table(records: Iterable[Record]) -> str:
    """A table for each device and model."""
    latest = {(r["device"], r.get("model", ""), load_name(r), r["format"]): r for r in records}
    return _tables(latest, "load", SERVING_COLUMNS, lambda device, model: f"{model} on {device}")


def load_table(records: Iterable[Record]) -> str:
    """A table for each device, model and size of requests."""
    ordered = sorted(records, key=lambda r: float(r["rate"]))
    latest = {(r["device"], f"{r['model']}, {r['inp']}/{r['out']}", f"{r['rate']:g}", r["format"]): r for r in ordered}
    return _tables(latest, "requests/s", LOAD_COLUMNS, lambda device, model: f"{model} tokens a request, on {device}")


def decode_table(records: Iterable[Record]) -> str:
    """A table for each device: shapes down, kernels across."""
    parts = []
    for device, found in _by_device(records, lambda r: (_shape_of(r), r["kernel"])).items():
        kernels = sorted(dict.fromkeys(kernel for _, kernel in found), key=lambda kernel: (kernel != BASE, not kernel.startswith("sawkv")))
        rows = []
        for shape in dict.fromkeys(shape for shape, _ in found):
            cells = [_decode_cell(found.get((shape, kernel))) for kernel in kernels]
            error = max((r["rel_err"] for (s, _), r in found.items() if s == shape and "rel_err" in r), default=0.0)
            rows.append([_shape_name(shape), *cells, f"{error:.1e}"])
        header = ["batch x context", *(f"{kernel}: ms, graph" for kernel in kernels), "sawkv's relative error"]
        parts.append(f"{device}, {_commits(found.values())}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def append_gather_table(records: Iterable[Record]) -> str:
    """A table for each device."""
    parts = []
    for device, found in _by_device(records, lambda r: (r["operation"], r["kernel"], r.get("tokens"), r.get("rotated"))).items():
        rows = []
        for (operation, kernel, tokens, rotated), r in found.items():
            what = f"{operation}, {tokens:,} tokens" if tokens else f"{operation}, {'rotated' if rotated else 'rotated back'}"
            graph = f"{r['graph_ms'] * 1e3:.1f}" if "graph_ms" in r else ""
            share = f"{r['of_copy_bandwidth']:.0%}" if "of_copy_bandwidth" in r else ""
            rows.append([what, kernel, f"{r['ms'] * 1e3:.1f}", graph, share])
        header = ["operation", "kernel", "us", "in a graph, us", "of the card's copy bandwidth"]
        parts.append(f"{device}, {_commits(found.values())}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def plot_serving(records: Iterable[Record], path: Path) -> None:
    """Output tok/s of each format over that of `bf16`, for the loads of the last-named device that have both."""
    device, found = list(_by_device(records, lambda r: (load_name(r), r["format"])).items())[-1]
    bases = {load: r["output_tok_s"] for (load, name), r in found.items() if name == "bf16"}
    formats = [name for name in dict.fromkeys(name for _, name in found) if name != "bf16"]
    with _figure(path) as axes:
        width = 0.8 / max(1, len(formats))
        for i, name in enumerate(formats):
            ratios = [
                (j, found[load, name]["output_tok_s"] / base) for j, (load, base) in enumerate(bases.items()) if (load, name) in found
            ]
            axes.bar([j + (i - (len(formats) - 1) / 2) * width for j, _ in ratios], [ratio for _, ratio in ratios], width, label=name)
        axes.axhline(1, color="black", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(bases)), list(bases), rotation=20, ha="right")
        axes.set(ylabel="output tok/s over bf16's", title=f"Whole engine, {device}")
        axes.legend(fontsize=8)


def plot_load(records: Iterable[Record], path: Path) -> None:
    """Time to first token over the rate of requests, for the last-named device."""
    device, found = list(_by_device(records, lambda r: (r["inp"], r["out"], r["rate"], r["format"])).items())[-1]
    with _figure(path) as axes:
        for name in dict.fromkeys(key[3] for key in found):
            rows = sorted((r["rate"], r["p50_ttft_ms"] / 1e3, r["p99_ttft_ms"] / 1e3) for key, r in found.items() if key[3] == name)
            rates, medians, worst = zip(*rows, strict=True)
            (line,) = axes.plot(rates, worst, marker="o", label=f"{name}, p99")
            axes.plot(rates, medians, marker="o", linestyle=":", color=line.get_color(), label=f"{name}, p50")
        axes.set(yscale="log", xlabel="requests a second", ylabel="time to first token, s", title=f"Latency under load, {device}")
        axes.set_xticks(sorted({key[2] for key in found}))
        axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        axes.legend(fontsize=8)


def plot_roofline(records: Iterable[Record], path: Path) -> None:
    """Bandwidth over bytes to read, for the last-named device."""
    device, found = list(_by_device(records, lambda r: (r["shape"], r["kernel"])).items())[-1]
    roof = max(r["read_gb_s"] for r in found.values())
    with _figure(path) as axes:
        for kernel in dict.fromkeys(kernel for _, kernel in found):
            shown = [r for (_, k), r in found.items() if k == kernel and r["query_len"] == 1 and "shared_prefix" not in r]
            points = [_own_bytes_and_speed(r) for r in shown]
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linestyle="none", label=kernel)
        axes.axhline(roof, color="black", linestyle="--", linewidth=1)
        axes.annotate(f"this card reads {roof:,} GB/s", (0.98, roof), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.set(xscale="log", ylim=(0, roof * 1.15), xlabel="KV cache to read, MB", ylabel="GB/s", title=f"Decode attention, {device}")
        axes.legend(loc="center left", fontsize=8)


@contextlib.contextmanager
def _figure(path: Path) -> Iterator[Any]:
    """Axes that are saved to `path` at the end, to the same bytes for the same records."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "sawkv", "font.size": 9}
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    axes.grid(alpha=0.3)
    yield axes
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["-"] * len(header), *rows])


def _tables(
    latest: dict[tuple[str, str, str, str], Record],
    first_column: str,
    columns: dict[str, tuple[str, str]],
    title: Callable[[str, str], str],
) -> str:
    """For each device and model, a row for each load and format; ratios are to the format `bf16` of the same load."""
    parts = []
    for device, model in dict.fromkeys(key[:2] for key in latest):
        rows = []
        for load in dict.fromkeys(key[2] for key in latest if key[:2] == (device, model)):
            group = {key[3]: r for key, r in latest.items() if key[:3] == (device, model, load)}
            base = group.get("bf16", {})
            for name, r in sorted(group.items(), key=lambda item: item[0] != "bf16"):
                cells = [_cell(r.get(field), None if name == "bf16" else base.get(field), form) for field, (_, form) in columns.items()]
                rows.append([load, name, *cells, r["commit"]])
        header = [first_column, "KV cache", *(name for name, _ in columns.values()), "commit"]
        versions = ", ".join(dict.fromkeys(f"vLLM {r['vllm']}" for key, r in latest.items() if key[:2] == (device, model)))
        parts.append(f"{title(device, model)}, {versions}\n\n{markdown(header, rows)}")
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
    shown = [f"{ms:.4g}" + (f" ({s:.2f}x)" if s and record["kernel"] != BASE else "") for ms, s in zip(times, speedups, strict=True)]
    return ", ".join(shown)


def _own_bytes_and_speed(record: Record) -> tuple[float, float]:
    """Megabytes of the kernel's own cache, and GB/s in a CUDA graph."""
    head_dim = record["head_dim"]
    int4_bytes = record["useful_gb_s"] * record["ms"] * 1e6
    wider = WIDER.get(record["kernel"])
    own = int4_bytes * wider * head_dim / (head_dim + 8) if wider else int4_bytes
    return own / 1e6, own / 1e6 / record["graph_ms"]


def _by_device(records: Iterable[Record], key: Callable[[Record], tuple[Any, ...]]) -> dict[str, dict[tuple[Any, ...], Record]]:
    found: dict[str, dict[tuple[Any, ...], Record]] = {}
    for record in records:
        found.setdefault(record["device"], {})[key(record)] = record
    return found


def _commits(records: Iterable[Record]) -> str:
    return "commit " + ", ".join(dict.fromkeys(record["commit"] for record in records))


def _shape_of(record: Record) -> str:
    """Shapes name the size of their pages only where it is not the engine's; earlier records were made with another one."""
    return str(record["shape"]).removesuffix(f" page {ENGINE_PAGE_SIZE}")


def _shape_name(shape: str) -> str:
    return shape.replace("x", " x ", 1) if shape[0].isdigit() and "x" in shape.split(" ")[0] else shape


def load_name(record: Record) -> str:
    """INPUT/OUTPUT x REQUESTS, or PREFIX+NEW/OUTPUT x REQUESTS."""
    prefix = record.get("shared_prefix", 0)
    inp = f"{prefix}+{record['inp'] - prefix}" if prefix else f"{record['inp']}"
    return f"{inp}/{record['out']} x {record['requests']}"


SECTIONS: Final[dict[str, tuple[str, Callable[[Iterable[Record]], str], str, Callable[[Iterable[Record], Path], None] | None, str]]] = {
    "serving.jsonl": (
        SERVING,
        serving_table,
        "Output tokens a second of each cache format over those of bf16",
        plot_serving,
        "serving.svg",
    ),
    "fp8_weights.jsonl": (FP8_WEIGHTS, serving_table, "", None, ""),
    "load.jsonl": (LOAD, load_table, "Time to first token over the rate of requests", plot_load, "load.svg"),
    "decode.jsonl": (DECODE, decode_table, "Bandwidth of decode kernels over the bytes that they must read", plot_roofline, "roofline.svg"),
    "append_gather.jsonl": (APPEND, append_gather_table, "", None, ""),
}
"""For each file of records: text, table, and where there is one, the picture's caption, plot and file."""

if __name__ == "__main__":
    main()
