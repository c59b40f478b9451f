"""The format's constants as C++, for the kernels that are compiled at run time. Each number is written once, in Python.

A kernel that names a constant which does not exist does not compile.
"""

from __future__ import annotations

from typing import Final

from sawkv.format import constants
from sawkv.format.counters import COLUMNS
from sawkv.format.spec import CODEC_BITS, HEAD_DIMS

HEADER_NAME: Final = "format_constants.h"
"""The name by which kernels include `header()`."""

CLEARED_ROWS: Final = 256
"""Rows behind the last token that `gather` sets to zero: at least a tile of an engine's attention. FlashAttention-3
reads a whole tile, and multiplies values behind a sequence by zero, which leaves a NaN in them a NaN.
"""

NUMBERS: Final[dict[str, int | float]] = {
    **{name: value for name, value in vars(constants).items() if name.isupper()},
    "MAX_HEAD_DIM": max(HEAD_DIMS),
    "CLEARED_ROWS": CLEARED_ROWS,
}


def header(**more: int | float) -> str:
    """C++ that declares all constants, the order of codecs, and the columns of the counters.

    Args:
        more: constants of one backend.

    Returns:
        Text of a header in the namespace `sawkv::format`: ints as `int` or, above its range, as `unsigned`; floats as
        `float`; `enum Codec` in the order of `CODEC_BITS`; `enum Column` of the counters, and `struct Counts` with one
        double per column.
    """
    lines = [f"constexpr {_kind(value)} {name} = {_literal(value)};" for name, value in (NUMBERS | more).items()]
    codecs = ", ".join(f"CODEC_{name.upper()}" for name in CODEC_BITS)
    columns = ", ".join(f"COLUMN_{name.upper()}" for name in COLUMNS)
    lines += [f"enum Codec {{ {codecs} }};", f"enum Column {{ {columns}, NUM_COLUMNS }};"]
    lines.append(f"struct Counts {{ double {', '.join(COLUMNS)}; }};")
    return "\n".join(["#pragma once", "namespace sawkv::format {", *lines, "}", ""])


def _kind(value: int | float) -> str:
    if isinstance(value, float):
        return "float"
    return "int" if value < 2**31 else "unsigned"


def _literal(value: int | float) -> str:
    if isinstance(value, float):
        return f"{value!r}f"
    return str(value) if value < 2**31 else f"{value}u"
