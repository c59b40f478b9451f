"""Fitting error feedback: against the rule in its other form, and by what the errors of fresh rows then cost."""

from __future__ import annotations

import itertools

import pytest
import torch

from sawkv import LayoutError
from sawkv.format.codecs import IntegerCodec
from sawkv.format.constants import ERROR_STEPS, MAX_WEIGHT
from sawkv.format.feedback import DAMPING, Feedback, channel_blocks, fit_feedback, takes_from


def make_hessian(num_kv_heads: int = 3, head_dim: int = 128) -> torch.Tensor:
    """Of directions that matter much and little, across channels."""
    mix = torch.randn(num_kv_heads, head_dim, head_dim) / head_dim**0.5
    return mix @ torch.diag_embed(torch.rand(num_kv_heads, head_dim) ** 4) @ mix.mT


def cost(rows: torch.Tensor, hessian: torch.Tensor, feedback: Feedback | None) -> torch.Tensor:
    """[num_kv_heads] fp64: mean e^T hessian e of the codec's errors."""
    codec = IntegerCodec(4)
    e = (codec.decode(*codec.encode(rows, feedback)) - rows).double()
    return torch.einsum("thd,hdc,thc->h", e, hessian.double(), e) / len(rows)


@pytest.mark.parametrize("head_dim", [16, 64, 128, 192])
def test_weights_are_those_of_gptq_for_blocks(head_dim: int) -> None:
    """F = t_BB^-1 t_BR with t the inverse of what is left, in the order of coding; the fit solves the equivalent normal
    equations.
    """
    hessian = make_hessian(2, head_dim)
    found = fit_feedback(hessian)
    order, sizes = torch.argsort(channel_blocks(head_dim), stable=True), channel_blocks(head_dim).bincount().tolist()
    damped = hessian.double()
    damped = damped + DAMPING * torch.diag_embed(
        damped.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(-1, head_dim)
    )
    damped = damped[:, order][:, :, order]
    wanted = torch.zeros_like(damped)
    for start, size in zip([0, *itertools.accumulate(sizes)], sizes[:-1], strict=False):
        t = torch.linalg.inv(damped[:, start:, start:])
        wanted[:, start + size :, start : start + size] = -torch.linalg.solve(t[:, :size, :size], t[:, :size, size:]).mT
    got = (found.weights * (found.step.double() * ERROR_STEPS)[:, None, None])[:, order][:, :, order]
    top = wanted.abs().amax((-2, -1), keepdim=True)
    assert bool(((got - wanted).abs() <= 0.501 / MAX_WEIGHT * top).all()), "rounded to the nearest of 127 steps"
    assert not found.weights[:, ~takes_from(head_dim)].any()
    assert int(found.weights.abs().amax()) == MAX_WEIGHT


def test_it_lowers_the_cost_of_fresh_rows() -> None:
    hessian, rows = make_hessian(), torch.randn(500, 3, 128) * (0.5 + torch.rand(128))
    feedback = fit_feedback(hessian)
    plain, fed = cost(rows, hessian, None), cost(rows, hessian, feedback)
    assert bool((fed < 0.75 * plain).all())
    # Controls: of the wrong sign, and of another head.
    assert bool((cost(rows, hessian, Feedback(-feedback.weights, feedback.step)) > plain).all())
    assert bool((cost(rows, hessian, Feedback(feedback.weights.roll(1, 0), feedback.step)) > plain).all())


def test_channels_that_share_no_cost_pass_on_nothing() -> None:
    hessian = torch.stack([torch.diag(torch.rand(64)), torch.zeros(64, 64), make_hessian(1, 64)[0]])
    found = fit_feedback(hessian)
    assert not found.weights[:2].any()
    assert found.step[:2].tolist() == [0, 0]
    assert bool(found.weights[2].any())
    rows = torch.randn(20, 3, 64)
    codec = IntegerCodec(4)
    nothing = Feedback(torch.zeros_like(found.weights), found.step)
    differ = (codec.encode(rows, found)[0] != codec.encode(rows, nothing)[0]).any(-1).any(0)
    assert differ.tolist() == [False, False, True]


def test_a_hessian_of_few_queries_is_fitted() -> None:
    """Of rank 1, as from one token: damping keeps it solvable, and its scale does not matter."""
    q = torch.randn(1, 128)
    one = q.mT @ q[None]
    for factor in (1e-12, 1.0, 1e12):
        found = fit_feedback(one * factor)
        assert bool(found.step.isfinite().all())
        assert float((found.weights.float() - fit_feedback(one).weights.float()).abs().max()) <= 1
    rows = torch.randn(200, 1, 128)
    assert float(cost(rows, one, found)) < 0.5 * float(cost(rows, one, None))


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.full((1, 16, 16), torch.nan), "finite"),
        (torch.full((1, 16, 16), torch.inf), "finite"),
        (torch.zeros(16, 16), r"expected floats \[num_kv_heads, head_dim, head_dim\], got torch.float32 \[16, 16\]"),
        (torch.zeros(1, 16, 32), r"\[1, 16, 32\]"),
        (torch.zeros(1, 16, 16, dtype=torch.int64), "torch.int64"),
    ],
)
def test_bad_hessians_are_refused(hessian: torch.Tensor, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        fit_feedback(hessian)
