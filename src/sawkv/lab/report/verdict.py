"""A traffic light for a cache, by comparison with the noise of 16-bit arithmetic and with fp8."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from sawkv.lab.analysis import label
from sawkv.lab.records import Divergence, Evaluation, MethodResult
from sawkv.page import digits

GOOD, FAIR, POOR = "good", "fair", "poor"
WORDS: Final = {GOOD: "green", FAIR: "amber", POOR: "red"}
ANSWERS: Final = {
    GOOD: "Yes: as good as fp8 on this text.",
    FAIR: "For most uses: it costs more than fp8, within the bounds below.",
    POOR: "Not on this text: take 8 bits, or prepare the model on text of its own.",
}
FEW_TIMES: Final = 5.0
"""Multiple of fp8's KL up to which the light is amber."""
NOISE_TIMES: Final = (10.0, 100.0)
"""Without fp8: multiples of the noise of 16-bit arithmetic up to which KL is green, and amber."""
PERPLEXITY: Final = (0.01, 0.05)
"""Rise of perplexity up to which the light is green, and amber."""
RECALL: Final = 0.05
"""Share of prompts that may be lost for amber."""


@dataclass(frozen=True)
class Lamp:
    """One light: what was measured, and the rule."""

    light: str
    text: str
    rule: str

    @property
    def word(self) -> str:
        return WORDS[self.light]


@dataclass(frozen=True)
class Verdict:
    """The worst light in words, and all lights."""

    light: str
    answer: str
    lamps: tuple[Lamp, ...]


def verdict(evaluation: Evaluation, subject: MethodResult, floor: MethodResult | None) -> Verdict:
    """The lights of `subject`."""
    fp8 = next((result for result in evaluation.results if result.method == "fp8" and result is not subject), None)
    lamps = [_perplexity(evaluation.reference.divergence, subject)]
    if fp8 is not None:
        lamps.append(_beside_fp8(subject, fp8.divergence, floor))
    elif floor is not None:
        lamps.append(_beside_noise(subject, floor.divergence))
    lamps += _recall(evaluation, subject)
    light = max((lamp.light for lamp in lamps), key=list(WORDS).index)
    return Verdict(light, ANSWERS[light], tuple(lamps))


def _light(value: float, green: float, amber: float) -> str:
    return GOOD if value <= green else FAIR if value <= amber else POOR  # NaN is red


def _perplexity(reference: Divergence, subject: MethodResult) -> Lamp:
    rise = subject.divergence.ppl / reference.ppl - 1
    green, amber = PERPLEXITY
    text = f"Perplexity {rise:+.2%} ({reference.ppl:.3f} to {subject.divergence.ppl:.3f})."
    return Lamp(_light(rise, green, amber), text, f"Green up to {green:+.0%}, amber up to {amber:+.0%}.")


def _beside_fp8(subject: MethodResult, fp8: Divergence, floor: MethodResult | None) -> Lamp:
    found = subject.divergence
    ratio = found.mean_kl / fp8.mean_kl if fp8.mean_kl else math.inf
    as_good = found.mean_kl <= fp8.mean_kl + 2 * math.hypot(found.kl_se, fp8.kl_se)
    noise = (
        f", and {digits(found.mean_kl / floor.divergence.mean_kl, 2)}x 16-bit noise"
        if floor and floor.divergence.mean_kl
        else ""
    )
    text = (
        f"KL is {digits(ratio, 2)}x that of fp8{noise}. {label(subject.method)} takes {subject.bits / 8:.2f}x the"
        " memory of fp8."
    )
    return Lamp(
        GOOD if as_good else _light(ratio, 1, FEW_TIMES),
        text,
        f"Green where it is not above fp8, amber up to {FEW_TIMES:g}x.",
    )


def _beside_noise(subject: MethodResult, floor: Divergence) -> Lamp:
    ratio = subject.divergence.mean_kl / floor.mean_kl if floor.mean_kl else math.inf
    green, amber = NOISE_TIMES
    rule = f"fp8 was not measured. Green up to {green:g}x, amber up to {amber:g}x."
    return Lamp(_light(ratio, green, amber), f"KL is {digits(ratio, 2)}x that of 16-bit noise.", rule)


def _recall(evaluation: Evaluation, subject: MethodResult) -> list[Lamp]:
    asked = sum(cell.asked for cell in subject.recall)
    before = sum(cell.correct for cell in evaluation.reference.recall)
    if not asked or sum(cell.asked for cell in evaluation.reference.recall) != asked:
        return []
    after = sum(cell.correct for cell in subject.recall)
    lost = (before - after) / asked
    share = before / asked
    error = math.sqrt(max(share * (1 - share), 1 / asked) / asked)
    rule = (
        f"Green where no more are lost than two standard errors of {asked} prompts, amber up to {RECALL:.0%} of them."
    )
    light = GOOD if lost <= min(2 * error, RECALL) else _light(lost, 0, RECALL)
    return [Lamp(light, f"{after} of {asked} hidden facts recalled; unquantized {before}.", rule)]
