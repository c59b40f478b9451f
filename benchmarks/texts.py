"""Texts to measure on, from files that an environment with vLLM already holds. Nothing is downloaded, and none of it
ships with sawkv.
"""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

PROSE = "Isaac.Newton-Opticks.txt"
"""Isaac Newton's Opticks, of 1704, in the public domain; a file of libbacktrace's tests, which the package
apache-tvm-ffi ships.
"""
PROSE_STARTS = "My Design in this Book is not"
MODULES = (
    "argparse",
    "inspect",
    "tarfile",
    "typing",
    "subprocess",
    "statistics",
    "fractions",
    "difflib",
    "configparser",
    "doctest",
)
"""Of the standard library."""


def text_file(name: str, folder: Path) -> Path:
    """`prose`, `python`, or a file's path, as a UTF-8 file; the first two are written to `folder`."""
    make = {"prose": _prose, "python": _python}.get(name)
    if make is None:
        return Path(name)
    file = folder / f"{name}.txt"
    file.write_text(make(), encoding="utf-8")
    return file


def _prose() -> str:
    package = importlib.util.find_spec("tvm_ffi")
    if package is None or package.origin is None:
        raise SystemExit(
            "prose: expected the package apache-tvm-ffi, which vLLM brings; name a text file with --texts instead"
        )
    text = next(Path(package.origin).parent.rglob(PROSE)).read_text(encoding="utf-8", errors="replace")
    return text[text.index(PROSE_STARTS) :]


def _python() -> str:
    specs = [importlib.util.find_spec(name) for name in MODULES]
    files = [
        Path(spec.origin).read_text(encoding="utf-8") for spec in specs if spec is not None and spec.origin is not None
    ]
    return f"# Modules of Python {platform.python_version()}\n" + "\n\n".join(files)
