"""Integers with error feedback at write, as sawkv serves them: codes are chosen to minimize e^T A e, and not e^T e.

Let the four channels B of a block have the error e_B. The cost is smallest if the later channels R have the error
-A_RR^-1 A_RB e_B, with A the damped hessian, so R is moved by that much before it is coded. Source: GPTQ, arXiv
2210.17323, applied to blocks of channels of K (hessian: mean of q q^T) and V (Gram matrix of o_proj), with errors and
weights of 8 bits (docs/decisions/0007). Pages are read as without feedback.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.format.codecs import CODECS
from sawkv.format.feedback import fit_feedback
from sawkv.format.spec import CODEC_BITS
from sawkv.lab.methods.integer import META_BITS
from sawkv.lab.samples import Sample
from sawkv.prepare.states import Reader


@dataclass(frozen=True)
class FedBack:
    """One of the product's integer codecs, given the feedback that `sawkv prepare` would fit."""

    codec: str = "int4"

    def bits(self, head_dim: int) -> float:
        return CODEC_BITS[self.codec] + META_BITS / head_dim

    def fit(self, sample: Sample) -> Reader:
        codec, feedback = CODECS[self.codec], fit_feedback(sample.hessian)

        def read(rows: torch.Tensor) -> torch.Tensor:
            return codec.decode(*codec.encode(rows, feedback))

        return read
