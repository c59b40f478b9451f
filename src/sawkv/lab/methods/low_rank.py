"""Low rank: x ~ mean + B store(B^T (x - mean)), with B the leading singular vectors of the head's calibration rows. A
comparison.

B and the mean are static. Sources: Palu, arXiv 2407.21118; LoRC, arXiv 2410.03111. K after RoPE has no low rank that
holds at all positions, and reading needs a dense [rank, head_dim] product per row or query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.lab.methods.base import Quantizer
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader


@dataclass(frozen=True)
class LowRank:
    """`inner` on the coordinates.

    Attributes:
        inner: quantizer of the coordinates.
        share: rank / head_dim.
    """

    inner: Quantizer
    share: float

    def bits(self, head_dim: int) -> float:
        rank = self._rank(head_dim)
        return self.inner.bits(rank) * rank / head_dim

    def fit(self, sample: Sample) -> Reader:
        mean = sample.rows.mean(0)
        centered = sample.rows - mean
        covariance = torch.einsum("thc,thd->hcd", centered.double(), centered.double())
        # [num_kv_heads, head_dim, rank]
        basis = torch.linalg.eigh(covariance).eigenvectors[..., -self._rank(sample.head_dim) :].float()

        def project(rows: torch.Tensor) -> torch.Tensor:
            return torch.einsum("thd,hdr->thr", rows - mean, basis)

        hessian = basis.mT @ sample.hessian @ basis
        read = self.inner.fit(Sample(project(sample.rows), hessian))
        return lambda rows: torch.einsum("thr,hdr->thd", read(project(rows)), basis) + mean

    def _rank(self, head_dim: int) -> int:
        return max(2, 2 * round(self.share * head_dim / 2))
