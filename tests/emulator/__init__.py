"""The CUDA kernels' own sources on a CPU: a change of a kernel can be tested without a GPU.

g++ compiles a kernel with `emulator.h` in place of CUDA, and with `ptx.cuh` and `wgmma.cuh` of this folder in place of
the files that have all PTX. Memory that nothing has written is NaN. Which warp goes on, which one is late, and when a
copy ends are drawn.

Noticed: wrong results; orders between warps that no barrier ensures; deadlocks, with what each warp waits for; too many
arrivals; lanes that part at what their warp does together; products without a fence; prefetches of memory that is not
of the cache, whatever a kernel before has not written yet. Not checked: the memory model and its proxies, time,
registers, bank conflicts, how GPUs round, blocks that run at once, accesses out of bounds.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sawkv import kernels, ops
from sawkv.kernels import cuda
from sawkv.kernels.cpu import build

FOLDER = Path(__file__).parent
# More optimization takes longer than it saves. _FORTIFY_SOURCE forbids longjmp to another stack.
FLAGS = (*build.FLAGS, "-O1", "-fno-strict-aliasing", "-fno-semantic-interposition", "-U_FORTIFY_SOURCE", "-w")
DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) dynamic\[\];")
SEED = "EMULATOR_SEED"


class EmulationError(Exception):
    """A deadlock, or a misuse of an instruction."""


class Kernel:
    """In place of `cuda.runtime.Kernel`."""

    seeds = itertools.count()
    """Of the launches to come."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._library, self._function = library, getattr(library, name)
        library.emulator_launch.restype = ctypes.c_char_p

    def launch(
        self, grid: tuple[int, ...], threads: int, stream: int, params: ctypes.Structure, *_: Any, **__: Any
    ) -> None:
        where = ctypes.byref(params), ctypes.sizeof(params), (ctypes.c_int * 3)(*grid)
        pages, size = ctypes.c_void_p(), ctypes.c_size_t()
        if hasattr(params, "num_pages"):
            pages, size = ctypes.c_void_p(params.pages), ctypes.c_size_t(params.num_pages * params.page_stride)
        failure = self._library.emulator_launch(self._function, *where, threads, next(self.seeds), pages, size)
        if failure:
            raise EmulationError(failure.decode())

    def read_constant(self, name: str) -> int:
        return ctypes.c_int.in_dll(self._library, name).value


@functools.cache
def _compile(sources: tuple[tuple[str, str], ...], source_file: str, macros: tuple[str, ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in sources:
            Path(folder, name).write_text(text)
        library = f"{folder}/kernel.so"
        command = [build.find_compiler(), *FLAGS, *macros, "-x", "c++", f"{folder}/{source_file}", "-o", library]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[:4000])
        return ctypes.CDLL(library)


def load(source_file: str, name: str, defines: Mapping[str, int | str], *_: Any) -> Kernel:
    """In place of `cuda.runtime.load`."""
    sources = {
        file: DYNAMIC.sub(r"\1* dynamic = (\1*)emulator::shared_memory;", text)
        for file, text in cuda.runtime.read_sources(source_file).items()
    }
    sources |= {file.name: file.read_text() for file in FOLDER.iterdir() if file.suffix in (".h", ".cuh")}
    macros = tuple(f"-D{macro}={value}" for macro, value in sorted(defines.items()))
    return Kernel(_compile(tuple(sorted(sources.items())), source_file, macros), name)


def install(monkeypatch: pytest.MonkeyPatch, num_sms: int = 2) -> None:
    """Until the test ends, the backend `cuda` runs on CPU tensors, as on a Hopper GPU of so many SMs. A failing test
    shows EMULATOR_SEED, and repeats its orders where this variable is set.
    """
    drawn = int(torch.randint(2**31, ()))
    seed = int(os.environ.get(SEED, drawn))
    print(f"{SEED}={seed}")
    unsupported_reason, gpu = cuda.unsupported_reason, torch.device("cuda", 0)
    properties = SimpleNamespace(
        multi_processor_count=num_sms, major=9, minor=0, shared_memory_per_block_optin=cuda.MIN_SHARED_BYTES
    )
    monkeypatch.setattr(Kernel, "seeds", itertools.count(seed))
    monkeypatch.setattr(cuda, "unsupported_reason", lambda _, layout: unsupported_reason(gpu, layout))
    monkeypatch.setattr(cuda, "_stream", lambda _: 0)
    monkeypatch.setattr(cuda.runtime, "load", load)
    monkeypatch.setattr(cuda.runtime, "missing_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(ops, "select_backend", kernels.select_backend.__wrapped__)  # which keeps its answers
