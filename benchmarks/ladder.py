"""The release gate of accuracy: on a real checkpoint, formats that store more of K and V must be closer to 16 bits.

    python -m benchmarks.ladder  # SmolLM2-135M-Instruct, fetched once; a minute or two on two cores
    python -m benchmarks.ladder DIRECTORY --tokens 16384 --limits prepared=0.04

Each format must have a smaller KL than the next: 16-bit pages, int8, int4 prepared, int4 with V of 3 bits prepared,
int4 unprepared, int3 prepared, int4 without rotation. The served format must stay under its limit, and within 3 % of
the perplexity of 16 bits. The last format must be far above; otherwise the gate could not fail. `sawkv analyze`, which
measures each layer by itself, must put the formats in the same order, and advise 4 bits if they pass. Each check prints
one line. The exit status is the number of failed checks, or 3 if the checkpoint is not available.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from benchmarks.texts import text_file
from sawkv.lab.analysis import PREPARED, Analysis
from sawkv.lab.analyze import analyze
from sawkv.lab.budget import Budget
from sawkv.lab.evaluate import evaluate, shipped_samples
from sawkv.lab.methods import find_method
from sawkv.lab.records import Divergence
from sawkv.lab.table import table
from sawkv.prepare.model import EvalModel, find_device
from sawkv.prepare.text import load_text, with_bos

MODEL: Final = Path(".models/smollm2-135m-instruct")
RUNGS: Final = ("bf16", "int8", "prepared", "prepared_int4v3", "int4", "prepared_int3", "int4_plain")
LIMITS: Final = {"bf16": 0.0005, "int8": 0.001, "prepared": 0.035}
"""Mean KL on prose, nats a token, of `MODEL`. It stood at 0.0000, 0.0002 and 0.0307 when they were set."""
ANALYZED: Final = ("int8", "prepared", "int4", "int4_plain")
PERPLEXITY: Final = 1.03
BLIND: Final = 3.0
"""At least so many times the KL of what is served must the last rung have."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    if args.model == MODEL:
        fetched = subprocess.run([sys.executable, "tools/fetch_model.py", str(MODEL)], check=False).returncode
        if fetched:
            return fetched
    start = time.monotonic()
    budget = Budget(tokens=args.tokens, window=args.window, layer_tokens=0, floor_tokens=0, recall_count=0, free_runs=0)
    with tempfile.TemporaryDirectory() as folder:
        text = text_file(args.text, Path(folder))
        found = evaluate(
            args.model,
            [find_method(name) for name in RUNGS],
            text=text,
            budget=budget,
            device=find_device(args.device),
            dtype=torch.float32,
            with_worst=False,
        )
        analysis = _analyze(args, text)
    print(table(found), end="\n\n")
    limits = (LIMITS if args.model == MODEL else {}) | dict(args.limits)
    rungs = {result.method: result.divergence for result in found.results}
    failed = judge(found.reference.divergence, rungs, limits) + judge_advice(
        analysis, found.reference.divergence, rungs
    )
    print(f"{failed} failed; {time.monotonic() - start:.0f} s")
    return failed


def judge(reference: Divergence, rungs: Mapping[str, Divergence], limits: Mapping[str, float]) -> int:
    """Print the checks; the number that failed."""
    check = _Checks()
    for lower, upper in itertools.pairwise(RUNGS):
        values = rungs[lower].mean_kl, rungs[upper].mean_kl
        check(values[0] < values[1], f"{lower} is nearer to 16 bits than {upper}: {values[0]:.5f}, {values[1]:.5f}")
    for name, limit in limits.items():
        check(rungs[name].mean_kl <= limit, f"{name}: mean KL {rungs[name].mean_kl:.5f}, at most {limit}")
    served, last = rungs["prepared"], rungs[RUNGS[-1]]
    ratio = served.ppl / reference.ppl
    check(ratio <= PERPLEXITY, f"prepared: {ratio:.4f} of the perplexity of 16 bits, at most {PERPLEXITY}")
    check(
        last.mean_kl >= BLIND * served.mean_kl,
        f"{RUNGS[-1]}, the control, is {last.mean_kl / served.mean_kl:.1f} times as far, at least {BLIND:g}",
    )
    return check.failed


def judge_advice(analysis: Analysis, reference: Divergence, rungs: Mapping[str, Divergence]) -> int:
    """Print whether an analysis says what the evaluation does; the number of checks that failed."""
    check, errors = _Checks(), {error.method: error.mean_output for error in analysis.methods}
    for lower, upper in itertools.pairwise(sorted(errors, key=lambda name: rungs[name].mean_kl)):
        values = errors[lower], errors[upper]
        check(values[0] < values[1], f"analyze puts {lower} before {upper}: {values[0]:.3%}, {values[1]:.3%}")
    advised, ratio = analysis.recommendation.method, rungs[PREPARED].ppl / reference.ppl
    check(
        (advised == PREPARED) == (ratio <= PERPLEXITY),
        f"analyze advises {advised}, and {PREPARED} has {ratio:.4f} of the perplexity of 16 bits",
    )
    return check.failed


class _Checks:
    """Prints checks, and counts those that failed."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, passed: bool, what: str) -> None:
        self.failed += not passed
        print(f"{'PASS' if passed else 'FAIL'}  {what}")


def _analyze(args: argparse.Namespace, text: Path) -> Analysis:
    device = find_device(args.device)
    model = EvalModel.load(args.model, device, torch.float32)
    source = with_bos(load_text(args.model, text), model)
    windows = source.windows(args.window, args.analyzed)
    methods = [find_method(name) for name in ANALYZED]
    return analyze(model, windows, shipped_samples(model, source), methods, name=args.model.name, text=source.name)


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in RUNGS or not value:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(RUNGS)} and a mean KL, as in prepared=0.04, got {text!r}"
        )
    return name, float(value)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL, metavar="DIRECTORY")
    parser.add_argument("--text", default="prose", help="prose, python or a file (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="to score (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=512, help="tokens read from one empty cache (default: %(default)s)"
    )
    parser.add_argument(
        "--analyzed", type=int, default=1, metavar="COUNT", help="windows to analyze (default: %(default)s)"
    )
    parser.add_argument(
        "--limits", type=_limit, nargs="+", default=[], metavar="NAME=KL", help="more limits, or other ones"
    )
    parser.add_argument("--device", help="default: a GPU where there is one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
