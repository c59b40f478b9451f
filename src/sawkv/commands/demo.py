"""`sawkv demo`: serves one model in 16 bits and from INT4 pages, and compares the two."""

from __future__ import annotations

import argparse

from sawkv.commands import options

SUMMARY = "serve a model in 16 bits and from INT4 pages, and compare the two"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_served_model(parser)
    options.add_format(parser, "cache format to compare with 16 bits")
    for name, default, metavar, help_text in (
        ("max-tokens", 64, "COUNT", "tokens to generate per prompt"),
        ("kv-cache-memory", 256, "MIB", "memory of each cache"),
        ("max-model-len", 4096, "COUNT", "tokens of the longest request"),
    ):
        help_text += " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=options.positive, default=default, metavar=metavar, help=help_text)


def run(args: argparse.Namespace) -> int:
    from sawkv.demo import run_demo

    return run_demo(
        args.model,
        cache_format=options.cache_format(args.format),
        max_tokens=args.max_tokens,
        kv_cache_memory=args.kv_cache_memory << 20,
        max_model_len=args.max_model_len,
    )
