"""`sawkv doctor`: checks whether sawkv works on this machine."""

from __future__ import annotations

import argparse

from sawkv.format.spec import COMMON_HEAD_DIM

SUMMARY = "check versions, plugins, kernels and caches, and explain what is missing or slow"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint to check as well")
    parser.add_argument(
        "--head-dim",
        type=int,
        metavar="COUNT",
        help=f"head_dim of the kernels to check (default: the model's, or {COMMON_HEAD_DIM})",
    )


def run(args: argparse.Namespace) -> int:
    from sawkv.doctor import run_doctor

    return run_doctor(args.model, args.head_dim)
