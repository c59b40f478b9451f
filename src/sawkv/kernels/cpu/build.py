"""Compiles the C++ kernels of this folder at first use, and loads them.

The library is stored in the user's cache folder under a hash of everything that it depends on. Its last bytes are the
SHA-256 of the rest, so a damaged file is noticed and compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from sawkv.errors import UnsupportedError
from sawkv.kernels import constants
from sawkv.kernels.disk import DIGEST_BYTES, digest, private_folder

SOURCE_FOLDER = Path(__file__).parent
MAX_GROUP = 128
"""Most query heads per KV head that the kernels support."""
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


def find_compiler() -> str:
    """The path of a C++ compiler.

    Raises:
        UnsupportedError: there is none. The message says what to install.
    """
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UnsupportedError("no C++ compiler: expected g++ or clang++ on the PATH, or CXX naming one")
    return compiler


@cache
def load_library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        UnsupportedError: there is no C++ compiler, or it failed. The message says what to install, or has its output.
    """
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    openmp = _openmp_flags()
    sources = read_sources() | {constants.HEADER_NAME: constants.header(MAX_GROUP=MAX_GROUP)}
    described = "\0".join([*itertools.chain(*sources.items()), version, *FLAGS, *openmp, _processor()])
    key = hashlib.sha256(described.encode()).hexdigest()[:24]
    library = private_folder("cpu") / f"{key}.so"
    if not _is_whole(library):
        # Processes that start at the same time each build a copy. The rename is atomic, so no process reads half a
        # file, and no lock can be left behind.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            for name, text in sources.items():
                Path(folder, name).write_text(text)
            built = Path(folder, "kernels.so")
            command = [compiler, *FLAGS, str(Path(folder, "kernels.cpp")), "-o", str(built), *openmp]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnsupportedError(f"{compiler} could not compile the CPU kernels:\n{done.stderr[-2000:]}")
            with built.open("ab") as file:
                file.write(digest(built.read_bytes()))  # loaders ignore bytes after the sections
            os.replace(built, library)
    return ctypes.CDLL(str(library))


def read_sources() -> dict[str, str]:
    """The C++ files by name. kernels.cpp includes the others."""
    return {path.name: path.read_text() for path in sorted(SOURCE_FOLDER.iterdir()) if path.suffix in (".h", ".cpp")}


def _is_whole(library: Path) -> bool:
    """Whether the file exists, and ends with the digest of the rest."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return digest(content[:-DIGEST_BYTES]) == content[-DIGEST_BYTES:]


def _openmp_flags() -> list[str]:
    """Compile with OpenMP, and link the runtime that torch has loaded. vLLM would not bind the threads of a second
    runtime to cores.
    """
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
    """The features that -march=native depends on. Machines of different kinds may share a home folder."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    described = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return "\n".join([platform.machine(), platform.processor(), *described])
