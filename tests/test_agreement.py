"""The judge of greedy outputs: equal, decided by rounding, or wrong."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.agreement import Agreement, Follower, Nearness, first_difference


def output(tokens: list[int], *top: dict[str, float]) -> dict[str, Any]:
    return {"prompt": [1, 2], "tokens": tokens, "top": list(top)}


WANT = output([5, 6], {"5": -0.1, "7": -3.0}, {"6": -0.7, "8": -0.75})


@pytest.mark.parametrize(
    ("got", "equal", "ties", "wrong", "drift"),
    [
        (output([5, 6], {"5": -0.2}, {"6": -0.7}), 1, 0, 0, 0.05),
        (output([5, 8], {"5": -0.1}, {"8": -0.7, "6": -0.75}), 0, 1, 0, 0.0),
        (output([7, 6], {"7": -0.1}, {"6": -0.7}), 0, 0, 1, float("inf")),
        (output([5, 9], {"5": -0.1}, {"9": -0.1}), 0, 0, 1, 0.0),  # not among the reference's best
        (output([5], {"5": -0.1}), 0, 0, 1, 0.0),  # ended early
    ],
)
def test_agreement(got: dict[str, Any], equal: int, ties: int, wrong: int, drift: float) -> None:
    agreement = Agreement.of([got], [WANT], tie=0.1)
    assert (agreement.equal, agreement.ties, len(agreement.wrong)) == (equal, ties, wrong)
    assert agreement.drift == pytest.approx(drift)


def test_a_follower_comes_back_to_its_text() -> None:
    follower = Follower([1, 2], [5, 6, 7])
    follower.take(output([5, 9, 9], {"5": -0.1, "4": -2.0}, {"9": -0.2, "6": -1.0}, {"9": 0.0}))
    assert (follower.prompt, follower.left, follower.departures) == ([1, 2, 5, 6], 1, 1)
    # The text's token is not among the best: as likely as the last of them.
    follower.take(output([8], {"8": -0.3, "3": -4.0}))
    assert (follower.logprobs, follower.left, follower.departures) == ([-0.1, -1.0, -4.0], 0, 2)


def test_nearness() -> None:
    near = Nearness.of([[-1.0] * 20, [-3.0]], [[-1.5] * 20, [-1.0]])
    assert near.mean == pytest.approx(12 / 21)
    assert near.worst == pytest.approx(0.5)  # one token, 2 nats off, is not 16 of them
    assert near.tokens == 21


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1], [1, 3]) == 1
