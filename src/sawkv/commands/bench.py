"""`sawkv bench`: throughput and latency of caches under load, on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from sawkv.bench.records import FP8, SIXTEEN_BITS, Setting
from sawkv.commands import options

SUMMARY = "measure throughput and latency of caches on this machine; other options go to vLLM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Setting("")
    options.add_served_model(parser, ". It stands before all options of vLLM")
    caches = f"{SIXTEEN_BITS},{FP8},int4"
    options.add_formats(parser, caches, f"{caches}; the others are compared with the first")
    options.add_out(parser, "JSON record", default=Path("bench.json"))
    for name, default, help_text in (
        ("input", defaults.input_tokens, "tokens per prompt"),
        ("output", defaults.output_tokens, "tokens per answer"),
        (
            "prefix",
            defaults.prefix_tokens,
            "tokens of a prompt that requests share in one load; 0 skips that load",
        ),
        ("requests", defaults.requests, "requests per load"),
    ):
        kind = options.count if name == "prefix" else options.positive
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar="COUNT", help=f"{help_text} (default: %(default)s)"
        )
    parser.add_argument(
        "--rates",
        type=rates,
        default=(),
        metavar="RATES",
        help="requests per second, separated by commas (default: derived from the first load)",
    )
    for name, limit, help_text in (
        ("ttft", defaults.ttft_ms, "longest time to first token of a request that counts as goodput"),
        ("tpot", defaults.tpot_ms, "longest time per further token of such a request"),
    ):
        parser.add_argument(
            f"--{name}", type=float, default=limit, metavar="MS", help=f"{help_text} (default: %(default)g)"
        )
    options.add_resume(parser)
    parser.set_defaults(engine_options=())


def rates(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    from sawkv.bench.run import run_bench

    setting = Setting(
        args.model,
        args.input,
        args.output,
        args.prefix,
        args.requests,
        args.rates,
        args.ttft,
        args.tpot,
        tuple(args.engine_options),
    )
    return run_bench(setting, args.formats, args.out, resume=args.resume, command=args.typed)
