"""What sawkv serves by default: pages with the centers, gains and feedback that engines fit (`sawkv.prepare`).

y = H((x - center) * gain) is coded with feedback, and read back as (H y) * (1 / gain) + center, in the arithmetic of
the served kernels. K has a center per bucket of positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.format.codecs import CODECS
from sawkv.format.constants import BUCKET_SIZE
from sawkv.format.feedback import Feedback
from sawkv.format.rotation import rotate
from sawkv.lab.methods.base import Method
from sawkv.lab.samples import LayerSample
from sawkv.prepare.fit import fit
from sawkv.prepare.states import Reader


@dataclass(frozen=True)
class Prepared(Method):
    """A cache format, fitted to statistics alone; `k` and `v` say what a row takes."""

    def fit(self, sample: LayerSample) -> tuple[Reader, Reader]:
        if self.format is None:
            raise TypeError("only a cache format can be prepared")
        own = self.format.resolve(sample.k.head_dim)
        layer = fit([sample.statistics], own)[0]
        return (
            _reader(own.k_codec, layer.k_center, layer.k_gain, layer.k_feedback, own.k_rotation_order),
            _reader(own.v_codec, layer.v_center, layer.v_gain, layer.v_feedback, own.v_rotation_order),
        )


def _reader(
    codec_name: str, center: torch.Tensor | None, gain: torch.Tensor | None, feedback: Feedback | None, order: int
) -> Reader:
    if center is None or gain is None:
        raise TypeError("a fit has centers and gains")
    codec, inverse, centers = CODECS[codec_name], gain.reciprocal(), center.view(-1, *gain.shape)

    def read(rows: torch.Tensor) -> torch.Tensor:
        buckets = torch.arange(len(rows), device=rows.device) // BUCKET_SIZE
        own = centers[buckets.clamp_max(len(centers) - 1)]
        stored = codec.encode(rotate((rows - own) * gain, order), feedback)
        return rotate(codec.decode(*stored), order) * inverse + own

    return read
