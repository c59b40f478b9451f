"""`sawkv analyze`: what K and V of a model look like, what each way of storing them does to attention, and the format to take.

Layers are looked at one by one on the states of the unquantized model, so errors here do not build up from layer to layer as they do when
the model runs: `sawkv eval` measures that. Attention errors are taken at a sample of queries spread over each window.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sawkv.files import check_writable, writing
from sawkv.format.spec import CacheFormat
from sawkv.lab.methods import METHODS, Method, find_method, fit
from sawkv.lab.records import ModelShape, parse_record
from sawkv.lab.stress import apply_stress
from sawkv.prepare.model import EvalModel, collect_samples, default_dtype, find_device
from sawkv.prepare.samples import LayerStates, Reader
from sawkv.prepare.text import load_text

CALIBRATION_WINDOWS = 2
QUERIES = 256
"""Queries of each window and head at which attention is compared."""
TOLERANCE = 1.05
"""A simpler format is taken if its error is at most this many times the least."""
MAX_OUTPUT_ERROR = 0.1
"""Error of a layer's attention output, as a share of its variance, above which 8 bits are recommended."""

MIN_ORDER = 16
"""The smallest rotation compared."""
NAMES = {
    "default": "balanced and calibrated",
    "int4_center": "centered",
    "int4_center_feedback": "calibrated",
    "int4_center_plain": "centered without rotation",
    "int4_balanced": "balanced",
    "int4_plain": "plain int4",
    "reference": "unquantized",
    "bf16_floor": "16-bit noise",
}
"""What people read in place of some methods' names; calibrated is centered and with feedback, as `sawkv calibrate` does it."""

Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ChannelStats:
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


@dataclass(frozen=True)
class LayerStats:
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


@dataclass(frozen=True)
class MethodError:
    """What one way of storing K and V does, by layer and KV head: each [num_layers][num_kv_heads].

    Attributes:
        method, bits, served: as in `Method`.
        k, v: squared error as a share of the variance.
        score: error of the scores in nats: their standard deviation under the attention itself, since a common offset of a query's scores
            changes nothing. Half its square is about the divergence of the attention.
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
        return max(enumerate(sum(heads) / len(heads) for heads in self.output), key=lambda pair: pair[1])


@dataclass(frozen=True)
class Recommendation:
    """What to serve.

    Attributes:
        format: name of a cache format.
        balance: whether `sawkv balance` should rewrite the checkpoint first.
        calibrate: whether centers and feedback are worth their file.
        method: the method measured that this is, or "".
        reason: one sentence an entry.
    """

    format: str
    balance: bool
    calibrate: bool
    method: str
    reason: tuple[str, ...]

    @property
    def extras(self) -> str:
        """What goes with the format, for people."""
        parts = ["balanced channels"] * self.balance + ["centers and feedback of K and V"] * self.calibrate
        return f", with {' and '.join(parts)}" if parts else ""

    def commands(self) -> list[str]:
        """What to type."""
        model = "BALANCED" if self.balance else "MODEL"
        return [
            *(["sawkv balance MODEL --out BALANCED"] if self.balance else []),
            *([f"sawkv calibrate {model} --format {self.format} --out centers.safetensors"] if self.calibrate else []),
            f"sawkv serve {model} {'--calibration centers.safetensors' if self.calibrate else f'--format {self.format}'}",
        ]


@dataclass(frozen=True)
class Analysis:
    """One run of `sawkv analyze`. Attributes not listed are those of `records.Evaluation`.

    Attributes:
        windows: contexts of `window` tokens.
        layers: those that attend, first to last.
        rope_theta: base of RoPE's wavelengths, 0 if unknown.
    """

    model: str
    shape: ModelShape
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

    @property
    def name(self) -> str:
        """The model's, with its stress."""
        return self.model + (f", stress {self.stress}" if self.stress > 1 else "")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Analysis:
        """The inverse of `to_json`.

        Raises:
            SawkvError: the text is not such a record.
        """
        return parse_record(cls, text, "sawkv analyze")


def mean(grid: Grid) -> float:
    values = [value for row in grid for value in row]
    return sum(values) / len(values)


def run_analyze(
    model_folder: Path,
    text_file: Path | None,
    out: Path | None,
    *,
    methods: Sequence[str] | None,
    window: int,
    windows: int,
    stress: int,
    device: str | None,
) -> int:
    """Measure, print, and write the record as JSON to `out` if it is given. Returns 0.

    Args:
        model_folder: a checkpoint directory.
        text_file: UTF-8 text; None is the model's own held-out text.
        out: a file for the record; `sawkv report` makes a page of it.
        methods: names that `find_method` takes; None is a selection.
        window: tokens read from an empty cache at a time.
        windows: how many.
        stress: see `stress.apply_stress`; 1 is none.
        device: None is a GPU where there is one.

    Raises:
        SawkvError: bad input, by name.
    """
    if out is not None:
        check_writable(out)
    chosen = None if methods is None else [find_method(name) for name in methods]
    text = load_text(model_folder, text_file)
    scored, calibrating = text.split(window, windows, CALIBRATION_WINDOWS)
    where = find_device(device)
    model = EvalModel.load(model_folder, where, default_dtype(where))
    if stress > 1:
        apply_stress(model.layers, model.shape[2], stress)
    analysis = analyze(model, scored, calibrating, chosen, name=model_folder.resolve().name, text=text.name, stress=stress)
    print(describe(analysis))
    if out is not None:
        with writing(out) as part:
            part.write_text(analysis.to_json(), encoding="utf-8")
        print(f"\nwrote {out}; `sawkv report {out}` makes a page of it")
    return 0


@torch.inference_mode()
def analyze(
    model: EvalModel,
    windows: torch.Tensor,
    calibrating: torch.Tensor,
    methods: Sequence[Method] | None = None,
    *,
    name: str,
    text: str,
    stress: int = 1,
) -> Analysis:
    """The whole analysis.

    Args:
        model: unquantized.
        windows: [num_windows, window] token ids to measure on.
        calibrating: [num_windows, window] other token ids, for methods that learn.
        methods: None is a selection that `default_methods` makes.
        name, text, stress: of the model and of the text, for the record.
    """
    started = time.monotonic()
    num_q_heads, num_kv_heads, head_dim = model.shape
    methods = default_methods(head_dim) if methods is None else methods
    num_layers = len(model.layers)
    samples = collect_samples(model, calibrating)
    readers = [fit(method, samples) for method in tqdm(methods, desc="fitting", unit="method", leave=False, disable=None)]
    del samples
    stats = [_StatsSum() for _ in range(num_layers)]
    errors = [[_ErrorSum() for _ in range(num_layers)] for _ in methods]
    progress = tqdm(total=len(windows) * num_layers, desc="measuring", unit="layer", leave=False, disable=None)
    for ids in torch.split(windows, 1):
        for layer, states in enumerate(model.states(ids)):
            attention = _Attention(states, getattr(model.layers[layer], "sliding_window", None))
            stats[layer].add(states, attention)
            for i in range(len(methods)):
                errors[i][layer].add(states, attention, readers[i][layer])
            progress.update()
    progress.close()
    found = tuple(
        MethodError(
            method.name,
            round(method.bits(head_dim), 3),
            method.served,
            *(tuple(zip(*(error.shares() for error in errors[i]), strict=True))),
        )
        for i, method in enumerate(methods)
    )
    config = model.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return Analysis(
        model=name,
        shape=ModelShape(num_layers, num_q_heads, num_kv_heads, head_dim),
        device=model.device.type,
        dtype=str(model.model.dtype).removeprefix("torch."),
        text=text,
        window=windows.shape[1],
        windows=len(windows),
        stress=stress,
        rope_theta=float(rope.get("rope_theta") or 0),
        layers=tuple(stat.result() for stat in stats),
        methods=found,
        recommendation=recommend(found, head_dim),
        seconds=round(time.monotonic() - started, 1),
    )


def default_methods(head_dim: int) -> list[Method]:
    """Controls and peers, and what `recommend` chooses among."""
    return [METHODS["fp8"], METHODS["vllm_int4_per_token_head"], *(find_method(name) for name in _candidates(head_dim))]


def _candidates(head_dim: int) -> dict[str, tuple[str, bool, bool]]:
    """Methods that sawkv serves, those that ask for less first: the format, whether to balance and whether to calibrate."""
    order = CacheFormat("int4").resolve(head_dim).k_rotation_order
    rotated, wide = f"int4-k{order}-v{order}", f"int8-k{order}-v{order}"
    found = {name: (name, False, False) for name in (rotated, f"int4-k{order}-v0", f"int4-k{MIN_ORDER}-v{MIN_ORDER}")}
    return found | {
        "int4_plain": ("int4-k0-v0", False, False),
        "int4_center_feedback": (rotated, False, True),
        "int4_center_plain": ("int4-k0-v0", False, True),
        "int4_balanced": (rotated, True, False),
        "default": (rotated, True, True),
        wide: (wide, False, False),
    }


def recommend(errors: Sequence[MethodError], head_dim: int) -> Recommendation:
    """The 4-bit format that disturbs attention least, or 8 bits where every one disturbs it much; simple rules, said in the reason."""
    candidates = _candidates(head_dim)
    known = {error.method: error for error in errors}
    narrow = [known[name] for name in candidates if name in known and not name.startswith("int8")]
    if not narrow:
        rotated = next(iter(candidates))
        return Recommendation(rotated, False, False, "", ("The default: no 4-bit format of sawkv was among the methods measured.",))
    least = min(error.mean_output for error in narrow)
    best = next(error for error in narrow if error.mean_output <= TOLERANCE * least)
    others = sorted((error for error in narrow if error is not best), key=lambda error: error.mean_output)
    lost = f"an error of {best.mean_output:.2%} of the variance of the attention output"
    if best.mean_output == least:
        reason = [f"Of the formats of {best.bits:g} bits it disturbs attention least: {lost}."]
    else:
        reason = [f"The simplest of the {best.bits:g}-bit formats that are within {TOLERANCE - 1:.0%} of the best: {lost}."]
    if others:
        reason.append("Others: " + ", ".join(f"{label(error.method)} {error.mean_output:.2%}" for error in others) + ".")
    layer, worst = best.worst
    reason.append(f"Its worst layer is {layer}, at {worst:.2%}.")
    method = best.method
    if worst > MAX_OUTPUT_ERROR:
        method = next(name for name in candidates if name.startswith("int8"))
        reason = [
            f"No 4-bit format keeps the error of every layer's attention output under {MAX_OUTPUT_ERROR:.0%} of its variance: "
            f"{label(best.method)} errs by {worst:.2%} in layer {layer}.",
            *(f"At 8 bits it is {known[method].mean_output:.2%} over all." for _ in range(method in known)),
        ]
    reason.append("How far the model's predictions move is for `sawkv eval` to measure.")
    return Recommendation(*candidates[method], method, tuple(reason))


def label(method: str) -> str:
    """A method's name for people."""
    return NAMES.get(method, method)


class _Attention:
    """The unquantized attention of one window and layer, at a sample of queries."""

    def __init__(self, states: LayerStates, sliding_window: int | None) -> None:
        num_tokens, num_kv_heads, head_dim = states.k.shape
        device = states.k.device
        first = min(16, num_tokens - 1)  # the first queries see too few keys
        self.position = torch.linspace(first, num_tokens - 1, min(QUERIES, num_tokens - first), device=device).long()
        keys = torch.arange(num_tokens, device=device)
        self.hidden = keys > self.position[:, None]  # [queries, keys]
        if sliding_window:
            self.hidden |= keys <= self.position[:, None] - sliding_window
        # [num_kv_heads, group * queries, head_dim]
        self.q = states.q.view(num_tokens, num_kv_heads, -1, head_dim)[self.position].permute(1, 2, 0, 3).flatten(1, 2)
        self.q = self.q * states.softmax_scale
        self.scores = self._scores(states.k)
        self.weights = self.scores.softmax(-1)
        self.output = self.weights @ states.v.transpose(0, 1)
        by_query = self._by_query(self.output)
        self.variance = (by_query - by_query.mean(2, keepdim=True)).square().sum((1, 2, 3))

    def _scores(self, k: torch.Tensor) -> torch.Tensor:
        """[num_kv_heads, group * queries, keys], -inf where a key is hidden."""
        scores = self._by_query(self.q @ k.permute(1, 2, 0))
        return scores.masked_fill(self.hidden, -math.inf).flatten(1, 2)

    def sink(self) -> torch.Tensor:
        """[num_q_heads], mean over queries of the first key's weight."""
        return self._by_query(self.weights)[..., 0].mean(-1).flatten()

    def _by_query(self, x: torch.Tensor) -> torch.Tensor:
        """[num_kv_heads, group * queries, size] to [num_kv_heads, group, queries, size]."""
        return x.view(x.shape[0], -1, len(self.position), x.shape[-1])

    def errors(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of K and V as read: variance of the scores' error under the attention, summed over queries; squared error of the output, and
        its squared distance from its mean over queries. Each [num_kv_heads]."""
        scores = self._scores(k)
        delta = (scores - self.scores).nan_to_num(nan=0.0)  # hidden keys: -inf less -inf
        offset = (self.weights * delta).sum(-1, keepdim=True)
        spread = (self.weights * (delta - offset).square()).sum((1, 2))
        lost = (scores.softmax(-1) @ v.transpose(0, 1) - self.output).square().sum((1, 2))
        return spread, lost, self.variance


class _StatsSum:
    """Statistics of one layer, gathered over windows."""

    def __init__(self) -> None:
        self._moments: list[torch.Tensor] = []
        self._sinks: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []

    def add(self, states: LayerStates, attention: _Attention) -> None:
        self._moments.append(torch.stack([torch.stack([x.mean(0), x.square().mean(0)]) for x in (states.k, states.v)]).double().cpu())
        self._sinks.append(attention.sink().cpu())
        norms = states.k.norm(dim=-1)
        self._norms.append((norms[0] / norms.median(0).values).cpu())

    def result(self) -> LayerStats:
        k, v = (self._channels(first, second) for first, second in torch.stack(self._moments).mean(0))
        return LayerStats(k, v, _row(torch.stack(self._sinks).mean(0)), _row(torch.stack(self._norms).mean(0)))

    @staticmethod
    def _channels(first: torch.Tensor, second: torch.Tensor) -> ChannelStats:
        rms = second.sqrt()
        return ChannelStats(
            rms=_grid(rms),
            mean=_grid(first),
            offset=_row(first.square().sum(-1) / second.sum(-1)),
            outlier=_row(rms.amax(-1) / rms.median(-1).values),
        )


class _ErrorSum:
    """Errors of one method in one layer, gathered over windows."""

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []

    def add(self, states: LayerStates, attention: _Attention, readers: tuple[Reader, Reader]) -> None:
        k, v = readers[0](states.k), readers[1](states.v)
        sums = []
        for got, x in ((k, states.k), (v, states.v)):
            sums += [(got - x).square().sum((0, 2)), (x - x.mean(0)).square().sum((0, 2))]
        spread, lost, variance = attention.errors(k, v)
        sums += [spread, torch.full_like(spread, attention.q.shape[1]), lost, variance]
        self._rows.append(torch.stack(sums).double().cpu())

    def shares(self) -> Iterator[tuple[float, ...]]:
        """`MethodError`'s k, v, score and output of this layer, each by KV head."""
        k, k_of, v, v_of, spread, count, lost, variance = torch.stack(self._rows).sum(0)
        for value in (k / k_of, v / v_of, (spread / count).sqrt(), lost / variance):
            yield _row(value)


def _row(x: torch.Tensor) -> tuple[float, ...]:
    """Values of a vector, with four digits."""
    return tuple(float(f"{value:.4g}") for value in x.tolist())


def _grid(x: torch.Tensor) -> Grid:
    return tuple(_row(row) for row in x)


def describe(analysis: Analysis) -> str:
    """The analysis as text for a terminal, 100 columns or so."""
    shape = analysis.shape
    lines = [
        f"{analysis.name}: {shape.num_layers} layers, {shape.num_q_heads} query heads, {shape.num_kv_heads} KV heads of {shape.head_dim}",
        f"{analysis.text} text, {analysis.windows} x {analysis.window:,} tokens, {analysis.dtype} on {analysis.device}, "
        f"{analysis.seconds:.0f} s",
        "",
        "layer     K offset  outlier  by RoPE pair, fast to slow      V offset  outlier     first token: attention   |k|",
    ]
    for index, layer in enumerate(analysis.layers):
        lines.append(
            f"{index:>5}{_mean(layer.k.offset):>12.0%}{_mean(layer.k.outlier):>8.1f}x  {_pairs(layer.k):<28}{_mean(layer.v.offset):>9.0%}"
            f"{_mean(layer.v.outlier):>8.1f}x{_mean(layer.sink):>23.0%}{_mean(layer.sink_norm):>9.1f}x"
        )
    lines += [
        "offset: energy that is one static vector, which a center removes.  outlier: largest channel over the median one.",
        "",
        f"{'stored as':<28}{'bits':>6}{'error of K':>13}{'of V':>10}{'of scores':>13}{'of attention':>15}{'worst layer':>15}",
    ]
    for error in sorted(analysis.methods, key=lambda error: (error.bits, error.mean_output)):
        worst_layer, worst = error.worst
        mark = "->" if error.method == analysis.recommendation.method else "  "
        lines.append(
            f"{mark} {label(error.method):<25}{error.bits:>6.2f}{mean(error.k):>13.3%}{mean(error.v):>10.3%}{mean(error.score):>8.4f} nats"
            f"{error.mean_output:>15.3%}{worst:>10.3%} in {worst_layer}"
        )
    advice = analysis.recommendation
    lines += [
        "errors are squared, as shares of the variance of K, of V and of the attention output",
        "",
        f"Recommended: {advice.format}{advice.extras}",
        *(f"  {sentence}" for sentence in advice.reason),
        *(f"  $ {command}" for command in advice.commands()),
    ]
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pair_energy(stats: ChannelStats) -> list[float]:
    """Mean square of K in each pair of channels (i, i + head_dim / 2) that RoPE turns together, over heads; the fastest pair first."""
    half = len(stats.rms[0]) // 2
    return [_mean([row[i] ** 2 + row[i + half] ** 2 for row in stats.rms]) for i in range(half)]


def _pairs(stats: ChannelStats, width: int = 26) -> str:
    """Energy by RoPE pair as a line of blocks, log scale over three decades."""
    energy = pair_energy(stats)
    width = min(width, len(energy))
    cells = [max(energy[len(energy) * i // width : len(energy) * (i + 1) // width]) for i in range(width)]
    top = max(cells) or 1.0
    levels = [max(0.0, 1 + math.log10(max(cell / top, 1e-9)) / 3) for cell in cells]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * level))] for level in levels)
