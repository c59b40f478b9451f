"""Error feedback at write: a row's codes are chosen so that what attention makes of their errors is small, not the
errors themselves.

Channels are coded in blocks of four. The error of those that are coded is passed on to those that are not yet, by
weights that know what an error of each channel costs: the rule of GPTQ, arXiv 2210.17323, for blocks of channels of K
(the cost is that of scores, from the mean of q q^T) and of V (that of the output, from o_proj). Errors and weights are
8-bit integers, so their sums are exact, and every backend writes the same bytes. Reading does not know of it: pages,
`decode_attention` and `gather` are the same. Bytes: docs/format.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from sawkv.errors import LayoutError
from sawkv.format.constants import ERROR_STEPS, MAX_WEIGHT

DAMPING: Final = 0.01
"""Added to a hessian's diagonal, as a share of its mean: channels that nothing was measured of take and pass on little.
"""
NEGLIGIBLE: Final = 1e-6
"""What a channel takes of another's error, as a share of it, that is rounding of the hessian and nothing else."""


@dataclass(frozen=True, eq=False)
class Feedback:
    """Weights of all KV heads, for K or for V, in the basis that is coded (centered, multiplied by gains and rotated).

    Attributes:
        weights: [num_kv_heads, head_dim, head_dim] int8; weights[h, j, i] is what channel j takes of the error of
            channel i. Zero unless channel i's block comes before channel j's.
        step: [num_kv_heads] fp32: channel j is moved by step * (sum of weights * errors), in codes, errors in steps of
            1 / ERROR_STEPS.

    Raises:
        LayoutError: a tensor is not as said.
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
        """The same on a device."""
        return Feedback(self.weights.to(device), self.step.to(device))

    def move(self, codes: torch.Tensor, max_code: int) -> torch.Tensor:
        """Codes that are not rounded yet, [..., num_kv_heads, head_dim] fp32, each moved by the errors of the blocks
        before its own.
        """
        blocks = channel_blocks(codes.shape[-1]).to(codes.device)
        moved, errors = codes.clone(), torch.zeros_like(codes, dtype=torch.float64)
        for block in range(int(blocks.max()) + 1):
            here = blocks == block
            taken = torch.einsum("...hi,hji->...hj", errors, self.weights[:, here].double())  # of integers: exact
            # fp64 holds the product and the sum exactly enough that one rounding to fp32 gives what fma gives.
            part = (taken * self.step[:, None].double() + codes[..., here].double()).float()
            moved[..., here] = part
            steps = (part - part.round().clamp(0, max_code)) * ERROR_STEPS
            errors[..., here] = steps.round().clamp(-MAX_WEIGHT, MAX_WEIGHT).double()
        return moved


def fit_feedback(hessian: torch.Tensor) -> Feedback:
    """The feedback that keeps the cost e^T hessian e of a row's error e small, in fp64.

    When the channels B of a block err by e_B, the cost is least if those after it, R, err by -A_RR^-1 A_RB e_B, with A
    the damped hessian. So R is moved by A_RR^-1 A_RB times what the codes of B fell short.

    Args:
        hessian: [num_kv_heads, head_dim, head_dim], symmetric and positive semi-definite, in the basis that is coded.

    Returns:
        Weights on the hessian's device; zeros for a head whose channels do not share a cost.

    Raises:
        LayoutError: the hessian is not as said, or not finite.
    """
    upper, own, order = _factor(hessian)
    # For a block B and what follows it, R, A_RB = U_RR U_BR^T, so A_RR^-1 A_RB = (U_BR U_RR^-1)^T. The part BR of U^-1
    # is
    # -U_BB^-1 U_BR U_RR^-1, so one product with the blocks on U's diagonal gives all of them.
    exact = torch.empty_like(upper, memory_format=torch.contiguous_format)
    exact[:, order[:, None], order] = -torch.linalg.solve_triangular(upper, own, upper=True, left=False).mT
    exact = exact.where(takes_from(len(order)).to(exact.device), 0.0)
    top = exact.abs().amax((-2, -1))
    top = top.where(top > NEGLIGIBLE, 0.0)
    weights = (exact / top.where(top > 0, torch.inf)[:, None, None] * MAX_WEIGHT).round().to(torch.int8)
    return Feedback(weights, (top / MAX_WEIGHT / ERROR_STEPS).float())


def cost_with_feedback(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of a row's cost where feedback is used: with errors of variance 1 in all channels as they are
    rounded, the mean cost.

    Errors that a block makes are passed on to the blocks after it, and what these cannot make good is left: the trace
    of the block's Schur complement in the damped hessian. Without feedback it would be the trace of the hessian.

    Args:
        hessian: as `fit_feedback` takes it.

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
    """U, upper triangular in fp64, with U U^T the damped hessian, its channels in the order of coding; its diagonal
    blocks; that order.
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
    """[head_dim, head_dim] bool: whether channel j (row) may take of the error of channel i (column), whose block comes
    before j's.
    """
    blocks = channel_blocks(head_dim)
    return blocks[:, None] > blocks


def channel_blocks(head_dim: int) -> torch.Tensor:
    """[head_dim] int64 on the CPU: the block of each channel, in the order of coding.

    Of every 32 channels, the first of each eight are one block, the second of each eight the next, and so on. So a
    GPU's lane that holds eight neighbouring channels has one of every block.
    """
    channel = torch.arange(
        head_dim, device="cpu"
    )  # whatever the default device is: vLLM's is the GPU while it makes layers
    return channel // 32 * 8 + channel % 8
