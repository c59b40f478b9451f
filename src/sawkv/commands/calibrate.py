"""`sawkv calibrate`: a calibration file for a model."""

from __future__ import annotations

import argparse

from sawkv.commands import options

SUMMARY = "measure centers and error feedback of a model's K and V, and write a file that engines load"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_text(parser)
    options.add_out(parser, "safetensors file", required=True)
    options.add_format(parser, "cache format that will be served")
    options.add_tokens(parser, tokens=32768, window=1024)
    parser.add_argument(
        "--context",
        type=options.positive,
        default=4096,
        metavar="COUNT",
        help="tokens of a request that will be served; windows are placed all over it (default: %(default)s)",
    )
    parser.add_argument("--no-feedback", action="store_true", help="write centers alone")
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
        feedback=not args.no_feedback,
    )
