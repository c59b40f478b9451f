"""What `append` counts (`sawkv.format.counters`), as Prometheus metrics of the worker's process and as warnings in its
log.

vLLM's /metrics shows the metrics of its other processes in Prometheus' multi-process mode only: with
PROMETHEUS_MULTIPROC_DIR naming an empty folder when vLLM starts, as `sawkv serve` does. docs/observability.md says what
each metric means.

A step starts a read and the next one publishes it, so that no step waits for the device. When no step comes, a thread
of the worker reads.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import prometheus_client
import torch
from vllm.logger import init_logger

from sawkv.format.counters import COLUMNS, new_counters
from sawkv.format.layout import PageLayout

INTERVAL: Final = 1.0
"""Seconds between two reads of the device's counters."""
IDLE: Final = 1.0
"""Seconds without a step after which the thread reads, and between its reads."""
PATIENCE: Final = 60.0
"""Seconds without a step and without news after which the thread stops reading. No step takes as long."""
WARNING_INTERVAL: Final = 60.0
KINDS: Final = ("k", "v")
LEAST_SAMPLED: Final = 128
"""Sampled rows of a layer from which its drift is told: with fewer it would be noise."""

logger = init_logger(f"vllm.{__name__}")


@dataclass
class CountedLayer:
    """A layer as its metrics know it.

    Attributes:
        name: vLLM's.
        energies: what the mean squared length of its rows of K and of V should be: `LayerCalibration.k_energy` and
            `v_energy`, over its heads. None if it is not known.
    """

    name: str
    energies: tuple[float, float] | None = None


class CounterReader:
    """Publishes what the layers of one group count.

    Args:
        layout: of the layers' pages.
        layers: that append to them in this process.
        device: of the pages.
        rank: label of the tokens' metric; ranks of a model see the same tokens. None if another group of layers counts
            them.
    """

    def __init__(
        self, layout: PageLayout, layers: Sequence[CountedLayer], device: torch.device, rank: int | None
    ) -> None:
        self.counters: torch.Tensor | None = None
        """[num_layers, 2, 6] fp64, a layer's as in `sawkv.format.counters`. Made by the first `poll`, and not earlier:
        vLLM's sleep mode discards what is allocated while it makes the cache.
        """
        self._layout, self._layers, self._device, self._rank = layout, layers, device, rank
        self._copy = torch.zeros(len(layers), 2, len(COLUMNS), dtype=torch.float64, pin_memory=device.type == "cuda")
        self._copied: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._is_copying = False
        self._published, self._compared = torch.zeros_like(self._copy), torch.zeros_like(self._copy)
        self._due = self._warning_due = self._stepped = self._changed = 0.0
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        _readers.add(self)

    def poll(self) -> None:
        """Call once a step. Most times it compares numbers; every `INTERVAL` seconds it starts a copy, published once
        that has ended.
        """
        self._stepped = time.monotonic()
        if (self._is_copying or self._stepped >= self._due) and self._lock.acquire(
            blocking=False
        ):  # the thread may read just now
            try:
                self._poll()
            finally:
                self._lock.release()

    def _poll(self) -> None:
        if self._is_copying and (self._copied is None or self._copied.query()):
            self._is_copying = False
            self._publish()
        now = time.monotonic()
        if self._is_copying or now < self._due:
            return
        if self.counters is None:
            self.counters = torch.stack([new_counters(self._device) for _ in self._layers])
        self._due, self._is_copying = now + INTERVAL, True
        self._copy.copy_(self.counters, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def flush(self) -> None:
        """Publish all that the device has counted. Waits for the copy alone; called by the thread, and at the end of
        the process.
        """
        with self._lock:
            if self.counters is None or (self._is_copying and self._copied is not None and not self._copied.query()):
                return
            if self._is_copying:
                self._is_copying = False
                self._publish()
            if self._copied is None:
                self._copy.copy_(self.counters)
            else:
                with torch.cuda.device(self._device):
                    self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
                    with torch.cuda.stream(self._stream):
                        self._copy.copy_(self.counters, non_blocking=True)
                        self._stream.synchronize()
            self._publish()

    def flush_if_idle(self, now: float) -> None:
        """`flush`, if no step has begun for `IDLE` seconds. A step that began may still count: so it goes on until
        there is no news.
        """
        if now - self._stepped >= IDLE and now - max(self._stepped, self._changed) < PATIENCE:
            self.flush()

    def _publish(self) -> None:
        if torch.equal(self._copy, self._published):
            return
        self._changed = time.monotonic()
        self._publish_drift()
        new = (self._copy - self._published).sum(0).tolist()
        self._published.copy_(self._copy)
        layout, metrics = self._layout, _metrics()
        for kind, values in zip(KINDS, new, strict=True):
            for column, value in zip(COLUMNS, values, strict=True):
                metrics[column].labels(kind).inc(value)
            metrics["saved_bytes"].inc(values[0] * max(0.0, 2 * layout.head_dim - layout.token_bytes / 2))
        if self._rank is not None:
            metrics["tokens"].labels(str(self._rank)).inc(new[0][0] / (len(self._layers) * layout.num_kv_heads))
        non_finite, saturated = (
            int(sum(values[COLUMNS.index(name)] for values in new)) for name in ("non_finite_rows", "saturated_rows")
        )
        if (non_finite or saturated) and time.monotonic() >= self._warning_due:
            self._warning_due = time.monotonic() + WARNING_INTERVAL
            logger.warning(
                "sawkv: rows of K or V with NaN or infinity: %d, with values beyond the format's range: %d (since the"
                " last look)",
                non_finite,
                saturated,
            )

    def _publish_drift(self) -> None:
        """For each layer and kind of which enough rows were sampled since it was last told."""
        new = self._copy - self._compared
        sampled, norm = (new[..., COLUMNS.index(name)].tolist() for name in ("sampled_rows", "squared_norm"))
        for place, layer in enumerate(self._layers):
            for kind, energy in enumerate(layer.energies or ()):
                if energy and sampled[place][kind] >= LEAST_SAMPLED:
                    _drift().labels(layer.name, KINDS[kind]).set(norm[place][kind] / sampled[place][kind] / energy)
                    self._compared[place, kind] = self._copy[place, kind]


_readers: weakref.WeakSet[CounterReader] = weakref.WeakSet()


def publish_when_idle(worker: Any) -> None:
    """Have a worker publish its counts when no steps come, and when it ends. Called in each when vLLM has captured its
    CUDA graphs: while it does, other threads may not use CUDA.
    """
    _start_thread()


@cache
def _start_thread() -> None:
    def watch() -> None:
        while True:
            time.sleep(IDLE)
            for reader in list(_readers):
                reader.flush_if_idle(time.monotonic())

    def end() -> None:
        for reader in list(_readers):
            reader.flush()

    threading.Thread(target=watch, name="sawkv-metrics", daemon=True).start()
    atexit.register(end)


@cache
def _metrics() -> dict[str, prometheus_client.Counter]:
    """By column of the counters, and two that follow from them. Made once a process, as the client's
    registry demands.
    """
    helps = {
        "rows": "Rows (of one token, KV head and layer) of K and of V appended to the cache.",
        "non_finite_rows": "Rows appended that hold NaN or infinity: they read as NaN.",
        "saturated_rows": "Rows appended whose range exceeds the format's: they are clamped.",
        "squared_error": "Sum of squared quantization errors over sampled rows, after centering and rotation.",
        "squared_norm": "Sum of squared values over the same rows.",
        "sampled_rows": "The rows that these sums are over.",
    }
    metrics = {name: prometheus_client.Counter(f"sawkv_{name}", text, ["kind"]) for name, text in helps.items()}
    metrics["tokens"] = prometheus_client.Counter(
        "sawkv_tokens", "Tokens appended to the cache, recomputed ones included.", ["rank"]
    )
    metrics["saved_bytes"] = prometheus_client.Counter(
        "sawkv_saved_bytes", "Bytes saved by these rows, compared with a 16-bit cache."
    )
    return metrics


@cache
def _drift() -> prometheus_client.Gauge:
    """Made when there is a first value. Ranks have other heads; of what they say the largest counts."""
    text = (
        "Mean squared length of a layer's rows as they are stored, over that on the text that it was prepared on."
        " Errors grow with it."
    )
    return prometheus_client.Gauge("sawkv_drift", text, ["layer", "kind"], multiprocess_mode="livemax")
