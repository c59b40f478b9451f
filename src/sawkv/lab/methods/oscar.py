"""OSCAR: a fitted rotation for 2 bits, with clipped rows. A comparison: reading multiplies queries by a dense matrix.

x ~ y' R^T, with y = x R and R = U H P: U has the eigenvectors of a covariance that attention sees, H is Hadamard's
matrix, and P reverses the bits of the places of sorted eigenvalues. For K it is the queries' covariance; for V that of
values, each weighted by k^T (queries' covariance) k, a stand-in for the scores that its key gets. A layer has one R for
K and one for V. Values of y beyond a quantile of |y| of their row are clipped to it, then 128 channels share a scale
and a zero point. The first 64 and the last 256 tokens stay in 16 bits (`Kept`). Source: OSCAR, arXiv 2605.17757, and
github.com/FutureMLS-Lab/OSCAR, for weights of V and quantiles too. P changes nothing where all channels of a row share
a scale, that is up to a head_dim of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.errors import UnsupportedError
from sawkv.format.rotation import hadamard_matrix
from sawkv.lab.methods.base import Method
from sawkv.lab.methods.integer import META_BITS, nearest
from sawkv.lab.samples import LayerSample, Sample
from sawkv.prepare.states import Kept, Reader

GROUP = 128
K_QUANTILE, V_QUANTILE = 0.96, 0.92
KEPT = Kept(first=64, last=256)


@dataclass(frozen=True)
class Clipped:
    """Integers of `bits_per_code` bits, of rows clipped at the `quantile` of their absolute values."""

    quantile: float
    bits_per_code: int = 2

    def bits(self, head_dim: int) -> float:
        return self.bits_per_code + META_BITS / min(GROUP, head_dim)

    def fit(self, sample: Sample) -> Reader:
        def read(rows: torch.Tensor) -> torch.Tensor:
            head_dim = rows.shape[-1]
            limit = rows.abs().sort(-1).values[..., int(self.quantile * head_dim), None]
            groups = rows.clamp(-limit, limit).view(*rows.shape[:-1], -1, min(GROUP, head_dim))
            return nearest(groups, self.bits_per_code).flatten(-2)

        return read


@dataclass(frozen=True)
class Oscar(Method):
    """Rows in the two rotations of a layer; `k` and `v` store them."""

    def fit(self, sample: LayerSample) -> tuple[Reader, Reader]:
        rows, values, hessian = (x.double() for x in (sample.k.rows, sample.v.rows, sample.k.hessian))
        weights = torch.einsum("thc,hcd,thd->th", rows, hessian, rows)
        weights = weights / weights.mean(0).clamp_min(1e-30)
        weighted = torch.einsum("th,thc,thd->cd", weights, values, values) / weights.numel()
        return (
            _rotated(self.k.fit(sample.k), rotation(hessian.mean(0))),
            _rotated(self.v.fit(sample.v), rotation(weighted)),
        )


def rotation(covariance: torch.Tensor) -> torch.Tensor:
    """R for a covariance [head_dim, head_dim], fp32.

    Raises:
        UnsupportedError: head_dim is not a power of two.
    """
    head_dim = len(covariance)
    if head_dim & (head_dim - 1):
        raise UnsupportedError(f"oscar: expected a head_dim that is a power of two, got {head_dim}")
    eigenvectors = torch.linalg.eigh(covariance).eigenvectors  # by ascending eigenvalue
    width = head_dim.bit_length() - 1
    reversed_bits = [int(f"{i:0{width}b}"[::-1], 2) for i in range(head_dim)]
    places = torch.empty(head_dim, dtype=torch.int64)
    places[reversed_bits] = torch.arange(head_dim - 1, -1, -1)
    found: torch.Tensor = (eigenvectors @ hadamard_matrix(head_dim).to(covariance.device))[:, places].float()
    return found


def _rotated(read: Reader, turn: torch.Tensor) -> Reader:
    return lambda rows: read(rows @ turn) @ turn.mT
