"""Integers chosen to minimize e^T A e channel by channel, in floats. A comparison.

For channel i in order: code y_i, then y_j <- y_j - e_i U_ij / U_ii for j > i, with U the upper Cholesky factor of the
damped hessian's inverse. Source: GPTQ, arXiv 2210.17323, applied to rows of K (hessian: mean of q q^T) and V (Gram
matrix of o_proj). SAW-INT4 compares with a Hessian-aware variant. The bytes are those of sawkv's codec, so reading is
as fast. Writing takes head_dim dependent steps per row; what sawkv serves takes blocks of four channels and 8-bit
integers (`feedback`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.format.codecs import IntegerCodec
from sawkv.format.feedback import DAMPING
from sawkv.lab.methods.integer import META_BITS
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader


@dataclass(frozen=True)
class HessianAware:
    """The product's integer codec with error feedback; range and zero point are the codec's own."""

    bits_per_code: int = 4

    def bits(self, head_dim: int) -> float:
        return self.bits_per_code + META_BITS / head_dim

    def fit(self, sample: Sample) -> Reader:
        hessian = sample.hessian.double()
        mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
        damped = hessian / mean[:, None, None] + DAMPING * torch.eye(
            sample.head_dim, dtype=torch.float64, device=hessian.device
        )
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factor = torch.linalg.cholesky(inverse, upper=True)
        factor = (
            factor / factor.diagonal(dim1=-2, dim2=-1)[..., None]
        ).float()  # [num_kv_heads, head_dim, head_dim], ones on the diagonal
        codec = IntegerCodec(self.bits_per_code)

        def read(rows: torch.Tensor) -> torch.Tensor:
            # Each [num_kv_heads, 1, num_tokens].
            scale, zero_point = codec.encode(rows)[1].float().permute(2, 1, 0)[:, :, None]
            left = rows.permute(1, 2, 0).clone()  # [num_kv_heads, head_dim, num_tokens]
            coded = torch.empty_like(left)
            for i in range(left.shape[1]):
                column = left[:, i : i + 1]
                code = (column / scale + zero_point).round().clamp(0, codec.max_code)
                coded[:, i : i + 1] = (code - zero_point) * scale
                left[:, i + 1 :] -= factor[:, i, i + 1 :, None] * (column - coded[:, i : i + 1])
            return coded.permute(2, 0, 1)

        return read
