"""Compile kernels.cpp at first use, and load it. The library is kept in the user's cache folder, keyed by everything that it depends on."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from sawkv.errors import UnsupportedError

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
)


@cache
def load_library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        UnsupportedError: there is no C++ compiler, or it failed; the message says what to install or what it printed.
    """
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UnsupportedError("no C++ compiler: expected g++ or clang++ on the PATH, or CXX naming one")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    openmp = _openmp_flags()
    key = hashlib.sha256("\0".join([SOURCE.read_text(), version, *FLAGS, *openmp, _processor()]).encode()).hexdigest()[:24]
    library = _cache_folder() / f"{key}.so"
    if not library.is_file():
        # Processes that start at once each build their own copy. The rename is atomic: none sees half a file, and no lock is left behind.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder, "kernels.so")
            done = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(built), *openmp], capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnsupportedError(f"{compiler} could not compile the CPU kernels:\n{done.stderr[-2000:]}")
            os.replace(built, library)
    return ctypes.CDLL(str(library))


def _openmp_flags() -> list[str]:
    """Compile for OpenMP, and link the very runtime that torch has loaded: a second one's threads would be outside vLLM's binding."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    runtimes = sorted(path for path in paths if Path(path).name.startswith(("libiomp5", "libgomp", "libomp")))
    in_torch = [path for path in runtimes if path.startswith(str(Path(torch.__file__).parent))]
    preferred = [path for path in runtimes if "libiomp5" in path] or in_torch or runtimes
    if not preferred:
        return ["-fopenmp"]
    return [f"-Wl,-rpath,{Path(preferred[0]).parent}", preferred[0], "-Xpreprocessor", "-fopenmp"]


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    described = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([platform.machine(), platform.processor(), *described])


def _cache_folder() -> Path:
    """A folder that only this user can write to, since code is loaded from it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "sawkv" / "cpu"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsupportedError(f"cache folder {folder}: expected one that this user owns and no other can write to")
    return folder
