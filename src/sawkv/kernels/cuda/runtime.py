"""Compile CUDA C++ at run time and launch it: NVRTC and the driver through `cuda.bindings`, which a CUDA build of
PyTorch installs.

A kernel is a source file of this package, a set of macros that choose its variant, and a name:

    kernel = load("decode.cu", "sawkv_decode", {"HEAD_DIM": 128, "PAGE_SIZE": 16}, device)
    kernel.launch((132, 1, 1), threads=384, stream=torch.cuda.current_stream().cuda_stream, params=structure,
    shared_bytes=200_000)

Its parameters are one `ctypes.Structure`, passed by value: `extern "C" __global__ void name(const __grid_constant__
Params p)`.

Compiled images are kept in `$XDG_CACHE_HOME/sawkv/cuda` (or `~/.cache/sawkv/cuda`), in a folder that only this user can
enter.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sawkv.errors import UnsupportedError
from sawkv.kernels import constants
from sawkv.kernels.disk import DIGEST_BYTES, digest, private_folder

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
DEFAULT_SHARED_BYTES = 47 << 10
"""Dynamic shared memory that a block has without opting in to more: 48 KiB, less the kernel's static shared memory."""

_OPTIONS = ("--std=c++17",)
_INCLUDE = re.compile(r'^#include "([\w.]+)"', re.MULTILINE)


class CudaError(RuntimeError):
    """A call of the CUDA driver or of NVRTC failed."""


@dataclass(frozen=True)
class Image:
    """Machine code of one source file and variant, and the compiler's log (empty if the image is from the cache)."""

    code: bytes
    log: str


def compile_image(
    source_file: str, defines: Mapping[str, int | str], arch: str, options: tuple[str, ...] = ()
) -> Image:
    """Compile without the cache and without a GPU.

    Args:
        source_file: its name in this package.
        defines: macros that choose the variant.
        arch: for example "sm_90".
        options: more options of NVRTC, for example "--ptxas-options=-v".

    Raises:
        CudaError: NVRTC refuses the source; the message holds its log.
        UnsupportedError: NVRTC is not installed.
    """
    nvrtc = _nvrtc()
    sources = read_sources(source_file)
    headers = [name for name in sources if name != source_file]
    program = _call(
        nvrtc.nvrtcCreateProgram,
        sources[source_file].encode(),
        source_file.encode(),
        len(headers),
        [sources[name].encode() for name in headers],
        [name.encode() for name in headers],
    )
    try:
        arguments = [
            option.encode() for option in (*_OPTIONS, *options, f"--gpu-architecture={arch}", *_as_options(defines))
        ]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        # NVRTC writes into these. Bytes would not do: Python has one object for each byte, and shares it.
        log_buffer = bytearray(_call(nvrtc.nvrtcGetProgramLogSize, program))
        _call(nvrtc.nvrtcGetProgramLog, program, log_buffer)
        log = log_buffer.decode(errors="replace").rstrip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CudaError(f"{source_file} for {arch} with {dict(defines)}: {status.name}\n{log[-4000:]}")
        code = bytearray(_call(nvrtc.nvrtcGetCUBINSize, program))
        _call(nvrtc.nvrtcGetCUBIN, program, code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Image(bytes(code), log)


def image_for(source_file: str, defines: Mapping[str, int | str], arch: str) -> bytes:
    """The image from the disk cache. If there is none, it is compiled, and stored for the next process."""
    folder = _cache_folder()
    if folder is None:
        return compile_image(source_file, defines, arch).code
    path = folder / f"{_cache_key(source_file, defines, arch)}.cubin"
    image = _read_cached(path)
    if image is None:
        image = compile_image(source_file, defines, arch).code
        _write_cached(path, image)
    return image


class Kernel:
    """A kernel loaded on one device."""

    def __init__(self, module: Any, name: str) -> None:
        driver = _driver()
        self.name = name
        self._module = module
        self._function = _call(driver.cuModuleGetFunction, module, name.encode())
        self._handle = ctypes.c_void_p(int(self._function))  # ctypes would pass 32 bits of a plain int
        self._launch = _libcuda().cuLaunchKernelEx
        self._allowed_shared_bytes = DEFAULT_SHARED_BYTES
        self._constants: dict[str, int] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        stream: int,
        params: ctypes.Structure,
        shared_bytes: int = 0,
        dependent: bool = False,
    ) -> None:
        """Enqueue the kernel.

        Args:
            grid: blocks, in x, y and z.
            threads: threads per block.
            stream: a CUDA stream's handle.
            params: the kernel's parameters, copied before this returns.
            shared_bytes: dynamic shared memory per block.
            dependent: the kernel may start before the previous one in the stream has ended (programmatic dependent
                launch). It must execute `griddepcontrol.wait` before it accesses memory that the previous kernel reads
                or writes. It must also do so before it lets the next kernel start early, because that one relies on the
                end of all kernels before this one.
        """
        if shared_bytes > self._allowed_shared_bytes:
            self._allow_shared_bytes(shared_bytes)
        config = _LaunchConfig(*grid, threads, 1, 1, shared_bytes, stream, _DEPENDENT_ADDRESS, dependent)
        status = self._launch(ctypes.byref(config), self._handle, _Arguments(ctypes.addressof(params)), None)
        if status:
            raise CudaError(
                f"launch of {self.name}, {grid} blocks of {threads} threads, {shared_bytes} bytes: CUDA error {status}"
            )

    def read_constant(self, name: str) -> int:
        """The int32 that the image holds in the global variable `name`. The first call for a name synchronizes."""
        if name not in self._constants:
            driver = _driver()
            address, size = _call(driver.cuModuleGetGlobal, self._module, name.encode())
            if size != 4:
                raise CudaError(f"{name}: expected a variable of 4 bytes, got {size}")
            value = ctypes.c_int32()
            _call(driver.cuMemcpyDtoH, ctypes.addressof(value), address, 4)
            self._constants[name] = value.value
        return self._constants[name]

    def _allow_shared_bytes(self, shared_bytes: int) -> None:
        driver = _driver()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call(driver.cuFuncSetAttribute, self._function, attribute, shared_bytes)
        self._allowed_shared_bytes = shared_bytes


def load(
    source_file: str, name: str, defines: Mapping[str, int | str], device: torch.device, family: str = ""
) -> Kernel:
    """The kernel called `name`, compiled for `device` (with an index) and loaded on it. Later calls return the same
    kernel.

    Args:
        family: "a" for instructions that only GPUs of the device's own compute capability have.

    Raises:
        UnsupportedError: NVRTC or the driver's bindings are missing.
        CudaError: compilation or loading failed.
    """
    return _load(source_file, name, tuple(sorted(defines.items())), device.index, family)


@functools.cache
def _load(
    source_file: str, name: str, defines: tuple[tuple[str, int | str], ...], device_index: int, family: str
) -> Kernel:
    return Kernel(_load_module(source_file, defines, device_index, family), name)


@functools.cache
def _load_module(source_file: str, defines: tuple[tuple[str, int | str], ...], device_index: int, family: str) -> Any:
    major, minor = torch.cuda.get_device_capability(device_index)
    image = image_for(source_file, dict(defines), f"sm_{major}{minor}{family}")
    with torch.cuda.device(device_index):
        # makes torch's context current before any call of the driver
        torch.cuda.current_stream().synchronize()
        return _call(_driver().cuModuleLoadData, image)


def missing_reason() -> str | None:
    """Why nothing can be compiled and launched here, or None if it can."""
    try:
        _nvrtc()
        _driver()
    except UnsupportedError as error:
        return str(error)
    return None


@functools.cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # fails if the library is missing
    except (ImportError, RuntimeError) as error:  # cuda-pathfinder's error is a RuntimeError
        raise UnsupportedError(
            f"NVRTC is not installed (packages cuda-bindings and nvidia-cuda-nvrtc): {error}"
        ) from error
    return nvrtc


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UnsupportedError(f"the package cuda-bindings is not installed: {error}") from error
    return driver


@functools.cache
def _libcuda() -> ctypes.CDLL:
    """The driver for launches, through ctypes: a launch takes a tenth of the time that `cuda.bindings` needs."""
    return ctypes.CDLL("libcuda.so.1")


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: 64 bytes of value after an id and padding."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_DEPENDENT = _LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, b"", 1)
_DEPENDENT_ADDRESS = ctypes.addressof(_DEPENDENT)
_Arguments = ctypes.c_void_p * 1


def _call(function: Any, *arguments: Any) -> Any:
    """The results of a call of `cuda.bindings`: None, one result, or a tuple."""
    status, *results = function(*arguments)
    if int(status) != 0:
        raise CudaError(f"{function.__name__}: {status.name}")
    return results[0] if len(results) == 1 else tuple(results) or None


def read_sources(source_file: str) -> dict[str, str]:
    """The file and all files that it includes, by name."""
    sources: dict[str, str] = {}
    waiting = [source_file]
    while waiting:
        name = waiting.pop()
        if name not in sources:
            is_generated = name == constants.HEADER_NAME
            sources[name] = constants.header() if is_generated else (SOURCE_FOLDER / name).read_text()
            waiting += _INCLUDE.findall(sources[name])
    return sources


def read_source(source_file: str) -> str:
    """The file and all files that it includes, concatenated."""
    return "\n".join(read_sources(source_file).values())


def _as_options(defines: Mapping[str, int | str]) -> list[str]:
    return [f"--define-macro={name}={value}" for name, value in sorted(defines.items())]


def _cache_key(source_file: str, defines: Mapping[str, int | str], arch: str) -> str:
    sources = read_sources(source_file)
    version = _call(_nvrtc().nvrtcVersion)
    driver_version = _call(_driver().cuDriverGetVersion)
    parts = [
        str(version),
        str(driver_version),
        arch,
        *_OPTIONS,
        *_as_options(defines),
        *(part for item in sorted(sources.items()) for part in item),
    ]
    return f"{Path(source_file).stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"


def _cache_folder() -> Path | None:
    """The cache folder, or None with a warning if it cannot be used."""
    try:
        return private_folder("cuda")
    except (OSError, UnsupportedError) as error:
        logger.warning("sawkv: compiled kernels are not kept: %s", error)
        return None


def _read_cached(path: Path) -> bytes | None:
    """The image if the file is whole: its first bytes are the SHA-256 of the rest."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    image = content[DIGEST_BYTES:]
    return image if image and digest(image) == content[:DIGEST_BYTES] else None


def _write_cached(path: Path, image: bytes) -> None:
    """Write a temporary file, then rename it: other processes see the whole file or none."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            file.write(digest(image) + image)
        os.replace(file.name, path)
    except OSError as error:  # after a full disk, the next start only compiles again
        logger.warning("sawkv: a compiled kernel is not kept: %s", error)
