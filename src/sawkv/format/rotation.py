"""Block-diagonal Hadamard rotation, in the exact fp32 order of operations that docs/format.md fixes."""

from __future__ import annotations

import torch


def hadamard_matrix(order: int) -> torch.Tensor:
    """The normalized Sylvester-Hadamard matrix, [order, order] fp64; symmetric and its own inverse."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix * float(order**-0.5)


def rotate(x: torch.Tensor, order: int) -> torch.Tensor:
    """Multiply each group of `order` channels by the normalized Hadamard matrix. Two rotations are the identity.

    Args:
        x: [..., head_dim] of any float dtype. The arithmetic is fp32.
        order: channels per group, a divisor of head_dim; 0 is no rotation.

    Returns:
        [..., head_dim] fp32.
    """
    x = x.float()
    if order == 0:
        return x
    shape = x.shape
    stride = 1
    while stride < order:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2)
        stride *= 2
    return x.reshape(shape) * torch.tensor(order, dtype=torch.float64, device="cpu").rsqrt().float().to(x.device)
