"""Compares two engines: their greedy outputs, where rounding may decide between tokens of almost equal likelihood; and
the log-probability of each token of a given text, which rounding of codes also moves a little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

Output = dict[str, Any]
"""Of one request: `prompt`, `tokens`, `top` (for each token, log-probabilities of the best few, by token) and `cached`
prompt tokens.
"""


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


class Follower:
    """One request that follows a given text: where its own greedy token is another, it starts again from the text.

    So each token of the text gets its log-probability in the text's own context, mostly from decoding steps, whatever
    the engine prefers.

    Attributes:
        logprobs: of the text's tokens so far, in nats; where a token is not among the engine's best few, that of the
            last of these.
        departures: how often its own token was another.
    """

    def __init__(self, prompt: Sequence[int], text: Sequence[int]) -> None:
        self._prompt, self._text = list(prompt), list(text)
        self.logprobs: list[float] = []
        self.departures = 0

    @property
    def prompt(self) -> list[int]:
        """What to send next."""
        return self._prompt + self._text[: len(self.logprobs)]

    @property
    def left(self) -> int:
        """Tokens of the text that are still to come."""
        return len(self._text) - len(self.logprobs)

    def take(self, output: Output) -> None:
        """The answer to `prompt`, of at most `left` tokens, with log-probabilities of the best few."""
        for token, top in zip(output["tokens"], output["top"], strict=True):
            want = self._text[len(self.logprobs)]
            self.logprobs.append(top.get(str(want), min(top.values())))
            if token != want:
                self.departures += 1
                return


def sampling(max_tokens: int) -> SamplingParams:
    """Greedy, with the log-probabilities that `as_output` and `Follower` read."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=20,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def generate(llm: LLM, prompts: Sequence[list[int]], lengths: Sequence[int], lora_request: Any = None) -> list[Output]:
    """Greedy outputs of `lengths` tokens."""
    inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, [sampling(length) for length in lengths], use_tqdm=False, lora_request=lora_request)
    return [as_output(output) for output in outputs]


def follow(
    texts: Sequence[Output], generate: Callable[[list[list[int]], list[int]], Sequence[Output]]
) -> list[Follower]:
    """Let an engine follow the tokens of `texts`; `generate` takes prompts and how many tokens to add to each."""
    followers = [Follower(text["prompt"], text["tokens"]) for text in texts]
    while under_way := [follower for follower in followers if follower.left]:
        outputs = generate([f.prompt for f in under_way], [f.left for f in under_way])
        for follower, output in zip(under_way, outputs, strict=True):
            follower.take(output)
    return followers


@dataclass(frozen=True)
class Nearness:
    """Log-probabilities of the same texts by two engines.

    Attributes:
        mean: of |difference|, nats a token.
        worst: the largest of one request, its sum over `LEAST_TOKENS` tokens at least, so that one token does not
            condemn a short one.
        tokens: how many were compared.
    """

    mean: float
    worst: float
    tokens: int

    LEAST_TOKENS: ClassVar[int] = 16

    @classmethod
    def of(cls, got: Sequence[Sequence[float]], want: Sequence[Sequence[float]]) -> Nearness:
        apart = [np.abs(np.subtract(a, b)) for a, b in zip(got, want, strict=True)]
        worst = max(float(a.sum()) / max(len(a), cls.LEAST_TOKENS) for a in apart)
        return cls(float(np.concatenate(apart).mean()), worst, sum(map(len, apart)))


def logprobs_of(output: Output) -> list[float]:
    """Log-probabilities of an output's own tokens."""
    return [top[str(token)] for token, top in zip(output["tokens"], output["top"], strict=True)]


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
