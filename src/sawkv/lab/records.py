"""The record of `sawkv eval`.

Divergences are in nats. p is the next-token distribution of the reference, the model with an unquantized cache. q is
that of the same model reading the cache under test, after the same tokens.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from sawkv.lab.budget import Budget
from sawkv.records import AttentionShape, Record

FLOOR = "bf16_floor"
"""The name of the noise of 16-bit arithmetic, among methods."""


class Divergence(Record, frozen=True):
    """How far q lies from p over the text.

    Attributes:
        tokens: predictions compared.
        mean_kl: mean of KL(p || q).
        kl_se: standard error of mean_kl, from the means of windows, which are nearly independent.
        kl_p999, kl_max: 99.9th percentile and maximum of KL over tokens.
        same_top1: share of tokens at which p and q have the same most likely token.
        ppl: perplexity per token of q on the text.
    """

    tokens: int
    mean_kl: float
    kl_se: float
    kl_p999: float
    kl_max: float
    same_top1: float
    ppl: float


class PositionKL(Record, frozen=True):
    """Mean KL of predictions made from positions `start` to `end` (exclusive) of their windows."""

    start: int
    end: int
    mean_kl: float
    kl_se: float


class LayerKL(Record, frozen=True):
    """Mean KL on a part of the text if only this layer's cache is under test, and all others are unquantized."""

    layer: int
    mean_kl: float
    kl_se: float


class Recall(Record, frozen=True):
    """How often a fact at `depth` (0 to 1) of a prompt of `length` tokens is recalled, every token of it.

    `task` is "passkey" (a number in real text) or "needle" (one of four entries of a table in real text).
    """

    task: str
    length: int
    depth: float
    correct: int
    asked: int


class FreeRun(Record, frozen=True):
    """For each prompt, how many tokens of the reference's greedy continuation the cache under test follows.

    Attributes:
        limit: length of the continuations.
        tokens: one number per prompt.
    """

    limit: int
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        return sum(self.tokens) / max(1, len(self.tokens))


class Surprise(Record, frozen=True):
    """A token at which p and q differ much.

    Attributes:
        window, position: place of the token from which p and q predict.
        kl: in nats.
        before: the text that ends there.
        token: the next token of the text.
        expected, expected_p: the most likely token of p, and its probability.
        chosen, chosen_p: the most likely token of q, and its probability.
    """

    window: int
    position: int
    kl: float
    before: str
    token: str
    expected: str
    expected_p: float
    chosen: str
    chosen_p: float


class Fork(Record, frozen=True):
    """A greedy continuation that differs from the reference's.

    Attributes:
        prompt: number of the prompt, in the order of `FreeRun.tokens`.
        tokens: number of tokens that both share.
        common: the end of their common text.
        reference, other: their texts after that.
    """

    prompt: int
    tokens: int
    common: str
    reference: str
    other: str


class MethodResult(Record, frozen=True):
    """Measurements of one method on one model.

    Attributes:
        method: its name; "reference" is the unquantized cache; or FLOOR.
        bits: mean bits per element of K and V, with everything that is stored per row.
        served: the engine that serves it fast: "sawkv", "vllm", or "".
        calibrated: whether parameters were fitted on calibration text.
        divergence: from the reference.
        by_position, by_layer: KL by position and by layer; empty if not measured.
        recall: one entry per task, length and depth.
        free_run: None if not measured.
        excerpt_kl: KL of the prediction of each token of `Evaluation.excerpt`.
        worst: tokens with the largest KL.
        forks: the first free runs that differ from the reference.
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
    excerpt_kl: tuple[float, ...] = ()
    worst: tuple[Surprise, ...] = ()
    forks: tuple[Fork, ...] = ()

    @property
    def passkey(self) -> float | None:
        """Share of pass-keys recalled over all lengths and depths; None if not measured."""
        return self.recalled("passkey")

    def recalled(self, task: str) -> float | None:
        """Share of a task's prompts answered correctly over all lengths and depths; None if not measured."""
        cells = [cell for cell in self.recall if cell.task == task]
        return sum(cell.correct for cell in cells) / sum(cell.asked for cell in cells) if cells else None


class Evaluation(Record, frozen=True):
    """One run of `sawkv eval`.

    Attributes:
        model: name of the directory.
        shape: of its attention.
        device, dtype: device and dtype of the model.
        text: name of the file, or "held-out" for the model's own text.
        window: tokens per window. Each window is read from an empty cache.
        stress: factor by which pairs of key channels were scaled up, 1 for none (see `stress`).
        reference: the unquantized cache: its perplexity and recall.
        results: the noise floor, then each method, in the order asked for.
        seconds: wall time.
        versions: of sawkv and of what it ran on.
        budget: how much was measured; None in older records.
        excerpt: the last tokens of the first window, as text; empty in older records.
        command: the command line; empty in older records.
    """

    written_by: ClassVar[str] = "sawkv eval"

    model: str
    shape: AttentionShape
    device: str
    dtype: str
    text: str
    window: int
    stress: int
    reference: MethodResult
    results: tuple[MethodResult, ...]
    seconds: float
    versions: dict[str, str]
    budget: Budget | None = msgspec.field(default=None, name="plan")
    excerpt: tuple[str, ...] = ()
    command: str = ""
