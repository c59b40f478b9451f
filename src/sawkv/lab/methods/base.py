"""The interface of methods: fit to a sample, then map rows to what attention would read from the cache.

A `Method` has a `Quantizer` for K and one for V. `Quantizer.fit` takes a `Sample` of one layer's rows on calibration
text and returns a `Reader`, which maps rows to what attention reads after they were stored. Most quantizers are
token-wise: the result for one row does not depend on other rows, so a prompt in one pass reads the same as decoding
token by token. Files of others say so, and what it changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sawkv.format.spec import CacheFormat
from sawkv.lab.samples import LayerSample, Sample
from sawkv.prepare.states import Kept, Reader


class Quantizer(Protocol):
    """Stores rows of K or of V."""

    def bits(self, head_dim: int) -> float:
        """Bits per element, with everything that is stored per row. Data stored once per head (centers, codebooks) is
        not counted.
        """
        ...

    def fit(self, sample: Sample) -> Reader:
        """Fit static parameters to one layer's sample. Quantizers without parameters use only its shape and device."""
        ...


@dataclass(frozen=True)
class Method:
    """A named way of storing K and V.

    Attributes:
        name: as in `sawkv eval --formats` and in records.
        k, v: quantizers.
        calibrated: whether `fit` uses the sample's rows.
        served: the engine that serves it fast: "sawkv", "vllm", or "" for a comparison only (its file says why).
        format: the cache format, if the method is one.
        kept: the tokens that stay in 16 bits; None is none.
    """

    name: str
    k: Quantizer
    v: Quantizer
    calibrated: bool = False
    served: str = ""
    format: CacheFormat | None = None
    kept: Kept | None = None

    def bits(self, head_dim: int, length: int = 0) -> float:
        """Mean bits per element of K and V, with everything that is stored per row, in a sequence of `length` tokens.
        Only methods that keep tokens in 16 bits need the length.
        """
        stored = (self.k.bits(head_dim) + self.v.bits(head_dim)) / 2
        if self.kept is None:
            return stored
        beside = self.format is not None and self.format.recent  # the pages hold these tokens too
        return stored + (16 if beside else 16 - stored) * self.kept.share(length)

    def fit(self, sample: LayerSample) -> tuple[Reader, Reader]:
        """Readers of K and of V for one layer."""
        return self.k.fit(sample.k), self.v.fit(sample.v)
