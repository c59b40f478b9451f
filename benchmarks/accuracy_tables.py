"""The tables of docs/lab/methods.md, from the records of `benchmarks.accuracy`.

python -m benchmarks.accuracy_tables docs/results/accuracy.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DEFAULT, PEER = "default", "vllm_int4_per_token_head"
CONTROLS = ("reference", "bf16_floor", "bf16", "int8", "int8_plain", "fp8")
MODELS = ("sawkv-6m", "sawkv-6m-bias", "sawkv-30m")
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
Record = dict[str, Any]
Cell = tuple[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page; default: print them")
    args = parser.parse_args()
    records: list[Record] = [json.loads(line) for line in args.records.read_text().splitlines()]
    cells = list(dict.fromkeys((record["model"], record["stress"]) for record in records))
    cells.sort(key=lambda cell: (MODELS.index(cell[0]) if cell[0] in MODELS else len(MODELS), cell[1]))
    by_cell = {cell: {r["method"]: r for r in records if (r["model"], r["stress"]) == cell} for cell in cells}
    tables = "\n\n".join((kl_table(by_cell), peer_table(by_cell), worst_table(by_cell)))
    if args.write is None:
        print(tables)
        return
    page = args.write.read_text()
    before, mark, rest = page.partition(BEGIN)
    _, end_mark, after = rest.partition(END)
    if not mark or not end_mark:
        raise SystemExit(f"{args.write}: expected the marks {BEGIN} and {END}")
    args.write.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


def kl_table(by_cell: dict[Cell, dict[str, Record]]) -> str:
    """Mean KL of every method in every cell; the methods in the order of their bits, then of their largest KL."""
    methods: dict[str, float] = {}
    for records in by_cell.values():
        methods |= {name: record["bits"] for name, record in records.items() if name != "reference"}
    worst = {name: max(records[name]["mean_kl"] for records in by_cell.values() if name in records) for name in methods}
    heads = [f"{model} s={stress}" for model, stress in by_cell]
    lines = [f"| method | bits | {' | '.join(heads)} |", f"|-|-|{'-|' * len(heads)}"]
    for name in sorted(methods, key=lambda name: (name not in CONTROLS, worst[name])):
        values = [_kl(records.get(name)) for records in by_cell.values()]
        bold = "**" if name == DEFAULT else ""
        lines.append(f"| {bold}{name}{bold} | {methods[name]:g} | {' | '.join(values)} |")
    return "\n".join(lines)


def peer_table(by_cell: dict[Cell, dict[str, Record]]) -> str:
    """The default against the peer, and against the best method that takes no more bits."""
    lines = [
        (
            "| cell | default | vLLM's INT4 | ratio | best at no more bits | its KL | ratio | pass-key: 16 bits,"
            " default, vLLM's INT4 |"
        ),
        "|-|-|-|-|-|-|-|-|",
    ]
    for (model, stress), records in by_cell.items():
        default, peer = records[DEFAULT], records[PEER]
        rivals = [r for r in records.values() if r["bits"] <= default["bits"] and r["method"] != DEFAULT]
        best = min(rivals, key=lambda record: float(record["mean_kl"]))
        recalled = [_share(records[name]["passkey"]) for name in ("reference", DEFAULT, PEER)]
        lines.append(
            f"| {model} s={stress} | {_kl(default)} | {_kl(peer)} | {default['mean_kl'] / peer['mean_kl']:.2f} "
            f"| {best['method']} | {_kl(best)} | {default['mean_kl'] / best['mean_kl']:.2f} | {', '.join(recalled)} |"
        )
    return "\n".join(lines)


def worst_table(by_cell: dict[Cell, dict[str, Record]]) -> str:
    """The default's tail, cell by cell."""
    lines = ["| cell | mean KL | +- | p99.9 | max | same top-1 | ppl | ppl in 16 bits |", "|-|-|-|-|-|-|-|-|"]
    for (model, stress), records in by_cell.items():
        r = records[DEFAULT]
        lines.append(
            f"| {model} s={stress} | {_kl(r)} | {r['kl_se']:.4f} | {r['kl_p999']:.3f} | {r['kl_max']:.2f} |"
            f" {r['same_top1']:.2%} | {r['ppl']:.3f} | {records['reference']['ppl']:.3f} |"
        )
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _kl(record: Record | None) -> str:
    if record is None:
        return "-"
    value = float(record["mean_kl"])
    return f"{value:.5f}" if value < 0.01 else f"{value:.4f}" if value < 1 else f"{value:.2f}"


if __name__ == "__main__":
    main()
