"""What a method of storing K and V is, for evaluation: fit it on a sample, then ask what attention would read back.

A `Method` has a `Quantizer` for K and one for V. A quantizer sees one layer: `fit` takes a `Sample` of that layer's
rows on calibration text and gives a `Reader`, which maps rows to what attention reads after they were stored. Every
quantizer is token-wise: a row's result does not depend on other rows, so a prompt in one pass reads what token-by-token
decoding would have read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sawkv.format.spec import CacheFormat
from sawkv.prepare.samples import LayerSample, Reader, Sample


class Quantizer(Protocol):
    """What is done to K, or to V."""

    def bits(self, head_dim: int) -> float:
        """Bits of one element, with all that is stored for its row; what is stored once for a head (centers, codebooks)
        is not counted.
        """
        ...

    def fit(self, sample: Sample) -> Reader:
        """Learn what is static from one layer's sample. Quantizers that learn nothing take only its
        shape and device.
        """
        ...


@dataclass(frozen=True)
class Method:
    """A named way of storing K and V.

    Attributes:
        name: as `sawkv eval --formats` takes it, and as records say it.
        k, v: what is done to each.
        calibrated: whether `fit` learns from the sample.
        served: who serves it fast: "sawkv", "vllm", or "" for a comparison only (its file says why).
        format: the cache format that the method is, if its name is that of one.
    """

    name: str
    k: Quantizer
    v: Quantizer
    calibrated: bool = False
    served: str = ""
    format: CacheFormat | None = None

    def bits(self, head_dim: int) -> float:
        """Mean bits of an element of K and V, with all that is stored for its row."""
        return (self.k.bits(head_dim) + self.v.bits(head_dim)) / 2

    def fit(self, sample: LayerSample) -> tuple[Reader, Reader]:
        """Readers of K and of V for one layer."""
        return self.k.fit(sample.k), self.v.fit(sample.v)
