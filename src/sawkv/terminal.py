"""Colour, where a person looks at a terminal that has it."""

from __future__ import annotations

import os
import sys
from typing import Final, TextIO

CODES: Final = {"red": 31, "green": 32, "yellow": 33, "bold": 1}


def coloured(text: str, colour: str, stream: TextIO | None = None) -> str:
    """`text` in a colour of `CODES`; as it is where `stream` (by default standard output) is no terminal, and where
    NO_COLOR is set (https://no-color.org).
    """
    stream = sys.stdout if stream is None else stream
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\033[{CODES[colour]}m{text}\033[0m"
