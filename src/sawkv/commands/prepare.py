"""`sawkv prepare`: fits a calibration, and writes it into the model's folder or to a file."""

from __future__ import annotations

import argparse

from sawkv.commands import options

SUMMARY = "fit a model's calibration once, and store it in the model's folder or in a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_text(parser, "the text that ships with sawkv")
    options.add_out(parser, "safetensors file", shown="in MODEL's folder, where engines find it")
    options.add_format(parser, "cache format that will be served")
    options.add_tokens(parser, tokens=8192, window=512)
    options.add_context(parser)
    options.add_device(parser)


def run(args: argparse.Namespace) -> int:
    from sawkv.prepare.calibrate import run_prepare

    return run_prepare(
        args.model,
        args.text,
        args.out,
        cache_format=options.cache_format(args.format),
        context=args.context,
        window=args.window,
        windows=max(1, args.tokens // args.window),
        device=args.device,
    )
