"""What an evaluation found.

Divergences are in nats; p is the next-token distribution of the reference, the
same model with its cache unquantized, and q that of the model reading the cache under test, after the same tokens.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from sawkv.lab.budget import Budget
from sawkv.records import AttentionShape, Record


class Divergence(Record, frozen=True):
    """How far q lies from p over all tokens of the text.

    Attributes:
        tokens: predictions compared.
        mean_kl: mean of KL(p || q).
        kl_se: its standard error, from the means of the text's windows, which are nearly independent; tokens of a
            window are not.
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


class PositionKL(Record, frozen=True):
    """Mean KL over the predictions made from positions `start` to `end` (exclusive) of their windows."""

    start: int
    end: int
    mean_kl: float
    kl_se: float


class LayerKL(Record, frozen=True):
    """Mean KL when only this layer's cache is under test and all others are unquantized; on a part of the text."""

    layer: int
    mean_kl: float
    kl_se: float


class Recall(Record, frozen=True):
    """How often a fact stated at `depth` (0 to 1) of a prompt of `length` tokens is recalled, every token of it right.

    `task` is "passkey" (a number in real text) or "needle" (one of four entries of a table in real text).
    """

    task: str
    length: int
    depth: float
    correct: int
    asked: int


class FreeRun(Record, frozen=True):
    """Greedy continuations of the reference that the cache under test follows: the tokens until it first chooses
    another.

    `tokens` has one number a prompt; `limit` is the length of the continuations.
    """

    limit: int
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        return sum(self.tokens) / max(1, len(self.tokens))


class Surprise(Record, frozen=True):
    """A token at which p and q lie far apart.

    Attributes:
        window, position: of the token from which they predict.
        kl: in nats.
        before: the text that ends there.
        token: what follows in the text.
        expected, expected_p: the most likely token of p, and its probability.
        chosen, chosen_p: the same of q.
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
    """A greedy continuation that leaves the reference's.

    Attributes:
        prompt: number of the prompt, in the order of `FreeRun.tokens`.
        tokens: that both have before they part.
        common: the end of their common text.
        reference, other: how each goes on.
    """

    prompt: int
    tokens: int
    common: str
    reference: str
    other: str


class MethodResult(Record, frozen=True):
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
        excerpt_kl: KL at each token of `Evaluation.excerpt`, of the prediction of that token.
        worst: the tokens of the largest KL.
        forks: the first of the free runs that part from the reference.
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
        """Share of pass-keys recalled over all lengths and depths, or None if not asked."""
        return self.recalled("passkey")

    def recalled(self, task: str) -> float | None:
        """Share of a task's prompts answered right over all lengths and depths, or None if not asked."""
        cells = [cell for cell in self.recall if cell.task == task]
        return sum(cell.correct for cell in cells) / sum(cell.asked for cell in cells) if cells else None


class Evaluation(Record, frozen=True):
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
        budget: how much was to be measured; None in records of old.
        excerpt: the last tokens of the first window, as text; empty in records of old.
        command: what was typed; empty in records of old.
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
