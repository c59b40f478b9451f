"""`sawkv report`: one HTML page from records."""

from __future__ import annotations

import argparse
from pathlib import Path

from sawkv.commands import options

SUMMARY = "make one HTML page from records of `sawkv eval` and `sawkv analyze`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD", help="JSON that these commands wrote")
    options.add_out(parser, "page", default=Path("report.html"))


def run(args: argparse.Namespace) -> int:
    from sawkv.lab.report import run_report

    return run_report(args.records, args.out)
