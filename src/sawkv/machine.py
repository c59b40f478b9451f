"""The machine and the versions that a record names."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from sawkv import __version__


def cpu_name() -> str:
    """The name of the CPU, or its architecture if Linux does not give a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(*distributions: str) -> dict[str, str]:
    """Versions of sawkv, of Python, and of those `distributions` that are installed."""
    found = {"sawkv": __version__, "python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
