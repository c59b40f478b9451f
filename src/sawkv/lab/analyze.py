"""`sawkv analyze`: statistics of a model's K and V, the error of attention for each method, and whether 4 bits are
enough.

Each layer is measured on the states of the unquantized model, so errors do not accumulate over layers. `sawkv eval`
measures them as they do. Attention errors are taken at a sample of queries spread over each window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from msgspec.structs import replace
from tqdm import tqdm

from sawkv.errors import SawkvError
from sawkv.files import check_writable, writing
from sawkv.lab.analysis import (
    PREPARED,
    WIDER,
    Analysis,
    ChannelStats,
    Grid,
    LayerStats,
    MethodError,
    Recommendation,
    label,
)
from sawkv.lab.budget import check_window
from sawkv.lab.description import describe, percent
from sawkv.lab.evaluate import shipped_samples
from sawkv.lab.methods import Method, check_fits, find_method
from sawkv.lab.samples import LayerSample
from sawkv.lab.stress import apply_stress
from sawkv.prepare.model import EvalModel, default_dtype, find_device
from sawkv.prepare.states import LayerStates, Reader
from sawkv.prepare.text import load_text, with_bos

QUERIES = 256
"""Queries per window and head at which attention is compared."""
MAX_OUTPUT_ERROR = 0.1
"""If the output error of a layer, as a share of its variance, is larger, 8 bits are recommended."""


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
    command: str = "",
) -> int:
    """Measure, print, and write the record as JSON to `out`, if given.

    Args:
        model_folder: a checkpoint directory.
        text_file: UTF-8 text; None is the model's own held-out text.
        out: file for the record, which `sawkv report` renders.
        methods: names that `find_method` takes; None is `default_methods`.
        window: tokens per window. Each window is read from an empty cache.
        windows: number of windows.
        stress: see `stress.apply_stress`; 1 is none.
        device: `cpu` or `cuda`; None takes a GPU if there is one.
        command: the command line, for the record.

    Returns:
        0.

    Raises:
        SawkvError: bad input. The message names it.
    """
    if out is not None:
        check_writable(out)
    check_window(window)
    chosen = None if methods is None else [find_method(name) for name in methods]
    _refuse_kept(chosen or ())
    text = load_text(model_folder, text_file)
    where = find_device(device)
    model = EvalModel.load(model_folder, where, default_dtype(where))
    for method in chosen or ():
        check_fits(method, model.shape.head_dim)
    model.check_positions("--window", window)
    text = with_bos(text, model)
    scored = text.windows(window, windows)
    if stress > 1:
        apply_stress(model.layers, model.shape.head_dim, stress)

    def keep(found: Analysis) -> None:
        if out is not None:
            with writing(out) as part:
                part.write_text(replace(found, command=command).to_json(indent=None), encoding="utf-8")

    analysis = analyze(
        model,
        scored,
        shipped_samples(model, text),
        chosen,
        name=model_folder.resolve().name,
        text=text.name,
        stress=stress,
        keep=keep,
    )
    print(describe(analysis))
    if out is not None:
        print(f"\nwrote {out}; `sawkv report {out}` makes a page of it")
    return 0


@torch.inference_mode()
def analyze(
    model: EvalModel,
    windows: torch.Tensor,
    samples: Sequence[LayerSample],
    methods: Sequence[Method] | None = None,
    *,
    name: str,
    text: str,
    stress: int = 1,
    keep: Callable[[Analysis], object] = lambda analysis: None,
) -> Analysis:
    """Analyze all layers.

    Args:
        model: unquantized.
        windows: [num_windows, window] token ids to measure on.
        samples: of other text, for methods that fit parameters.
        methods: None is `default_methods`.
        name, text, stress: of the model and the text, for the record.
        keep: called after each window with the record of the windows so far.

    Raises:
        SawkvError: a method keeps tokens in 16 bits, which errors of stored rows would not show.
    """
    started = time.monotonic()
    methods = default_methods() if methods is None else methods
    _refuse_kept(methods)
    num_layers = model.shape.num_layers
    readers = [
        [method.fit(sample) for sample in samples]
        for method in tqdm(methods, desc="fitting", unit="method", leave=False, disable=None)
    ]
    stats = [_StatsSum() for _ in range(num_layers)]
    errors = [[_ErrorSum() for _ in range(num_layers)] for _ in methods]
    config = model.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}

    def record(measured: int) -> Analysis:
        found = tuple(
            MethodError(
                method.name,
                round(method.bits(model.shape.head_dim), 3),
                method.served,
                *(tuple(zip(*(error.shares() for error in errors[i]), strict=True))),
            )
            for i, method in enumerate(methods)
        )
        return Analysis(
            model=name,
            shape=model.shape,
            device=model.device.type,
            dtype=str(model.model.dtype).removeprefix("torch."),
            text=text,
            window=windows.shape[1],
            windows=measured,
            stress=stress,
            rope_theta=float(rope.get("rope_theta") or 0),
            layers=tuple(stat.result() for stat in stats),
            methods=found,
            recommendation=recommend(found),
            seconds=round(time.monotonic() - started, 1),
        )

    progress = tqdm(total=len(windows) * num_layers, desc="measuring", unit="layer", leave=False, disable=None)
    for measured, ids in enumerate(torch.split(windows, 1), 1):
        for layer, states in enumerate(model.states(ids)):
            attention = _Attention.of(states, model.layers[layer])
            stats[layer].add(states, attention)
            for i in range(len(methods)):
                errors[i][layer].add(states, attention, readers[i][layer])
            progress.update()
        analysis = record(measured)
        keep(analysis)
    progress.close()
    return analysis


def _refuse_kept(methods: Sequence[Method]) -> None:
    if kept := [method.name for method in methods if method.kept]:
        raise SawkvError(
            f"--formats: expected methods that quantize every token, got {', '.join(kept)}; sawkv eval measures these"
        )


def default_methods() -> list[Method]:
    """The served format prepared and unprepared, the one with 8 bits, and the formats of vLLM."""
    return [find_method(name) for name in (PREPARED, "int4", "int4_plain", WIDER, "fp8", "vllm_int4_per_token_head")]


def recommend(errors: Sequence[MethodError]) -> Recommendation:
    """Recommend 4 bits, or 8 bits if 4 change the attention of a layer much."""
    known = {error.method: error for error in errors}
    if PREPARED not in known:
        return Recommendation("", (f"`{PREPARED}`, which is served, was not among the methods measured.",))
    found = known[PREPARED]
    layer, worst = found.worst
    lost = f"{found.mean_output:.2%} of the variance of the attention output; {worst:.2%} in layer {layer}, the worst"
    reason = [f"Prepared, {found.bits:g} bits lose {lost}."]
    others = [known[name] for name in ("int4", "vllm_int4_per_token_head", "fp8") if name in known]
    if others:
        reason.append(
            "Others: " + ", ".join(f"{label(error.method)} {percent(error.mean_output)}" for error in others) + "."
        )
    if worst > MAX_OUTPUT_ERROR:
        reason.append(f"A layer that loses more than {MAX_OUTPUT_ERROR:.0%} asks for 8 bits.")
        reason += [f"They lose {known[WIDER].mean_output:.2%}." for _ in range(WIDER in known)]
    reason.append("How far the model's predictions move is for `sawkv eval` to measure.")
    return Recommendation(WIDER if worst > MAX_OUTPUT_ERROR else PREPARED, tuple(reason))


class _Attention:
    """The unquantized attention of one window and layer, at a sample of queries."""

    def __init__(
        self,
        states: LayerStates,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
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
        self.softcap = softcap
        # [num_kv_heads, group * queries, 1]: the score of a key that is always seen and has no value
        self.sinks = (
            None if sinks is None else sinks.float().view(num_kv_heads, -1, 1).repeat_interleave(len(self.position), 1)
        )
        self.scores = self._scores(states.k)
        self.weights = self._weights(self.scores)
        self.output = self.weights @ states.v.transpose(0, 1)
        by_query = self._by_query(self.output)
        self.variance = (by_query - by_query.mean(2, keepdim=True)).square().sum((1, 2, 3))

    @classmethod
    def of(cls, states: LayerStates, layer: torch.nn.Module) -> _Attention:
        """Build it as the Transformers attention module computes it."""
        names = ("sliding_window", "attn_logit_softcapping", "sinks")
        return cls(states, *(getattr(layer, name, None) for name in names))

    def _scores(self, k: torch.Tensor) -> torch.Tensor:
        """[num_kv_heads, group * queries, keys], -inf where a key is hidden."""
        scores = self._by_query(self.q @ k.permute(1, 2, 0))
        if self.softcap:
            scores = self.softcap * (scores / self.softcap).tanh()
        return scores.masked_fill(self.hidden, -math.inf).flatten(1, 2)

    def _weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Weights of the keys. With a sink they sum to less than 1."""
        if self.sinks is None:
            return scores.softmax(-1)
        return torch.cat([scores, self.sinks], -1).softmax(-1)[..., :-1]

    def sink(self) -> torch.Tensor:
        """Weight of the first key, mean over queries: [num_q_heads]."""
        return self._by_query(self.weights)[..., 0].mean(-1).flatten()

    def _by_query(self, x: torch.Tensor) -> torch.Tensor:
        """[num_kv_heads, group * queries, size] to [num_kv_heads, group, queries, size]."""
        return x.view(x.shape[0], -1, len(self.position), x.shape[-1])

    def errors(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Errors of attention that reads the given K and V, each [num_kv_heads].

        Returns:
            Variance of the score errors under the attention weights, summed over queries; squared error of the output;
                and squared distance of the output from its mean over queries.
        """
        scores = self._scores(k)
        delta = (scores - self.scores).nan_to_num(nan=0.0)  # hidden keys: -inf less -inf
        offset = (self.weights * delta).sum(-1, keepdim=True)
        spread = (self.weights * (delta - offset).square()).sum((1, 2))
        lost = (self._weights(scores) @ v.transpose(0, 1) - self.output).square().sum((1, 2))
        return spread, lost, self.variance


class _StatsSum:
    """Statistics of one layer, gathered over windows."""

    def __init__(self) -> None:
        self._moments: list[torch.Tensor] = []
        self._sinks: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []

    def add(self, states: LayerStates, attention: _Attention) -> None:
        self._moments.append(
            torch.stack([torch.stack([x.mean(0), x.square().mean(0)]) for x in (states.k, states.v)]).double().cpu()
        )
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
