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
CODES: Final = {
    "prepared": "int4",
    **{f"prepared_{codec}": codec for codec in ("int4v3", "int3", "int4v2", "int3v2", "int2")},
    "fp8": "vLLM's fp8",
    "vllm_int4_per_token_head": "vLLM's INT4",
    "lloyd_max": "TurboQuant, 4 bits",
    "channel_keys_g64": "keys by channel",
    "q4_0_rotated": "q4_0, rotated",
    "kvarn_codes": "KVarN, K4V2",
    "oscar_codes": "OSCAR",
}
"""Formats of sawkv and rivals in the picture, and in the lab's table."""
KEPT: Final = {
    "oscar": "OSCAR",
    "prepared_int2_kept_as_oscar": "**sawkv `int2`**, the same tokens kept",
    "kvarn": "KVarN, K4V2",
    "prepared_int4v2_kept_as_kvarn": "**sawkv `int4v2`**, the same tokens kept",
    "prepared_int3_kept_as_kvarn": "**sawkv `int3`**, the same tokens kept",
    "prepared": "**sawkv `int4`**, nothing kept",
}
"""Methods that keep tokens in 16 bits, and what they are compared with."""
LONG_WINDOW: Final = 2048
"""Tokens of the windows in which they are compared."""
NEAR_LAB, NEAR_PEER, NEAR_FP8, NEAR_FP8_OTHERS, PERPLEXITY = 1.1, 0.35, 1.0, 2.0, 1.03
"""Of KL: what is served over the lab's figure, over vLLM's INT4, over fp8 on Qwen2.5 and on others; of perplexity: over
16 bits.
"""
DECAY: Final = 1.5
"""KL over that of fp8 at any position of a long window, over the same quotient at its first positions."""
MISSED: Final = 0.05
"""Share of answers that 16 bits give and what is served may not."""
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
    """KL over bits, a drawing for each model: formats of sawkv, rivals, and a line through the best."""
    by_model = comparable(records)
    return svg.column(
        [
            svg.scatter(
                [svg.Point(CODES[r["method"]], r["bits"], r["mean_kl"], strong=ours(r["method"])) for r in found],
                x_title="bits of a value of K or V, with its share of scales",
                y_title="mean KL from 16 bits",
                title=f"What fewer bits cost {model}",
            )
            for model, found in by_model.items()
        ],
        list(by_model),
    )


def caption(records: Sequence[Record]) -> str:
    """The picture, and what it shows."""
    if not comparable(records):
        return ""
    return (
        f"![KL from 16 bits over bits, by model]({PICTURE})\n\n"
        "Formats of sawkv (blue) and rivals, prose, every read quantized, through the lab. The line joins what no other"
        " method beats in both bits and KL."
    )


def comparable(records: Sequence[Record]) -> dict[str, list[Record]]:
    """For each model, the records of `CODES` that the lab measured in one place, on the same windows of prose: of its
    places the one with the most methods, then the most predictions.
    """
    places: dict[str, dict[tuple[Any, ...], list[Record]]] = {r["model"]: {} for r in records}
    for r in records:
        if r["text"] == "prose" and r["through"] == "lab" and r["method"] in CODES and r.get("window"):
            place = r["device"], r["window"], r["tokens"]
            places[r["model"]].setdefault(place, []).append(r)
    return {
        model: max(of_model.values(), key=lambda found: (len(found), found[0]["tokens"]))
        for model, of_model in places.items()
        if of_model
    }


def ours(method: str) -> bool:
    """Whether a method of `CODES` is a format of sawkv."""
    return method.startswith(LAB)


def rivals(records: Sequence[Record]) -> str:
    """The lab's table of codes, by bits, and that of recipes that keep tokens in 16 bits."""
    found = comparable(records)
    if not found:
        return ""
    models = list(found)
    by_method = {(r["method"], r["model"]): r for of_model in found.values() for r in of_model}
    rows = []
    for method, name in CODES.items():
        of_models = [by_method.get((method, model)) for model in models]
        bits = [r["bits"] for r in of_models if r]
        if bits:
            name = f"**sawkv `{name}`**" if ours(method) else name
            shown = ", ".join(dict.fromkeys(f"{value:g}" for value in bits))
            rows.append((max(bits), f"| {name} | {shown} | {' | '.join(_with_interval(r) for r in of_models)} |"))
    where = "; ".join(
        f"{model}: {of_model[0]['tokens']:,} predictions in windows of {of_model[0]['window']}, {of_model[0]['device']}"
        for model, of_model in found.items()
    )
    codes = [f"| codes alone | bits | {' | '.join(models)} |", f"|-|-|{'-|' * len(models)}"]
    codes += [row for _, row in sorted(rows, key=lambda row: -row[0])]
    return "\n".join([f"Mean KL (95 %), prose. {where}.", "", *codes])


def kept(records: Sequence[Record]) -> str:
    """The lab's table of recipes that keep tokens in 16 bits, and of formats of sawkv that keep the same."""
    found: dict[str, dict[str, Record]] = {}
    for r in records:
        if r["through"] == "lab" and r["text"] == "prose" and r["method"] in KEPT and r.get("window") == LONG_WINDOW:
            found.setdefault(r["model"], {})[r["method"]] = r
    if not found:
        return ""
    where = "; ".join(
        f"{model}: {r['tokens']:,} predictions, {r['device']}"
        for model, r in ((model, next(iter(of_model.values()))) for model, of_model in found.items())
    )
    rows = [
        f"Mean KL (95 %) and perplexity, prose, windows of {LONG_WINDOW:,}. {where}.",
        "",
        f"| tokens kept in 16 bits | bits of codes, of all | {' | '.join(found)} |",
        f"|-|-|{'-|' * len(found)}",
    ]
    for method, name in KEPT.items():
        of_models = [of_model.get(method) for of_model in found.values()]
        if any(of_models):
            bits = ", ".join(
                dict.fromkeys(f"{r.get('bits_of_codes', r['bits']):.3g}, {r['bits']:.3g}" for r in of_models if r)
            )
            cells = (f"{_with_interval(r)}, {r['ppl'] / r['ppl_16bit'] - 1:+.1%}" if r else "" for r in of_models)
            rows.append(f"| {name} | {bits} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _with_interval(r: Record | None) -> str:
    """Mean KL, and its interval if it is of more than one window."""
    if r is None:
        return ""
    low, high = r["kl_ci95"]
    return _kl(r["mean_kl"]) + (f" ({_kl(low)} to {_kl(high)})" if len(r["kl_by_window"]) > 1 else "")


def tables(records: Sequence[Record], recall: Sequence[Record]) -> str:
    """The picture and the lab's tables; a table for each model and text, of what was asked through a server; then
    recall.
    """
    parts = [part for part in (caption(records), rivals(records), kept(records)) if part]
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
    where = ", ".join(sorted({r["device"] for r in recall}) + sorted({r["commit"] for r in recall}))
    lines = [f"Recall: right answers over all depths, {where}.", ""]
    lines += [f"| model | task | tokens | {' | '.join(methods)} |", f"|-|-|-|{'-|' * len(methods)}"]
    for model, task, length in dict.fromkeys((r["model"], r["task"], r["length"]) for r in recall):
        cells = []
        for method in methods:
            rows = [
                r for r in recall if (r["model"], r["task"], r["length"], r["method"]) == (model, task, length, method)
            ]
            right = sum(sum(r["correct"].values()) for r in rows)
            cells.append(f"{right} of {sum(r['asked'] * len(r['correct']) for r in rows)}" if rows else "-")
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
    rows = {(r["model"], r["task"], r["length"], r["method"]): r for r in recall}
    for (model, task, length, method), r in rows.items():
        wide = rows.get((model, task, length, "16bit"))
        if method == SERVED and wide is not None:
            for depth, correct in r["correct"].items():
                lost = (wide["correct"][depth] - correct) / r["asked"]
                what = (
                    f"{model}, {task}, {length:,} tokens, {float(depth):.0%} deep: {correct} of {r['asked']} where"
                    f" 16 bits have {wide['correct'][depth]}"
                )
                yield lost <= MISSED, what


def _kl(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}" if value >= 0.01 else f"{value:.5f}"


if __name__ == "__main__":
    raise SystemExit(main())
