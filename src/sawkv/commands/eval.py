"""`sawkv eval`: how cache formats and other methods change a model's predictions."""

from __future__ import annotations

import argparse

from sawkv.commands import options
from sawkv.lab.budget import Budget

SUMMARY = "measure what cache formats cost on a model: KL, perplexity, recall"
DEFAULT_FORMATS = "prepared,int8,fp8,vllm_int4_per_token_head,int4_plain"
DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Budget()
    options.add_model(parser)
    options.add_text(parser)
    options.add_out(parser, "JSON record for `sawkv report`")
    options.add_formats(parser, DEFAULT_FORMATS, f"{DEFAULT_FORMATS}; prepared is what engines serve as int4")
    options.add_tokens(parser, defaults.tokens, defaults.window)
    for name, default, help_text in (
        ("batch", defaults.batch_tokens, "tokens per pass of the model"),
        ("layer", defaults.layer_tokens, "tokens for the measurement of single layers; 0 skips it"),
        ("floor", defaults.floor_tokens, "tokens for the noise of 16-bit arithmetic; 0 skips it"),
    ):
        kind = options.count if name in ("layer", "floor") else options.positive
        parser.add_argument(
            f"--{name}-tokens", type=kind, default=default, metavar="COUNT", help=f"{help_text} (default: %(default)s)"
        )
    parser.add_argument(
        "--recall-lengths",
        type=options.positive,
        nargs="+",
        default=defaults.recall_lengths,
        metavar="COUNT",
        help=f"lengths of recall prompts in tokens (default: {' '.join(map(str, defaults.recall_lengths))})",
    )
    for name, default, help_text in (
        ("recall-count", defaults.recall_count, "recall prompts per task, length and depth; 0 skips recall"),
        ("free-runs", defaults.free_runs, "prompts to continue greedily; 0 skips this"),
    ):
        parser.add_argument(
            f"--{name}",
            type=options.count,
            default=default,
            metavar="COUNT",
            help=f"{help_text} (default: %(default)s)",
        )
    options.add_context(parser)
    options.add_stress(parser)
    options.add_device(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the model (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    options.add_resume(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from sawkv.errors import SawkvError
    from sawkv.files import check_writable, writing
    from sawkv.lab.evaluate import evaluate
    from sawkv.lab.methods import find_method
    from sawkv.lab.records import Evaluation
    from sawkv.lab.table import table
    from sawkv.prepare.model import find_device

    out = args.out
    if out is not None:
        check_writable(out)
    if args.resume and out is None:
        raise SawkvError("--resume: expected --out FILE, with the record to go on with")
    before = Evaluation.read(out) if args.resume and out.exists() else None

    def keep(evaluation: Evaluation) -> None:
        if out is not None:
            with writing(out) as part:
                part.write_text(evaluation.to_json(), encoding="utf-8")

    methods = [find_method(name) for name in args.formats]
    budget = Budget(
        tokens=args.tokens,
        window=args.window,
        batch_tokens=args.batch_tokens,
        layer_tokens=args.layer_tokens,
        floor_tokens=args.floor_tokens,
        recall_lengths=tuple(args.recall_lengths),
        recall_count=args.recall_count,
        free_runs=args.free_runs,
        stress=args.stress,
        context=args.context,
    )
    evaluation = evaluate(
        args.model,
        methods,
        text=args.text,
        budget=budget,
        device=find_device(args.device),
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        before=before,
        keep=keep,
        command=args.typed,
    )
    print(table(evaluation))
    if out is not None:
        print(f"wrote {out}")
    return 0
