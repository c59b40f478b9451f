"""A server of one cache, which is what its name says. Imports no vLLM."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from sawkv.bench.records import FP8, SIXTEEN_BITS, Served
from sawkv.errors import UnsupportedError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm import client as vllm_client
from sawkv.integrations.vllm.client import ASKABLE, Client, serving
from sawkv.integrations.vllm.config import engine_options
from sawkv.integrations.vllm.options import Options
from sawkv.integrations.vllm.preflight import environment
from sawkv.integrations.vllm.server import server_command

SKIP_LAYERS: Final = "--kv-cache-dtype-skip-layers"


@contextlib.contextmanager
def serve_cache(
    model: str,
    cache: str,
    words: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    say: Callable[[str], object] = lambda stage: None,
) -> Iterator[tuple[Client, Served]]:
    """Serve a model from one cache within the block.

    Args:
        model: a checkpoint directory, or a name on the hub.
        cache: `records.SIXTEEN_BITS`, `records.FP8`, or a format.
        words: options of vLLM's server, and of `sawkv serve` where `cache` is a format.
        log: file for the server's output.
        env: more variables of its environment.
        say: called with a description of each stage of the start.

    Yields:
        What sends requests, and the record of the start.

    Raises:
        UnsupportedError: it cannot be served, or is not what its name says.
    """
    start = time.monotonic()
    command = [*_command(model, cache, words), *ASKABLE[0]]
    with serving(command, log, env={**environment(), **ASKABLE[1], **(env or {})}, say=say) as client:
        served = Served(
            cache,
            notice=client.notice(),
            start_s=round(time.monotonic() - start, 1),
            kv_tokens=client.kv_tokens(),
            layers=client.kv_cache_dtypes(),
        )
        if cache not in (SIXTEEN_BITS, FP8) and not served.notice:
            raise UnsupportedError("vLLM's log: expected sawkv's line, got none: vLLM runs with a cache of its own")
        check_layers(cache, served.layers, words)
        yield client, served


def check_layers(cache: str, layers: Mapping[str, int], words: Sequence[str]) -> None:
    """Refuse a cache that is not what its name says, unless the user skips layers.

    Args:
        cache, words: as of `serve_cache`.
        layers: how many attention layers have each dtype of vLLM's.

    Raises:
        UnsupportedError: layers have another dtype.
    """
    wanted = {SIXTEEN_BITS: "auto", FP8: "fp8"}.get(cache)
    if wanted is None:
        wanted = engine_options(CacheFormat.parse(cache))["kv_cache_dtype"]
    vllm_client.check_layers(layers, wanted, all_of_them=not Options(words).has(SKIP_LAYERS))


def _command(model: str, cache: str, words: Sequence[str]) -> list[str]:
    if cache == SIXTEEN_BITS:
        return server_command(model, None, words)
    if cache == FP8:
        return server_command(model, None, [*words, "--kv-cache-dtype", "fp8"])
    return [sys.executable, "-m", "sawkv", "serve", model, "--format", cache, *words]
