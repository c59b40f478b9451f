"""`sawkv balance`: a copy of a model with keys and values that are easier to quantize."""

from __future__ import annotations

import argparse
from pathlib import Path

from sawkv.commands import options

SUMMARY = "write a copy of a model that computes the same, with keys and values easier to quantize"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_text(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the copy")
    options.add_device(parser)


def run(args: argparse.Namespace) -> int:
    from sawkv.prepare.balance import write_balanced
    from sawkv.prepare.model import find_device

    write_balanced(args.model, args.text, args.out, device=find_device(args.device))
    print(f"wrote {args.out}; its logits equal those of {args.model} to the last bit")
    return 0
