"""`sawkv analyze`: statistics of a model's K and V, and the format to take."""

from __future__ import annotations

import argparse

from sawkv.commands import options

SUMMARY = "measure a model's K and V and the error of each format, and recommend one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_text(parser)
    options.add_out(parser, "JSON record for `sawkv report`")
    options.add_formats(parser, None, "sawkv's, and vLLM's for comparison; prepared is what engines serve as int4")
    options.add_tokens(parser, tokens=8192, window=2048)
    options.add_stress(parser)
    options.add_device(parser)


def run(args: argparse.Namespace) -> int:
    from sawkv.lab.analyze import run_analyze

    return run_analyze(
        args.model,
        args.text,
        args.out,
        methods=args.formats,
        window=args.window,
        windows=max(1, args.tokens // args.window),
        stress=args.stress,
        device=args.device,
        command=args.typed,
    )
