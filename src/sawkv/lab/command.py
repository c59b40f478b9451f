"""The `sawkv eval` command: arguments to an evaluation, a table on the terminal, JSON in a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from sawkv.lab.budget import Plan
from sawkv.lab.records import Evaluation, MethodResult

DEFAULT_FORMATS = "default,int8,fp8,vllm_int4_per_token_head,int4_plain"
DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `sawkv eval`."""
    defaults = Plan()
    parser.add_argument("model", type=Path, help="a checkpoint directory")
    parser.add_argument("--text", type=Path, help="UTF-8 text to score; needed unless the model holds its own held-out text")
    parser.add_argument("--formats", default=DEFAULT_FORMATS, help="methods and cache formats, by comma (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="tokens of text to score (default: %(default)s)")
    parser.add_argument("--window", type=int, default=defaults.window, help="tokens read from one empty cache (default: %(default)s)")
    parser.add_argument("--calibration-tokens", type=int, default=defaults.calibration_tokens, help="of other text (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=defaults.batch_tokens, help="tokens in one pass (default: %(default)s)")
    parser.add_argument("--layer-tokens", type=int, default=defaults.layer_tokens, help="layer by layer; 0: none (default: %(default)s)")
    lengths = defaults.recall_lengths
    shown = " ".join(map(str, lengths))
    parser.add_argument("--recall-lengths", type=int, nargs="+", default=lengths, help=f"tokens of a prompt (default: {shown})")
    parser.add_argument("--recall-count", type=int, default=defaults.recall_count, help="prompts of a kind; 0: none (default: %(default)s)")
    parser.add_argument("--free-runs", type=int, default=defaults.free_runs, help="prompts to continue; 0: none (default: %(default)s)")
    parser.add_argument("--stress", type=int, default=1, help="scale some key channels by this power of two (default: %(default)s)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model's arithmetic; default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--out", type=Path, help="folder for eval.json")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table, write the records."""
    import torch

    from sawkv.lab.evaluate import evaluate
    from sawkv.lab.methods import find_method
    from sawkv.prepare.model import find_device

    methods = [find_method(name) for name in dict.fromkeys(args.formats.split(","))]
    plan = Plan(
        tokens=args.tokens,
        window=args.window,
        calibration_tokens=args.calibration_tokens,
        batch_tokens=args.batch_tokens,
        layer_tokens=args.layer_tokens,
        recall_lengths=tuple(args.recall_lengths),
        recall_count=args.recall_count,
        free_runs=args.free_runs,
        stress=args.stress,
    )
    evaluation = evaluate(
        args.model,
        methods,
        text=args.text,
        plan=plan,
        device=find_device(args.device),
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        quiet=args.quiet,
    )
    print(table(evaluation))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / "eval.json"
        file.write_text(evaluation.to_json())
        print(f"written: {file}")
    return 0


def table(evaluation: Evaluation) -> str:
    """The evaluation in lines of text."""
    shape = evaluation.shape
    head = [
        f"{evaluation.model}: {shape.num_layers} layers, {shape.num_q_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim}; "
        f"{evaluation.dtype} on {evaluation.device}; {evaluation.seconds:.0f} s",
        f"text {evaluation.text}: {evaluation.reference.divergence.tokens:,} predictions in windows of {evaluation.window}"
        + (f"; stress {evaluation.stress}" if evaluation.stress > 1 else ""),
        "KL from the model with its cache unquantized, nats a token; +- is one standard error",
        "",
        f"{'method':<26} {'bits':>6} {'mean KL':>9} {'+-':>8} {'p99.9':>8} {'max':>7} {'top-1':>7} {'ppl':>9} "
        f"{'pass-key':>9} {'needle':>7} {'same for':>9}",
    ]
    return "\n".join([*head, *(_line(result) for result in (evaluation.reference, *evaluation.results))])


def _line(result: MethodResult) -> str:
    d = result.divergence
    run = result.free_run
    return (
        f"{result.method:<26} {result.bits:>6.3f} {d.mean_kl:>9.5f} {d.kl_se:>8.5f} {d.kl_p999:>8.4f} {d.kl_max:>7.3f} {d.same_top1:>7.2%} "
        f"{d.ppl:>9.4f} {_share(result.recalled('passkey')):>9} {_share(result.recalled('needle')):>7} "
        f"{'-' if run is None else f'{run.mean:.0f}/{run.limit}':>9}"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
