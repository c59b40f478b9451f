"""The tables of real checkpoints in docs/accuracy.md and its picture, from the records of `benchmarks.fidelity`, and
limits on these figures.

    python -m benchmarks.fidelity_tables --write docs/accuracy.md     # the tables, and docs/kl.svg
    python -m benchmarks.fidelity_tables --check                      # one line per limit; exit status: failures
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.fidelity import RESULTS, interval
from sawkv.page import svg

PICTURE: Final = "kl.svg"
BEGIN, END = "<!-- real checkpoints -->", "<!-- end of real checkpoints -->"
SERVED, PEER, FP8, LAB = "served", "vllm_int4_per_token_head", "fp8", "prepared"
NAMES: Final = {
    "served": "**`sawkv serve`**",
    "unprepared": "`sawkv serve --no-prepare`",
    "int8": "`sawkv serve --format int8`",
    "bf16": "16-bit pages of sawkv: rounding alone",
    "fp8": "vLLM, `fp8`",
    "vllm_int4_per_token_head": "vLLM, `int4_per_token_head`",
}
NEAR_LAB, NEAR_PEER, NEAR_FP8, NEAR_FP8_OTHERS, PERPLEXITY = 1.1, 0.35, 1.0, 2.0, 1.03
"""Of KL: what is served over the lab's figure, over vLLM's INT4, over fp8 on Qwen2.5 and on others; of perplexity: over
16 bits.
"""
DECAY: Final = 1.5
"""KL over that of fp8 at any position of a long window, over the same quotient at its first positions."""
MISSED: Final = 0.05
"""Share of answers that 16 bits give and what is served may not."""
LEAST_BITS, MOST_BITS = 2, 9
"""Ends of the picture's axis."""
Record = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RESULTS / "real_models.jsonl", help="default: %(default)s")
    parser.add_argument("--recall", type=Path, default=RESULTS / "real_recall.jsonl", help="default: %(default)s")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page; default: print them")
    parser.add_argument(
        "--check", action="store_true", help="compare the records with their limits; exit 1 if one is missed"
    )
    args = parser.parse_args()
    records, recall = read(args.records), read(args.recall)
    if args.check:
        failed = 0
        for passed, what in [*checks(records), *position_checks(records), *recall_checks(recall)]:
            failed += not passed
            print(f"{'PASS' if passed else 'FAIL'}  {what}")
        return failed
    text = tables(records, recall)
    if args.write is None:
        print(text)
        return 0
    before, mark, rest = args.write.read_text().partition(BEGIN)
    _, end_mark, after = rest.partition(END)
    if not mark or not end_mark:
        raise SystemExit(f"{args.write}: expected the marks {BEGIN} and {END}")
    args.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    args.write.with_name(PICTURE).write_text(svg.standalone(curves(records)))
    return 0


def read(file: Path) -> list[Record]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def curves(records: Sequence[Record]) -> str:
    """KL over bits: for each model a line through sawkv's formats, and a dotted one through vLLM's own."""
    lines = []
    for number, (model, found) in enumerate(comparable(records).items()):
        for name, own in (("sawkv", True), ("vLLM", False)):
            points = sorted((r["bits"] - LEAST_BITS, r["mean_kl"]) for r in found if ours(r["method"]) == own)
            label = f"{model.removesuffix('-Instruct')}, {name}"
            lines.append(svg.Line(label, points, dotted=not own, colour=number))
    return svg.line_chart(
        lines,
        x_labels=[str(bits) for bits in range(LEAST_BITS, MOST_BITS + 1)],
        x_title="bits of a value of K or V, with its share of scales",
        y_title="mean KL from 16 bits",
        title="What fewer bits cost",
    )


def caption(records: Sequence[Record]) -> str:
    """The picture, and where its points were measured."""
    places = [
        f"{model} {'through a server' if found[0]['through'] == 'server' else 'in the lab'}, {found[0]['tokens']:,}"
        f" predictions, {found[0]['device']}"
        for model, found in comparable(records).items()
    ]
    return (
        f"![KL from 16 bits over bits, by model]({PICTURE})\n\n"
        f"Formats of sawkv as they are served, and vLLM's own INT4 and fp8; prose. {'; '.join(places)}."
    )


def comparable(records: Sequence[Record]) -> dict[str, list[Record]]:
    """For each model, formats of sawkv and vLLM's own caches that were measured in one place, on the same
    windows of prose: of its places the one with the most caches, through a server before others.
    """
    places: dict[str, dict[tuple[Any, ...], list[Record]]] = {}
    for r in records:
        if r["text"] == "prose" and r["bits"] is not None and (ours(r["method"]) or r["method"] in (FP8, PEER)):
            place = r["through"], r["device"], r.get("window"), r["tokens"]
            places.setdefault(r["model"], {}).setdefault(place, []).append(r)

    def fullness(found: Sequence[Record]) -> tuple[int, bool]:
        return len({r["method"] for r in found}), found[0]["through"] == "server"

    return {model: max(of_model.values(), key=fullness) for model, of_model in places.items()}


def ours(method: str) -> bool:
    """Whether a method is a format of sawkv as it is served: prepared, below 8 bits."""
    return method in (SERVED, LAB, "int8") or method.startswith(f"{LAB}_")


def tables(records: Sequence[Record], recall: Sequence[Record]) -> str:
    """The picture; a table for each model and text, of what was asked through a server; then recall."""
    parts = [caption(records)]
    records = [record for record in records if record["through"] == "server"]
    for key in dict.fromkeys((r["model"], r["text"], r["window"], r["device"]) for r in records):
        rows = [r for r in records if (r["model"], r["text"], r["window"], r["device"]) == key]
        model, text, window, device = key
        commits = ", ".join(sorted({r["commit"] for r in rows}))
        parts.append(
            f"**{model}**, {text}, {rows[0]['tokens']:,} predictions in windows of {window}, {device}, {commits}; "
            f"perplexity in 16 bits {rows[0]['ppl_16bit']:.2f}\n\n"
            "| served by | bits | mean KL (95 %) | p99.9 | same top-1 | perplexity |\n|-|-|-|-|-|-|\n"
            + "\n".join(_row(r) for r in sorted(rows, key=lambda r: float(r["mean_kl"])))
        )
        if "kl_by_position" in rows[0]:
            parts.append(position_table(rows))
    if recall:
        parts.append(recall_table(recall))
    return "\n\n".join(parts)


def position_table(rows: Sequence[Record]) -> str:
    """Mean KL by the position of the predicted token in its window, of all records of one model and text."""
    ends = [f"{part['start']:,} to {part['end']:,}" for part in rows[0]["kl_by_position"]]
    lines = [f"| mean KL at positions | {' | '.join(ends)} |", f"|-|{'-|' * len(ends)}"]
    for r in rows:
        cells = (_kl(part["mean_kl"]) for part in r["kl_by_position"])
        lines.append(f"| {NAMES.get(r['method'], r['method'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def position_checks(records: Sequence[Record]) -> Iterator[tuple[bool, str]]:
    """Whether what is served keeps its distance to fp8 over the positions of long windows."""
    long = {
        (r["method"], r["model"], r["text"], r["window"], r["device"]): r
        for r in records
        if r["through"] == "server" and "kl_by_position" in r
    }
    for (method, *where), r in long.items():
        fp8 = long.get((FP8, *where))
        if method != SERVED or fp8 is None:
            continue
        pairs = zip(r["kl_by_position"], fp8["kl_by_position"], strict=True)
        first, *later = [(part["end"], part["mean_kl"] / other["mean_kl"]) for part, other in pairs]
        for end, ratio in later:
            what = (
                f"{r['model']}, {r['text']}, to position {end:,}: KL {ratio:.2f} of fp8, where it is {first[1]:.2f} to"
                f" position {first[0]:,}"
            )
            yield ratio <= DECAY * first[1], f"{what}, at most {DECAY} times that"


def _row(r: Record) -> str:
    name = NAMES.get(r["method"], f"`{r['method']}`")
    low, high = r["kl_ci95"]
    bits = "" if r["bits"] is None else f"{r['bits']:g}"
    change = r["ppl"] / r["ppl_16bit"] - 1
    return (
        f"| {name} | {bits} | {_kl(r['mean_kl'])} ({_kl(low)} to {_kl(high)}) | {r['kl_p999']:.3g} |"
        f" {r['same_top1']:.1%} | {r['ppl']:.2f} ({change:+.1%}) |"
    )


def recall_table(recall: Sequence[Record]) -> str:
    """Right answers by model, task and length, over all depths."""
    methods = list(dict.fromkeys(r["method"] for r in recall))
    lines = [f"| model | task | tokens | {' | '.join(methods)} |", f"|-|-|-|{'-|' * len(methods)}"]
    for model, task, length in dict.fromkeys((r["model"], r["task"], r["length"]) for r in recall):
        cells = []
        for method in methods:
            rows = [
                r for r in recall if (r["model"], r["task"], r["length"], r["method"]) == (model, task, length, method)
            ]
            cells.append(f"{sum(r['correct'] for r in rows)} of {sum(r['asked'] for r in rows)}" if rows else "-")
        lines.append(f"| {model} | {task} | {length:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def checks(records: Sequence[Record]) -> Iterator[tuple[bool, str]]:
    """Whether each thing wanted of what is served came, and what it is."""
    for r in records:
        if (r["method"], r["through"]) != (SERVED, "server"):
            continue
        alike = [o for o in records if all(o.get(key) == r[key] for key in ("model", "text", "window", "tokens"))]
        fp8 = NEAR_FP8 if "qwen2.5" in r["model"].lower() else NEAR_FP8_OTHERS
        for method, through, limit in ((LAB, "lab", NEAR_LAB), (PEER, "server", NEAR_PEER), (FP8, "server", fp8)):
            for other in alike:
                if (other["method"], other["through"]) == (method, through) and (
                    through == "lab" or other["device"] == r["device"]
                ):
                    ratio, (low, high) = r["mean_kl"] / other["mean_kl"], ratio_interval(r, other)
                    yield (
                        ratio <= limit,
                        (
                            f"{r['model']}, {r['text']}: KL {ratio:.2f} ({low:.2f} to {high:.2f}) of {method}, at most"
                            f" {limit}"
                        ),
                    )
        ratio, (low, high) = r["ppl"] / r["ppl_16bit"], r["ppl_ratio_ci95"]
        yield (
            ratio <= PERPLEXITY,
            (
                f"{r['model']}, {r['text']}: perplexity {ratio:.4f} ({low:.4f} to {high:.4f}) of 16 bits, at most"
                f" {PERPLEXITY}"
            ),
        )


def ratio_interval(a: Record, b: Record) -> tuple[float, float]:
    """95 % of the ratio of two mean KLs on the same windows."""
    means = torch.tensor([a["kl_by_window"], b["kl_by_window"]], dtype=torch.float64)
    low, high = interval(means, lambda drawn: drawn[0] / drawn[1]).tolist()
    return low, high


def recall_checks(recall: Sequence[Record]) -> Iterator[tuple[bool, str]]:
    """By model, task, length and depth: answers that 16 bits give and what is served does not."""
    cells = {(r["model"], r["task"], r["length"], r["depth"], r["method"]): r for r in recall}
    for (model, task, length, depth, method), r in cells.items():
        wide = cells.get((model, task, length, depth, "16bit"))
        if method == SERVED and wide is not None:
            lost = (wide["correct"] - r["correct"]) / r["asked"]
            what = (
                f"{model}, {task}, {length:,} tokens, {depth:.0%} deep: {r['correct']} of {r['asked']} where 16 bits"
                f" have {wide['correct']}"
            )
            yield lost <= MISSED, what


def _kl(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}" if value >= 0.01 else f"{value:.5f}"


if __name__ == "__main__":
    raise SystemExit(main())
