"""The record of `sawkv analyze`: statistics of K and V per layer, and the error of attention for each method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sawkv.records import AttentionShape, Record

PREPARED, WIDER = "prepared", "int8"
"""The method that `sawkv serve` uses by default, and the one with more bits."""
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
    """Statistics of K or V of one layer.

    Attributes:
        rms, mean: [num_kv_heads][head_dim], root mean square and mean of each channel over tokens.
        offset: [num_kv_heads], share of the rows' energy in their mean, which a center removes.
        outlier: [num_kv_heads], rms of the largest channel over rms of the median channel.
    """

    rms: Grid
    mean: Grid
    offset: tuple[float, ...]
    outlier: tuple[float, ...]


class LayerStats(Record, frozen=True):
    """Statistics of one layer.

    Attributes:
        k, v: of K after RoPE, and of V.
        sink: [num_q_heads], attention weight of a window's first token, mean over queries.
        sink_norm: [num_kv_heads], length of the first token's key over that of the median key.
    """

    k: ChannelStats
    v: ChannelStats
    sink: tuple[float, ...]
    sink_norm: tuple[float, ...]


class MethodError(Record, frozen=True):
    """Errors of one method by layer and KV head, each [num_layers][num_kv_heads].

    Attributes:
        method, bits, served: as in `Method`.
        k, v: squared error as a share of the variance.
        score: error of scores in nats: their standard deviation under the attention weights, because an offset common
            to all scores of a query changes nothing. Half of its square is about the KL divergence of the attention
            weights.
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
        """The layer with the largest output error, and that error."""
        return max(enumerate(average(heads) for heads in self.output), key=lambda pair: pair[1])


class Recommendation(Record, frozen=True):
    """The format to serve.

    Attributes:
        method: one of the measured methods; "" if none of them is sawkv's.
        reason: sentences.
    """

    method: str
    reason: tuple[str, ...]

    @property
    def title(self) -> str:
        """The recommendation in a few words."""
        return {PREPARED: "int4, prepared: nothing to do", WIDER: "int8, prepared"}.get(
            self.method, "nothing, for want of measurements"
        )

    @property
    def command(self) -> str:
        """The command that serves it."""
        return "sawkv serve MODEL" + (f" --format {WIDER}" if self.method == WIDER else "")


class Analysis(Record, frozen=True):
    """One run of `sawkv analyze`. Attributes not listed are those of `records.Evaluation`.

    Attributes:
        windows: number of contexts of `window` tokens.
        layers: attention layers, first to last.
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
        """Name of the model, with its stress."""
        return self.model + (f", stress {self.stress}" if self.stress > 1 else "")


def mean(grid: Grid) -> float:
    return average([value for row in grid for value in row])


def label(method: str) -> str:
    """A method's name as tables and plots show it."""
    return NAMES.get(method, method)


def pair_energy(stats: ChannelStats) -> list[float]:
    """Mean square of K in each pair of channels (i, i + head_dim / 2) that RoPE rotates together, over heads. Fastest
    pair first.
    """
    half = len(stats.rms[0]) // 2
    return [average([row[i] ** 2 + row[i + half] ** 2 for row in stats.rms]) for i in range(half)]


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
