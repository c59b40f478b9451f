"""What an analysis found: K and V of each layer, and what each way of storing them does to attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sawkv.records import AttentionShape, Record

PREPARED, WIDER = "prepared", "int8"
"""What `sawkv serve` serves by itself, and what it serves with more bits."""
NAMES = {
    "int4": "int4, unprepared",
    "int4_plain": "int4, unrotated",
    "vllm_int4_per_token_head": "vLLM's own int4",
    "reference": "unquantized",
    "bf16_floor": "16-bit noise",
}
"""What people read in place of some methods' names."""

Grid = tuple[tuple[float, ...], ...]


class ChannelStats(Record, frozen=True):
    """K or V of one layer.

    Attributes:
        rms, mean: [num_kv_heads][head_dim], of each channel over tokens.
        offset: [num_kv_heads], share of the rows' energy that is their mean, a static vector: what a center removes.
        outlier: [num_kv_heads], rms of the largest channel over that of the median one.
    """

    rms: Grid
    mean: Grid
    offset: tuple[float, ...]
    outlier: tuple[float, ...]


class LayerStats(Record, frozen=True):
    """One layer.

    Attributes:
        k, v: K after RoPE, and V.
        sink: [num_q_heads], attention that a window's first token gets, mean over queries.
        sink_norm: [num_kv_heads], length of the first token's key over the median key's.
    """

    k: ChannelStats
    v: ChannelStats
    sink: tuple[float, ...]
    sink_norm: tuple[float, ...]


class MethodError(Record, frozen=True):
    """What one way of storing K and V does, by layer and KV head: each [num_layers][num_kv_heads].

    Attributes:
        method, bits, served: as in `Method`.
        k, v: squared error as a share of the variance.
        score: error of the scores in nats: their standard deviation under the attention itself, since a common offset
            of a query's scores changes nothing. Half its square is about the divergence of the attention.
        output: squared error of the attention output as a share of its variance over queries.
    """

    method: str
    bits: float
    served: str
    k: Grid
    v: Grid
    score: Grid
    output: Grid

    @property
    def mean_output(self) -> float:
        return mean(self.output)

    @property
    def worst(self) -> tuple[int, float]:
        """The layer that loses most of its output, and how much."""
        return max(enumerate(average(heads) for heads in self.output), key=lambda pair: pair[1])


class Recommendation(Record, frozen=True):
    """What to serve.

    Attributes:
        method: the method that it is, one of those measured; "" if none of sawkv's was.
        reason: one sentence an entry.
    """

    method: str
    reason: tuple[str, ...]

    @property
    def title(self) -> str:
        """In a few words."""
        return {PREPARED: "int4, prepared: nothing to do", WIDER: "int8, prepared"}.get(
            self.method, "nothing, for want of measurements"
        )

    @property
    def command(self) -> str:
        """What to type."""
        return "sawkv serve MODEL" + (f" --format {WIDER}" if self.method == WIDER else "")


class Analysis(Record, frozen=True):
    """One run of `sawkv analyze`. Attributes not listed are those of `records.Evaluation`.

    Attributes:
        windows: contexts of `window` tokens.
        layers: those that attend, first to last.
        rope_theta: base of RoPE's wavelengths, 0 if unknown.
    """

    written_by: ClassVar[str] = "sawkv analyze"

    model: str
    shape: AttentionShape
    device: str
    dtype: str
    text: str
    window: int
    windows: int
    stress: int
    rope_theta: float
    layers: tuple[LayerStats, ...]
    methods: tuple[MethodError, ...]
    recommendation: Recommendation
    seconds: float
    command: str = ""

    @property
    def name(self) -> str:
        """The model's, with its stress."""
        return self.model + (f", stress {self.stress}" if self.stress > 1 else "")


def mean(grid: Grid) -> float:
    return average([value for row in grid for value in row])


def label(method: str) -> str:
    """A method's name for people."""
    return NAMES.get(method, method)


def pair_energy(stats: ChannelStats) -> list[float]:
    """Mean square of K in each pair of channels (i, i + head_dim / 2) that RoPE turns together, over heads; the fastest
    pair first.
    """
    half = len(stats.rms[0]) // 2
    return [average([row[i] ** 2 + row[i + half] ** 2 for row in stats.rms]) for i in range(half)]


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
