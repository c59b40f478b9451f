"""Source files are short, or say why they are not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "tools", "training", "examples")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")
MAX_LINES = 400
MAX_COLUMNS = 120
REASON = re.compile(r"\bOver 400 lines: \w")
FIRST_LINES = 30


def offences(name: str, text: str) -> list[str]:
    lines = text.splitlines()
    found = [f"{name}:{number}: {len(line)} columns" for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
    says_why = REASON.search("\n".join(lines[:FIRST_LINES])) is not None
    if (len(lines) > MAX_LINES) != says_why:
        found.append(f"{name}: {len(lines)} lines, and {'a' if says_why else 'no'} reason for being long")
    return found


def test_long_files_say_why_and_lines_are_short() -> None:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in SUFFIXES]
    assert len(files) > 200
    assert [o for file in sorted(files) for o in offences(str(file.relative_to(ROOT)), file.read_text())] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x\n" * 400, []),
        ("x\n" * 401, ["f: 401 lines, and no reason for being long"]),
        ("# Over 400 lines: a table.\n" + "x\n" * 401, []),
        ("# Over 400 lines: a table.\n", ["f: 1 lines, and a reason for being long"]),
        ("x\n" * 401 + "# Over 400 lines: too late.\n", ["f: 402 lines, and no reason for being long"]),
        ("y" * 121 + "\n", ["f:1: 121 columns"]),
    ],
)
def test_offences_are_found(text: str, expected: list[str]) -> None:
    """The control."""
    assert offences("f", text) == expected
