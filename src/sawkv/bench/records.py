"""The record of `sawkv bench`."""

from __future__ import annotations

import math
from typing import ClassVar

import msgspec

from sawkv.errors import SawkvError
from sawkv.records import Record

SIXTEEN_BITS, FP8 = "16-bit", "fp8"
"""vLLM's own caches. Any other name is a cache format of sawkv."""


class Setting(Record, frozen=True):
    """Settings of a run, the same for every cache.

    Attributes:
        model: as given.
        input_tokens, output_tokens: per request; answers are never shorter.
        prefix_tokens: part of the input that all requests of one load share; 0 skips that load.
        requests: per load.
        rates: requests per second; empty derives them from the request rate of the first cache.
        ttft_ms, tpot_ms: limits on the time to the first token and per further token of a request that counts as
            goodput.
        options: of vLLM's server.
    """

    model: str
    input_tokens: int = 512
    output_tokens: int = 128
    prefix_tokens: int = 256
    requests: int = 64
    rates: tuple[float, ...] = ()
    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.prefix_tokens < self.input_tokens:
            raise SawkvError(
                f"--prefix: expected fewer tokens than --input, {self.input_tokens}, got {self.prefix_tokens}"
            )
        for rate in self.rates:
            if not 0 < rate < math.inf:  # NaN fails both
                raise SawkvError(f"--rates: expected finite numbers above 0, got {rate}")
        for name in ("ttft", "tpot"):
            value = getattr(self, f"{name}_ms")
            if not value > 0:
                raise SawkvError(f"--{name}: expected a number above 0, got {value}")


class Load(Record, frozen=True):
    """Requests that share `prefix_tokens`. `rate` arrive per second, at random; all at once if it is infinite."""

    rate: float
    prefix_tokens: int = 0

    @property
    def name(self) -> str:
        if self.prefix_tokens:
            return "shared prefix"
        return f"{self.rate:g}/s" if math.isfinite(self.rate) else "all at once"


class Result(Record, frozen=True):
    """One load on one cache, as the load generator reports it.

    Attributes:
        request_s, output_tok_s: answered requests and output tokens per second.
        goodput_s: requests per second within both latency limits.
        ttft_p50_ms, ttft_p99_ms: time to first token.
        tpot_p50_ms, tpot_p99_ms: mean time per token after the first, over requests.
        prefix_hits: share of prompt tokens that the server found in its cache.
    """

    load: Load
    seconds: float
    request_s: float
    output_tok_s: float
    goodput_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    prefix_hits: float


class Served(Record, frozen=True):
    """One cache.

    Attributes:
        cache: `SIXTEEN_BITS`, `FP8`, or a format.
        problem: why it was not served, or ""; other fields are then empty.
        notice: sawkv's line in the server's log, or "".
        start_s: seconds until the server answered.
        kv_tokens: tokens that its cache holds, as vLLM reports.
        layers: number of attention layers by vLLM's dtype of their cache.
        predicted_tokens: the prediction of `sawkv plan`, or None.
        results: one per load.
    """

    cache: str
    problem: str = ""
    notice: str = ""
    start_s: float = 0.0
    kv_tokens: int = 0
    layers: dict[str, int] = msgspec.field(default_factory=dict)
    predicted_tokens: int | None = None
    results: tuple[Result, ...] = ()

    def result(self, load: Load) -> Result | None:
        return next((result for result in self.results if result.load == load), None)


class Bench(Record, frozen=True):
    """One run of `sawkv bench`.

    Attributes:
        setting: settings of the run.
        device: the device of vLLM.
        versions: of sawkv, vLLM and so on.
        caches: in the order asked for.
        loads: the same for every cache. Derived rates are missing until the first cache is measured.
        served: caches measured so far.
        generator: the load generator's command for the first load.
        command: the command line.
    """

    written_by: ClassVar[str] = "sawkv bench"

    setting: Setting
    device: str
    versions: dict[str, str]
    caches: tuple[str, ...]
    loads: tuple[Load, ...] = ()
    served: tuple[Served, ...] = ()
    generator: str = ""
    command: str = ""

    def of(self, cache: str) -> Served | None:
        return next((served for served in self.served if served.cache == cache), None)
