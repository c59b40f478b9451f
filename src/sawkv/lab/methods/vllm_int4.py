"""vLLM's own `int4_per_token_head` cache: 4.25 bits, its fp32 scale included.

y = H D x, unnormalized, rounded to bf16; scale = (max y - min y) / 15; zero_point = round(-min y / scale), clamped to
0..15 and kept in the lowest four bits of the scale; code = clamp(round(y / scale + zero_point), 0, 15). Source:
vllm/v1/attention/ops/int4_per_token_head.py of vLLM 0.26 to 0.32. On a GPU with vLLM installed, vLLM's kernel writes
the rows. Elsewhere a port of its arithmetic does, which tests/lab/test_vllm_int4.py compares bit for bit with the
kernel in Triton's interpreter. Reading follows vLLM's attention kernel, (code - zero_point) * scale, without its
rounding of queries to bf16.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sawkv.format.rotation import rotate
from sawkv.lab import vllm_peer
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader

SIGNS_SEED = 0x9E3779B9


@dataclass(frozen=True)
class VllmInt4:
    """Rows as vLLM's kernels store them for a model in bf16."""

    def bits(self, head_dim: int) -> float:
        return 4 + 32 / head_dim

    def fit(self, sample: Sample) -> Reader:
        head_dim = sample.head_dim
        order = head_dim & -head_dim
        signs = vllm_signs(order).repeat(head_dim // order).to(sample.rows.device)
        store = vllm_peer.store if vllm_peer.available(sample.rows.device) else encode

        def read(rows: torch.Tensor) -> torch.Tensor:
            codes, packed = store(rows.bfloat16())
            unrotated: torch.Tensor = rotate(decode(codes, packed), order) * signs * order**-0.5
            return unrotated

        return read


def encode(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., head_dim] bf16 to codes [..., head_dim] uint8 (0 to 15) and scales [..., 1] fp32 that carry the zero
    points.
    """
    head_dim = rows.shape[-1]
    order = head_dim & -head_dim
    signs = vllm_signs(order).repeat(head_dim // order).to(rows.device)
    return encode_rotated(_hadamard(rows.float() * signs, order).to(rows.dtype))


def encode_rotated(rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the write kernel does with rotated rows."""
    y = rotated.float()
    lo, hi = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    scale = ((hi - lo) / 15.0).clamp_min(1e-6)
    zero_point = _half_away(-lo / scale).clamp(0, 15)
    codes = _half_away(y * (1.0 / scale) + zero_point).clamp(0, 15).to(torch.uint8)
    packed = (scale.view(torch.int32) & -16) | zero_point.to(torch.int32)
    return codes, packed.view(torch.float32)


def decode(codes: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Decode to [..., head_dim] fp32, still rotated, and longer by the square root of the rotation order."""
    bits = packed.view(torch.int32)
    return (codes.float() - (bits & 15).float()) * (bits & -16).view(torch.float32)


@functools.cache
def vllm_signs(order: int) -> torch.Tensor:
    """[order] fp32 of -1 and 1, those of vLLM."""
    generator = torch.Generator().manual_seed(SIGNS_SEED)
    return 2.0 * torch.bernoulli(torch.full((order,), 0.5), generator=generator) - 1.0


def _hadamard(x: torch.Tensor, order: int) -> torch.Tensor:
    """Unnormalized butterflies at strides 1, 2, 4, ..., as vLLM's PyTorch path."""
    shape, stride = x.shape, 1
    while stride < order:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x, stride = torch.stack((a + b, a - b), dim=-2), stride * 2
    return x.reshape(shape)


def _half_away(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest, halves away from zero, as the kernel does by truncating x + 0.5 or x - 0.5."""
    return torch.where(x >= 0, x + 0.5, x - 0.5).trunc()
