"""Whether two engines gave the same greedy outputs, where rounding may decide between tokens that are almost equally likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Output = dict[str, Any]
"""Of one request: `prompt`, `tokens`, `top` (for each token, log-probabilities of the best few, by token) and `cached` prompt tokens."""


@dataclass(frozen=True)
class Agreement:
    """Outputs compared up to the first token that differs.

    Attributes:
        equal, ties: requests that agree to the last token, and up to a near-tie.
        wrong: descriptions of the others.
        tokens: how many agree.
        drift: mean |difference| of their log-probabilities, in nats.
    """

    equal: int
    ties: int
    wrong: list[str]
    tokens: int
    drift: float

    @classmethod
    def of(cls, got: Sequence[Output], want: Sequence[Output], tie: float) -> Agreement:
        """Compare with `want`, in whose log-probabilities a near-tie is at most `tie` nats."""
        equal = ties = 0
        wrong, drift = [], []
        for i, (a, b) in enumerate(zip(got, want, strict=False)):
            first = first_difference(a["tokens"], b["tokens"])
            agreed = len(b["tokens"]) if first is None else first
            drift += [abs(a["top"][t][str(b["tokens"][t])] - b["top"][t][str(b["tokens"][t])]) for t in range(agreed)]
            if first is None:
                equal += 1
            elif len(a["tokens"]) == len(b["tokens"]) and is_tie(b, first, a["tokens"][first], tie):
                ties += 1
            else:
                wrong.append(f"request {i} of {len(b['prompt'])} tokens, at token {first}")
        return cls(equal, ties, wrong, len(drift), float(np.mean(drift)) if drift else float("inf"))

    def __str__(self) -> str:
        named = f" ({'; '.join(self.wrong[:3])})" if self.wrong else ""
        counts = f"{self.equal} equal, {self.ties} up to a near-tie, {len(self.wrong)} wrong{named}"
        return f"{counts}; log-probabilities within {self.drift:.4f} on average"


def first_difference(got: Sequence[int], want: Sequence[int]) -> int | None:
    """Position of the first token that differs; None if there is none."""
    if list(got) == list(want):
        return None
    return next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))


def is_tie(want: Output, position: int, token: int, tie: float) -> bool:
    """Whether `want` finds `token` almost as likely as its own at `position`."""
    top: dict[str, float] = want["top"][position] if position < len(want["top"]) else {}
    return str(token) in top and max(top.values()) - top[str(token)] <= tie


def as_output(request_output: Any) -> Output:
    """vLLM's RequestOutput of a greedy request with `logprobs`."""
    completion = request_output.outputs[0]
    return {
        "prompt": list(request_output.prompt_token_ids),
        "tokens": list(completion.token_ids),
        "top": [{str(token): entry.logprob for token, entry in step.items()} for step in completion.logprobs or []],
        "cached": request_output.num_cached_tokens or 0,
    }
