"""Arguments that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from sawkv.errors import FormatError
from sawkv.format.spec import CacheFormat


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL as a directory."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint directory")


def add_served_model(parser: argparse.ArgumentParser, note: str = "") -> None:
    """MODEL as vLLM finds it: a directory, or a name on the hub."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"a checkpoint directory, or a model of the Hugging Face hub{note}"
    )


def add_text(parser: argparse.ArgumentParser, shown: str = "the model's held-out text, if it has one") -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help=f"UTF-8 text to read (default: {shown})")


def add_tokens(parser: argparse.ArgumentParser, tokens: int, window: int) -> None:
    """How much text is read, and the length of its windows."""
    parser.add_argument(
        "--tokens",
        type=positive,
        default=tokens,
        metavar="COUNT",
        help="tokens of the text to read (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=positive,
        default=window,
        metavar="COUNT",
        help="tokens per window; each is read from an empty cache (default: %(default)s)",
    )


def add_format(parser: argparse._ActionsContainer, what: str) -> None:
    parser.add_argument("--format", default="int4", metavar="NAME", help=f"{what} (default: %(default)s)")


def cache_format(name: str) -> CacheFormat:
    """The value of --format.

    Raises:
        FormatError: the name is not one.
    """
    try:
        return CacheFormat.parse(name)
    except FormatError as error:
        raise FormatError(f"--format: {error}") from error


def add_formats(parser: argparse.ArgumentParser, default: str | None, shown: str) -> None:
    help_text = f"caches to compare, separated by commas (default: {shown})"
    parser.add_argument("--formats", type=names, default=default, metavar="NAMES", help=help_text)


def add_out(parser: argparse.ArgumentParser, what: str, default: Path | None = None, shown: str = "") -> None:
    """The output file. `shown` describes a default that is not a constant."""
    help_text = f"{what} to write; its folder is made if needed"
    if default is not None or shown:
        help_text += f" (default: {shown or default})"
    parser.add_argument("--out", type=Path, default=default, metavar="FILE", help=help_text)


def add_context(parser: argparse.ArgumentParser) -> None:
    help_text = "tokens of the longest request that will be served (default: the model's limit, at most 32768)"
    parser.add_argument("--context", type=positive, default=0, metavar="COUNT", help=help_text)


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="continue the record in --out, and keep its measurements")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="device of the model (default: a GPU if there is one)"
    )


def add_stress(parser: argparse.ArgumentParser) -> None:
    help_text = "scale some key channels by this power of two, which makes quantization harder (default: %(default)s)"
    parser.add_argument("--stress", type=positive, default=1, metavar="FACTOR", help=help_text)


def names(text: str) -> list[str]:
    """Names separated by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1, "a positive integer")


def count(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0, "0 or a positive integer")


def tokens(text: str) -> int:
    """A whole number of at least 1, or one such as 500k or 2.5M."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)([kKmM]?)", text, re.ASCII)
    value = 0 if match is None else round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6}[match[2].lower()])
    if value < 1 or (match is not None and not match[2] and "." in match[1]):
        raise argparse.ArgumentTypeError(f"expected a number of tokens such as 500000, 500k or 2M, got {text!r}")
    return value


def _whole(text: str, least: int, expected: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected {expected} of at most 18 digits, got {text!r}")
    return value
