"""Tables and plots of docs/performance.md.

    python -m benchmarks.plots

They are made from the records in docs/results; nothing is shown that was not recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).parent.parent / "docs" / "results"

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The records of a file of JSON lines; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []


def serving_table(records: Iterable[Record]) -> str:
    """A Markdown table for each device, model and load; ratios are to `bf16` of the same ones."""
    latest = {(*_group(r), r["format"]): r for r in records}
    parts = []
    for device, model in dict.fromkeys(key[:2] for key in latest):
        rows = []
        for load in dict.fromkeys(key[2] for key in latest if key[:2] == (device, model)):
            group = {key[3]: r for key, r in latest.items() if key[:3] == (device, model, load)}
            base = group.get("bf16")
            rows += [_serving_row(load, r, base if base is not r else None) for r in group.values()]
        header = [
            "load",
            "KV cache",
            "output tok/s",
            "prefill tok/s",
            "first token, mean s",
            "p99 s",
            "ms a token, p50",
            "p99",
            "KV tokens",
            "commit",
        ]
        parts.append(f"{model} on {device}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def _group(record: Record) -> tuple[str, str, str]:
    prefix = record.get("shared_prefix", 0)
    inp = f"{prefix}+{record['inp'] - prefix}" if prefix else f"{record['inp']}"
    return record["device"], record.get("model", ""), f"{inp}/{record['out']} x {record['requests']}"


def _serving_row(load: str, record: Record, base: Record | None) -> list[str]:
    def cell(name: str, form: str) -> str:
        value = record.get(name)
        if value is None:
            return ""
        ratio = f" ({value / base[name]:.2f}x)" if base and base.get(name) else ""
        return f"{value:{form}}{ratio}"

    forms = {
        "output_tok_s": ",.0f",
        "prefill_tok_s": ",.0f",
        "ttft_mean_s": ".2f",
        "ttft_p99_s": ".2f",
        "tpot_p50_ms": ".1f",
        "tpot_p99_ms": ".1f",
        "kv_tokens": ",",
    }
    return [load, record["format"], *(cell(name, form) for name, form in forms.items()), record["commit"]]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["-"] * len(header), *rows])
