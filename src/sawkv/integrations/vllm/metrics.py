"""What `append` counts (`sawkv.format.counters`), as Prometheus metrics of the worker's process and as warnings in its log.

vLLM's /metrics shows the metrics of its other processes in Prometheus' multi-process mode only: with PROMETHEUS_MULTIPROC_DIR naming an
empty folder when vLLM starts, as `sawkv serve` does. docs/observability.md says what each metric means.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any, Final

import prometheus_client
import torch
from vllm.logger import init_logger

from sawkv.format.counters import COLUMNS, new_counters
from sawkv.format.layout import PageLayout

INTERVAL: Final = 1.0
"""Seconds between two reads of the device's counters."""
WARNING_INTERVAL: Final = 60.0
KINDS: Final = ("k", "v")

logger = init_logger(f"vllm.{__name__}")


class CounterReader:
    """Publishes what the layers of one group count.

    Args:
        layout: of the layers' pages.
        num_layers: that append to them in this process.
        device: of the pages.
        rank: label of the tokens' metric; ranks of a model see the same tokens. None if another group of layers counts them.
    """

    def __init__(self, layout: PageLayout, num_layers: int, device: torch.device, rank: int | None) -> None:
        self.counters: torch.Tensor | None = None
        """Made by the first `poll`, and not earlier: vLLM's sleep mode discards what is allocated while it makes the cache."""
        self._layout, self._num_layers, self._device, self._rank = layout, num_layers, device, rank
        self._copy = torch.zeros(2, len(COLUMNS), dtype=torch.float64, pin_memory=device.type == "cuda")
        self._copied: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._is_copying = False
        self._published = torch.zeros_like(self._copy)
        self._due = self._warning_due = 0.0

    def poll(self) -> None:
        """Call once a step. Most times it compares numbers; every `INTERVAL` seconds it starts a copy, published once that has ended."""
        if self._is_copying and (self._copied is None or self._copied.query()):
            self._is_copying = False
            self._publish()
        now = time.monotonic()
        if self._is_copying or now < self._due:
            return
        if self.counters is None:
            self.counters = new_counters(self._device)
        self._due, self._is_copying = now + INTERVAL, True
        self._copy.copy_(self.counters, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _publish(self) -> None:
        new = (self._copy - self._published).tolist()
        self._published.copy_(self._copy)
        layout, metrics = self._layout, _metrics()
        for kind, values in zip(KINDS, new, strict=True):
            for column, value in zip(COLUMNS, values, strict=True):
                metrics[column].labels(kind).inc(value)
            metrics["saved_bytes"].inc(values[0] * max(0.0, 2 * layout.head_dim - layout.token_bytes / 2))
        if self._rank is not None:
            metrics["tokens"].labels(str(self._rank)).inc(new[0][0] / (self._num_layers * layout.num_kv_heads))
        non_finite, saturated = (int(sum(values[COLUMNS.index(name)] for values in new)) for name in ("non_finite_rows", "saturated_rows"))
        if (non_finite or saturated) and time.monotonic() >= self._warning_due:
            self._warning_due = time.monotonic() + WARNING_INTERVAL
            logger.warning(
                "sawkv: rows of K or V with NaN or infinity: %d, with values beyond the format's range: %d (since the last look)",
                non_finite,
                saturated,
            )


@cache
def _metrics() -> dict[str, prometheus_client.Counter]:
    """By column of the counters, and two that follow from them. Made once a process, as the client's registry demands."""
    helps = {
        "rows": "Rows (of one token, KV head and layer) of K and of V appended to the cache.",
        "non_finite_rows": "Rows appended that hold NaN or infinity: they read as NaN.",
        "saturated_rows": "Rows appended whose range exceeds the format's: they are clamped.",
        "squared_error": "Sum of squared quantization errors over sampled rows, after centering and rotation.",
        "squared_norm": "Sum of squared values over the same rows.",
    }
    metrics = {name: prometheus_client.Counter(f"sawkv_{name}", text, ["kind"]) for name, text in helps.items()}
    metrics["tokens"] = prometheus_client.Counter("sawkv_tokens", "Tokens appended to the cache, recomputed ones included.", ["rank"])
    metrics["saved_bytes"] = prometheus_client.Counter("sawkv_saved_bytes", "Bytes that these rows would have taken more in 16 bits.")
    return metrics
