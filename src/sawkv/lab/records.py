"""What an evaluation found: frozen records that pass through JSON unchanged.

`Evaluation.to_json` and `Evaluation.from_json` are inverse. Divergences are in nats; p is the next-token distribution of the reference, the
same model with its cache unquantized, and q that of the model reading the cache under test, after the same tokens.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from sawkv.errors import SawkvError
from sawkv.lab.budget import Plan

R = TypeVar("R")


@dataclass(frozen=True)
class Divergence:
    """How far q lies from p over all tokens of the text.

    Attributes:
        tokens: predictions compared.
        mean_kl: mean of KL(p || q).
        kl_se: its standard error, from the means of the text's windows, which are nearly independent; tokens of a window are not.
        kl_p999, kl_max: 99.9th percentile and maximum over tokens.
        same_top1: share of tokens at which p and q have the same most likely token.
        ppl: perplexity a token of q on the text.
    """

    tokens: int
    mean_kl: float
    kl_se: float
    kl_p999: float
    kl_max: float
    same_top1: float
    ppl: float


@dataclass(frozen=True)
class PositionKL:
    """Mean KL over the predictions made from positions `start` to `end` (exclusive) of their windows."""

    start: int
    end: int
    mean_kl: float
    kl_se: float


@dataclass(frozen=True)
class LayerKL:
    """Mean KL when only this layer's cache is under test and all others are unquantized; on a part of the text."""

    layer: int
    mean_kl: float
    kl_se: float


@dataclass(frozen=True)
class Recall:
    """How often a fact stated at `depth` (0 to 1) of a prompt of `length` tokens is recalled, every token of it right.

    `task` is "passkey" (a number in real text) or "needle" (one of four entries of a table in real text).
    """

    task: str
    length: int
    depth: float
    correct: int
    asked: int


@dataclass(frozen=True)
class FreeRun:
    """Greedy continuations of the reference that the cache under test follows: the tokens until it first chooses another.

    `tokens` has one number a prompt; `limit` is the length of the continuations.
    """

    limit: int
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        return sum(self.tokens) / max(1, len(self.tokens))


@dataclass(frozen=True)
class MethodResult:
    """All that was measured of one method on one model.

    Attributes:
        method: its name; "reference" is the unquantized cache, "bf16_floor" the noise of 16-bit arithmetic.
        bits: mean bits of an element of K and V, with all that is stored for its row.
        served: who serves it fast: "sawkv", "vllm", or "".
        calibrated: whether it learned static parameters from calibration text.
        divergence: from the reference.
        by_position, by_layer: the same, split; empty if not measured.
        recall: one entry for each task, length and depth.
        free_run: None if not measured.
    """

    method: str
    bits: float
    served: str
    calibrated: bool
    divergence: Divergence
    by_position: tuple[PositionKL, ...] = ()
    by_layer: tuple[LayerKL, ...] = ()
    recall: tuple[Recall, ...] = ()
    free_run: FreeRun | None = None

    @property
    def passkey(self) -> float | None:
        """Share of pass-keys recalled over all lengths and depths, or None if not asked."""
        return self.recalled("passkey")

    def recalled(self, task: str) -> float | None:
        """Share of a task's prompts answered right over all lengths and depths, or None if not asked."""
        cells = [cell for cell in self.recall if cell.task == task]
        return sum(cell.correct for cell in cells) / sum(cell.asked for cell in cells) if cells else None


@dataclass(frozen=True)
class ModelShape:
    """The shape of the model's attention."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Evaluation:
    """One run of `sawkv eval`.

    Attributes:
        model: the directory's name.
        shape: of its attention.
        device, dtype: where and in which dtype the model ran.
        text: the file's name, or "held-out" for the model's own.
        window: tokens of one window; each is read from an empty cache.
        stress: factor by which pairs of key channels were scaled up, 1 for none (see `stress`).
        reference: the unquantized cache: its perplexity and recall.
        results: the noise floor first, then one for each method, in the order asked for.
        seconds: wall time.
        versions: of sawkv and what it ran on.
        plan: how much was to be measured; None in records of old.
    """

    model: str
    shape: ModelShape
    device: str
    dtype: str
    text: str
    window: int
    stress: int
    reference: MethodResult
    results: tuple[MethodResult, ...]
    seconds: float
    versions: dict[str, str]
    plan: Plan | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The inverse of `to_json`.

        Raises:
            SawkvError: the text is not such a record.
        """
        return parse_record(cls, text, "sawkv eval")


def parse_record(kind: type[R], text: str, command: str) -> R:
    """The JSON text of a record that `command` wrote.

    Raises:
        SawkvError: the text is not such a record.
    """
    try:
        record: R = from_plain(kind, json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SawkvError(f"expected a record of `{command}`, got one that does not parse: {error}") from error
    return record


def from_plain(kind: Any, value: Any) -> Any:
    """`value`, as JSON gives it, as the type `kind` says: dataclasses, tuples of them, optional ones, and plain values.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it does not fit.
    """
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)} in {getattr(kind, '__name__', kind)}")
        return kind(**{name: from_plain(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(from_plain(arguments[0], item) for item in value)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else from_plain(arguments[0], value)
    return value
