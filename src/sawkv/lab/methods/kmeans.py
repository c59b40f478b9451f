"""Vector quantization: each pair of channels is coded by one of 256 centroids, 4 bits per value. A comparison.

A row is divided by its root mean square (stored in fp16), and each channel by its static deviation. Neighbouring
channels then form points of two dimensions, coded by the nearest centroid. Each head has one codebook, fitted by
k-means on calibration rows (scikit-learn). Sources: product quantization (Jegou et al., 2011); CQ, arXiv 2405.03917,
codes coupled channels of the KV cache; SAW-INT4 compares with k-means. Every pair needs a look-up in a table of 256
entries per head, which makes attention slow.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from sawkv.errors import UnsupportedError
from sawkv.format.constants import MAX_SCALE, MIN_SCALE
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader

RMS_BITS = 16
FIT_POINTS = 20_000


@dataclass(frozen=True)
class KMeans:
    """Codes groups of `group` channels by centroids."""

    centroids: int = 256
    group: int = 2

    def bits(self, head_dim: int) -> float:
        return (self.centroids - 1).bit_length() / self.group + RMS_BITS / head_dim

    def fit(self, sample: Sample) -> Reader:
        deviation = sample.rows.square().mean(0).sqrt().clamp_min(1e-6)  # [num_kv_heads, head_dim]
        deviation = deviation / deviation.square().mean(-1, keepdim=True).sqrt()
        points, _ = self._points(sample.rows, deviation)
        codebooks = torch.stack([self._codebook(points[head]) for head in range(points.shape[0])])
        lengths = codebooks.square().sum(-1)[:, None] / 2

        def read(rows: torch.Tensor) -> torch.Tensor:
            points, rms = self._points(rows, deviation)
            # |p - c|^2 is least where p.c - |c|^2 / 2 is largest.
            codes = torch.cat(
                [torch.baddbmm(-lengths, part, codebooks.mT).argmax(-1) for part in torch.split(points, 65536, 1)], 1
            )
            coded = codebooks.gather(1, codes[..., None].expand_as(points))
            return coded.view(rows.shape[1], rows.shape[0], rows.shape[2]).transpose(0, 1) * deviation * rms

        return read

    def _points(self, rows: torch.Tensor, deviation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Points [num_kv_heads, num_tokens * head_dim / group, group], and the stored root mean squares of rows."""
        whitened = rows / deviation
        rms = whitened.square().mean(-1, keepdim=True).sqrt().clamp(MIN_SCALE, MAX_SCALE).half().float()
        return (whitened / rms).transpose(0, 1).reshape(rows.shape[1], -1, self.group), rms

    def _codebook(self, points: torch.Tensor) -> torch.Tensor:
        try:
            from sklearn.cluster import MiniBatchKMeans
        except ImportError as error:
            raise UnsupportedError("k-means: expected scikit-learn, got none; install sawkv[eval]") from error
        picked = torch.randperm(points.shape[0], generator=torch.Generator().manual_seed(0))[:FIT_POINTS]
        fitted = MiniBatchKMeans(self.centroids, n_init=1, max_iter=20, batch_size=4096, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer distinct points than centroids, on tiny samples
            fitted.fit(points[picked.to(points.device)].cpu().numpy())
        return torch.from_numpy(fitted.cluster_centers_).to(points)
