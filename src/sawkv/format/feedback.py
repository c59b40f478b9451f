"""Error feedback at write: codes are chosen for a small error of attention, and not for a small error of each channel.

Channels are coded in blocks of four. Rounding errors of a block move the channels of later blocks before these are
rounded. The weights come from the second moments of queries (for K, where scores count) or from o_proj (for V, where
the layer's output counts). Source: GPTQ, arXiv 2210.17323, applied to blocks of channels of K and V.

Errors and weights are 8-bit integers. Their sums are exact, so every backend writes the same bytes. Feedback does not
change how pages are read. docs/format.md specifies the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from sawkv.errors import LayoutError
from sawkv.format.constants import ERROR_STEPS, MAX_WEIGHT

DAMPING: Final = 0.01
"""Added to a hessian's diagonal, as a share of its mean. Channels without measurements then hardly take part in
feedback.
"""
NEGLIGIBLE: Final = 1e-6
"""Exact weights up to this size are rounding errors of the hessian, and become zero."""


@dataclass(frozen=True, eq=False)
class Feedback:
    """Feedback weights of all KV heads, for K or for V, in the basis in which rows are coded.

    Attributes:
        weights: [num_kv_heads, head_dim, head_dim] int8. weights[h, j, i] says how much of the rounding error of
            channel i moves channel j. It is zero unless the block of i comes before the block of j.
        step: [num_kv_heads] fp32. Channel j moves by step * sum_i(weights * errors) codes, with errors in units of 1 /
            ERROR_STEPS code.

    Raises:
        LayoutError: a tensor has another shape or dtype.
    """

    weights: torch.Tensor
    step: torch.Tensor

    def __post_init__(self) -> None:
        weights, step = self.weights, self.step
        if (
            weights.dtype != torch.int8
            or weights.ndim != 3
            or weights.shape[1] != weights.shape[2]
            or not weights.is_contiguous()
        ):
            raise LayoutError(
                f"feedback weights: expected contiguous int8 [num_kv_heads, head_dim, head_dim], got {weights.dtype}"
                f" {list(weights.shape)}"
            )
        if step.dtype != torch.float32 or step.shape != weights.shape[:1] or not step.is_contiguous():
            raise LayoutError(
                f"feedback step: expected contiguous float32 [{weights.shape[0]}], got {step.dtype} {list(step.shape)}"
            )
        if step.device != weights.device:
            raise LayoutError(
                f"feedback: expected weights and step on one device, got {weights.device} and {step.device}"
            )

    def to(self, device: torch.device | str) -> Feedback:
        """A copy on a device."""
        return Feedback(self.weights.to(device), self.step.to(device))

    def move(self, codes: torch.Tensor, max_code: int) -> torch.Tensor:
        """Move each unrounded code by the errors of earlier blocks.

        Args:
            codes: [..., num_kv_heads, head_dim] fp32, not rounded yet.
            max_code: the largest code.

        Returns:
            The moved codes, same shape, fp32.
        """
        blocks = channel_blocks(codes.shape[-1]).to(codes.device)
        moved, errors = codes.clone(), torch.zeros_like(codes, dtype=torch.float64)
        for block in range(int(blocks.max()) + 1):
            here = blocks == block
            taken = torch.einsum("...hi,hji->...hj", errors, self.weights[:, here].double())  # exact: integers
            # fp64 holds the product and the sum exactly enough that one rounding to fp32 gives what fma gives.
            part = (taken * self.step[:, None].double() + codes[..., here].double()).float()
            moved[..., here] = part
            steps = (part - part.round().clamp(0, max_code)) * ERROR_STEPS
            errors[..., here] = steps.round().clamp(-MAX_WEIGHT, MAX_WEIGHT).double()
        return moved


def fit_feedback(hessian: torch.Tensor) -> Feedback:
    """Fit the feedback that minimizes the cost e^T A e of a row's error e, in fp64.

    Let the channels B of one block have the errors e_B, and let R be the channels after it. The cost is smallest if R
    has the errors -A_RR^-1 A_RB e_B, with A the damped hessian. So feedback moves R by A_RR^-1 A_RB times the error of
    B.

    Args:
        hessian: [num_kv_heads, head_dim, head_dim], symmetric and positive semi-definite, in the basis that is coded.

    Returns:
        Weights on the hessian's device. They are zeros for a head whose hessian is diagonal.

    Raises:
        LayoutError: the hessian has another shape, or is not finite.
    """
    upper, own, order = _factor(hessian)
    # Let R follow block B. Then A_RB = U_RR U_BR^T, so A_RR^-1 A_RB = (U_BR U_RR^-1)^T. The part BR of U^-1 is
    # -U_BB^-1 U_BR U_RR^-1, so one product with the blocks on U's diagonal gives all of them.
    exact = torch.empty_like(upper, memory_format=torch.contiguous_format)
    exact[:, order[:, None], order] = -torch.linalg.solve_triangular(upper, own, upper=True, left=False).mT
    exact = exact.where(takes_from(len(order)).to(exact.device), 0.0)
    top = exact.abs().amax((-2, -1))
    top = top.where(top > NEGLIGIBLE, 0.0)
    weights = (exact / top.where(top > 0, torch.inf)[:, None, None] * MAX_WEIGHT).round().to(torch.int8)
    return Feedback(weights, (top / MAX_WEIGHT / ERROR_STEPS).float())


def cost_with_feedback(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected cost of a row with feedback, if the rounding error of each channel has variance 1.

    The cost is the sum over blocks of the trace of the block's Schur complement in the damped hessian: the part of its
    error that later blocks cannot make up for. Without feedback it would be the trace of the hessian.

    Args:
        hessian: as in `fit_feedback`.

    Returns:
        The cost, [num_kv_heads] fp64, and its derivative by the hessian, [num_kv_heads, head_dim, head_dim] fp64.
    """
    upper, own, order = _factor(hessian)
    # A = L D L^T, with blocks of identity on L's diagonal, and the cost is D's trace. Its derivative by A is L^-T L^-1.
    inverse = torch.linalg.solve_triangular(upper, own, upper=True, left=False)  # own U^-1
    by_damped = torch.empty_like(upper)
    by_damped[:, order[:, None], order] = inverse.mT @ inverse
    trace = by_damped.diagonal(dim1=-2, dim2=-1).sum(-1)
    by_damping = torch.diag_embed((DAMPING / len(order) * trace)[:, None].expand(-1, len(order)))
    return own.square().sum((-2, -1)), by_damped + by_damping


def _factor(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factor the damped hessian, with channels in the order of coding, as U U^T with U upper triangular, in fp64.

    Returns:
        U, its diagonal blocks, and the order.
    """
    if hessian.ndim != 3 or hessian.shape[1] != hessian.shape[2] or not hessian.is_floating_point():
        raise LayoutError(
            f"hessian: expected floats [num_kv_heads, head_dim, head_dim], got {hessian.dtype} {list(hessian.shape)}"
        )
    if not bool(hessian.isfinite().all()):
        raise LayoutError("hessian: expected finite values, got NaN or infinity")
    damped = hessian.double()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    tiny = torch.finfo(torch.float64).tiny
    damped = damped + torch.diag_embed((DAMPING * diagonal.mean(-1, keepdim=True)).clamp_min(tiny).expand_as(diagonal))
    blocks = channel_blocks(hessian.shape[-1]).to(hessian.device)
    order = torch.argsort(blocks, stable=True)
    blocks, backwards = blocks[order], order.flip(0)
    upper = torch.linalg.cholesky(damped[:, backwards[:, None], backwards]).flip(-2, -1)
    return upper, upper.where(blocks[:, None] == blocks, 0.0), order


def takes_from(head_dim: int) -> torch.Tensor:
    """Whether channel j (row) may take errors of channel i (column): [head_dim, head_dim] bool. True if the block of i
    comes first.
    """
    blocks = channel_blocks(head_dim)
    return blocks[:, None] > blocks


def channel_blocks(head_dim: int) -> torch.Tensor:
    """The block of each channel, in the order of coding: [head_dim] int64 on the CPU.

    Of every 32 channels, the first of each eight are one block, the second of each eight are the next block, and so on.
    So a GPU lane that holds eight neighbouring channels has one channel of every block.
    """
    # Whatever the default device is: vLLM's is the GPU while it makes layers.
    channel = torch.arange(head_dim, device="cpu")
    return channel // 32 * 8 + channel % 8
