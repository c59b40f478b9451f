"""What `sawkv bench` measured."""

from __future__ import annotations

import math
from typing import ClassVar

from sawkv.errors import SawkvError
from sawkv.records import Record

SIXTEEN_BITS, FP8 = "16-bit", "fp8"
"""vLLM's own caches. Any other name is a cache format of sawkv."""


class Setting(Record, frozen=True):
    """What is measured, the same for every cache.

    Attributes:
        model: as given.
        input_tokens, output_tokens: of each request; answers are never shorter.
        prefix_tokens: of the input that all requests of one load share; 0 leaves that load out.
        requests: of each load.
        rates: requests per second; empty is shares of what the first cache does when all are sent at once.
        ttft_ms, tpot_ms: time to the first token, and per token after it, within which a request counts as goodput.
        options: for vLLM's server.
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
        for name in ("ttft_ms", "tpot_ms", *("rates" for _ in self.rates)):
            value = min(self.rates) if name == "rates" else getattr(self, name)
            if not value > 0 or math.isnan(value):
                raise SawkvError(f"--{name.removesuffix('_ms')}: expected a number above 0, got {value}")


class Load(Record, frozen=True):
    """Requests that arrive at random, `rate` per second, or all at once where it is infinite; `prefix_tokens` of them
    are shared.
    """

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
        goodput_s: requests per second that kept both latency targets.
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
        kv_tokens: that its cache holds, as vLLM says.
        predicted_tokens: the same, as `sawkv plan` predicts it; None where it cannot.
        results: one for each load.
    """

    cache: str
    problem: str = ""
    notice: str = ""
    start_s: float = 0.0
    kv_tokens: int = 0
    predicted_tokens: int | None = None
    results: tuple[Result, ...] = ()

    def result(self, load: Load) -> Result | None:
        return next((result for result in self.results if result.load == load), None)


class Bench(Record, frozen=True):
    """One run of `sawkv bench`.

    Attributes:
        setting: what was asked for.
        device: what vLLM runs on.
        versions: of sawkv, vLLM and the like.
        caches: in the order asked for.
        loads: those of every cache; without rates until the first cache was measured, if they follow from it.
        served: as far as measured.
        generator: the load generator's command for the first load.
        command: what was typed.
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
