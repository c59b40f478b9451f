"""Publishes the counters of `append` (`sawkv.format.counters`) as Prometheus metrics of the worker's process, and as
warnings in its log.

vLLM's /metrics shows metrics of its other processes only in Prometheus' multi-process mode: PROMETHEUS_MULTIPROC_DIR
names an empty folder when vLLM starts, as under `sawkv serve`. docs/observability.md explains each metric.

One step starts a read, and a later step publishes it, so no step waits for the device. If no step comes, a thread of
the worker reads.
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
"""Seconds without a step and without new counts after which the thread stops reading. No step takes as long."""
WARNING_INTERVAL: Final = 60.0
KINDS: Final = ("k", "v")
LEAST_SAMPLED: Final = 128
"""Sampled rows of a layer from which its drift is published. Fewer would show noise."""

logger = init_logger(f"vllm.{__name__}")


@dataclass
class CountedLayer:
    """A layer, as its metrics show it.

    Attributes:
        name: vLLM's name of the layer.
        energies: expected mean squared length of its rows of K and of V: `LayerCalibration.k_energy` and `v_energy`,
            mean over heads. None if unknown.
    """

    name: str
    energies: tuple[float, float] | None = None


class CounterReader:
    """Publishes the counters of one group of layers.

    Args:
        layout: of the layers' pages.
        layers: layers that append to them in this process.
        device: of the pages.
        rank: label of the token metric, because ranks of a model see the same tokens. None if another group counts
            them.
    """

    @torch.inference_mode(False)  # vLLM 0.33 makes it within inference mode, which the thread is not in
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
        """Call once per step. Mostly it only compares numbers. Every `INTERVAL` seconds it starts a copy, which it
        publishes when the copy has ended.
        """
        self._stepped = time.monotonic()
        # The thread may read just now.
        if (self._is_copying or self._stepped >= self._due) and self._lock.acquire(blocking=False):
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
        """Publish everything that the device has counted. Waits only for the copy. Called by the thread, and at the end
        of the process.
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
        """`flush`, if no step has begun for `IDLE` seconds. A step that has begun may still count, so it repeats until
        nothing is new.
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
        """Publish the drift of each layer and kind of which enough new rows were sampled."""
        new = self._copy - self._compared
        sampled, norm = (new[..., COLUMNS.index(name)].tolist() for name in ("sampled_rows", "squared_norm"))
        for place, layer in enumerate(self._layers):
            for kind, energy in enumerate(layer.energies or ()):
                if energy and sampled[place][kind] >= LEAST_SAMPLED:
                    _drift().labels(layer.name, KINDS[kind]).set(norm[place][kind] / sampled[place][kind] / energy)
                    self._compared[place, kind] = self._copy[place, kind]


_readers: weakref.WeakSet[CounterReader] = weakref.WeakSet()


def publish_when_idle(worker: Any) -> None:
    """Make a worker publish its counts when no steps come, and when it ends. Called in each worker after vLLM has
    captured its CUDA graphs, because other threads may not use CUDA during capture.
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
    """Prometheus counters by column, and two derived ones. Made once per process, as the client's registry requires."""
    helps = {
        "rows": "Rows appended to the cache. A row is K or V of one token, KV head and layer.",
        "non_finite_rows": "Appended rows that contain NaN or infinity. They are read as NaN.",
        "saturated_rows": "Appended rows whose range exceeds that of the format. Their values are clamped.",
        "squared_error": "Sum of squared quantization errors over sampled rows, after centering and rotation.",
        "squared_norm": "Sum of squared values over the same rows.",
        "sampled_rows": "Number of rows in these sums.",
    }
    metrics = {name: prometheus_client.Counter(f"sawkv_{name}", text, ["kind"]) for name, text in helps.items()}
    metrics["tokens"] = prometheus_client.Counter(
        "sawkv_tokens", "Tokens appended to the cache. Recomputed tokens count again.", ["rank"]
    )
    metrics["saved_bytes"] = prometheus_client.Counter(
        "sawkv_saved_bytes", "Bytes saved by these rows, compared with a 16-bit cache."
    )
    return metrics


@cache
def _drift() -> prometheus_client.Gauge:
    """The drift gauge, made with its first value. Ranks hold different heads, and the largest value counts."""
    text = (
        "Mean squared length of a layer's stored rows, divided by that on the text of the preparation."
        " Quantization errors are proportional to it."
    )
    return prometheus_client.Gauge("sawkv_drift", text, ["layer", "kind"], multiprocess_mode="livemax")
