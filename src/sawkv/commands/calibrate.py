"""`sawkv calibrate`: a calibration file for a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from sawkv.commands import options

SUMMARY = "prepare a model on a text of your own, and write a file that engines load"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to read (default: the text that ships with sawkv)")
    options.add_out(parser, "safetensors file", required=True)
    options.add_format(parser, "cache format that will be served")
    options.add_tokens(parser, tokens=8192, window=512)
    parser.add_argument(
        "--context",
        type=options.positive,
        default=4096,
        metavar="COUNT",
        help="tokens of the longest request that will be served (default: %(default)s)",
    )
    options.add_device(parser)


def run(args: argparse.Namespace) -> int:
    from sawkv.prepare.calibrate import run_calibrate

    return run_calibrate(
        args.model,
        args.text,
        args.out,
        cache_format=args.format,
        context=args.context,
        window=args.window,
        windows=max(1, args.tokens // args.window),
        device=args.device,
    )
