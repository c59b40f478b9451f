"""The evidence of docs/lab/methods.md: every method on each model, as it is and under function-preserving stress, as
JSON lines.

    python -m benchmarks.accuracy models/sawkv-6m .gpu/sawkv-6m-bias --out docs/results/accuracy.jsonl

Each (model, stress, method) has one line, which replaces the line that the file has for it. Models are scored in fp32
on any device, unless --dtype says otherwise, so that figures show the cache alone. `bf16_floor` is the effect of 16-bit
arithmetic.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import torch

from sawkv.lab.budget import Budget
from sawkv.lab.evaluate import evaluate
from sawkv.lab.methods import METHODS, find_method
from sawkv.lab.records import Evaluation, MethodResult
from sawkv.lab.table import table

FORMATS = (
    "bf16",
    "int8",
    *(f"int4-k{order}-v0" for order in (16, 32, 64, 128)),
    *(f"int4-k{order}-v{order}" for order in (16, 32, 64, 128)),
)
ALL = (*METHODS, *FORMATS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to add to")
    parser.add_argument("--stress", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--methods", nargs="+", default=list(ALL), metavar="METHOD", help="default: all")
    parser.add_argument("--without", nargs="+", default=[], metavar="METHOD", help="methods to leave out")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--recall-lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--recall-count", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--records", type=Path, help="folder for the whole records, one file for each model and stress")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    left_out = set(args.without)
    if importlib.util.find_spec("sklearn") is None:
        left_out |= {name for name in args.methods if name.startswith("kmeans")}
        print("left out, for want of scikit-learn: k-means", flush=True)
    methods = [find_method(name) for name in args.methods if name not in left_out]
    for model in args.models:
        for stress in args.stress:
            budget = Budget(
                tokens=args.tokens,
                window=args.window,
                batch_tokens=args.batch_tokens,
                layer_tokens=0,
                floor_tokens=args.tokens,
                recall_lengths=tuple(args.recall_lengths),
                recall_count=args.recall_count,
                free_runs=0,
                stress=stress,
            )
            evaluation = evaluate(model, methods, budget=budget, dtype=getattr(torch, args.dtype))
            print(table(evaluation), flush=True)
            add_lines(args.out, lines(evaluation))
            if args.records:
                args.records.mkdir(parents=True, exist_ok=True)
                (args.records / f"{evaluation.model}-s{stress}.json").write_text(evaluation.to_json())


def lines(evaluation: Evaluation) -> list[dict[str, object]]:
    """One record for each method."""
    where = {
        "tokens": evaluation.reference.divergence.tokens,
        "window": evaluation.window,
        "dtype": evaluation.dtype,
        "device": evaluation.device,
    }
    return [
        {"model": evaluation.model, "stress": evaluation.stress, **_fields(result), **where}
        for result in (evaluation.reference, *evaluation.results)
    ]


def _fields(result: MethodResult) -> dict[str, object]:
    d = result.divergence
    return {
        "method": result.method,
        "bits": result.bits,
        "mean_kl": float(f"{d.mean_kl:.6g}"),
        "kl_se": float(f"{d.kl_se:.3g}"),
        "kl_p999": float(f"{d.kl_p999:.4g}"),
        "kl_max": float(f"{d.kl_max:.4g}"),
        "same_top1": round(d.same_top1, 5),
        "ppl": round(d.ppl, 4),
        "passkey": result.passkey,
        "needle": result.recalled("needle"),
        "calibrated": result.calibrated,
        "served": result.served,
        "tokens": d.tokens,
    }


def add_lines(file: Path, records: list[dict[str, object]]) -> None:
    """Write the records after those of the file that are for other cells."""
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    new = {_cell(record) for record in records}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(json.dumps(record) + "\n" for record in [*(r for r in kept if _cell(r) not in new), *records])
    )


def _cell(record: dict[str, object]) -> tuple[object, ...]:
    return record["model"], record["stress"], record["method"]


if __name__ == "__main__":
    main()
