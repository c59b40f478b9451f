"""`sawkv serve`: vLLM's OpenAI server, with the options with which it uses sawkv."""

from __future__ import annotations

import argparse

from sawkv.commands import options

SUMMARY = "serve a model with vLLM from INT4 pages; other options go to vLLM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_served_model(parser, ". It stands before all options of vLLM")
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="cache format, such as int8, or int4-r32, which keeps the newest 32 tokens of each request in 16 bits too"
        " (default: the calibration's, or int4)",
    )
    parser.add_argument("--calibration", metavar="FILE", help="file that `sawkv prepare --out` wrote for this model")
    parser.add_argument(
        "--no-prepare", action="store_true", help="serve the model unprepared. Some models then lose all accuracy"
    )
    parser.add_argument(
        "--prepare-cache",
        metavar="DIR",
        help="folder for calibrations between starts (default: one in the user's cache)",
    )
    parser.set_defaults(engine_options=())  # options that this parser does not know


def run(args: argparse.Namespace) -> int:
    from sawkv.integrations.vllm.server import serve

    return serve(
        args.model,
        None if args.format is None else options.cache_format(args.format),
        args.engine_options,
        calibration=args.calibration,
        prepare=not args.no_prepare,
        prepare_cache=args.prepare_cache,
    )
