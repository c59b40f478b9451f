"""Integers with error feedback at write, as served: codes that keep the cost e^T hessian e small, not e^T e.

Once the four channels B of a block err by e_B, the cost is least if those after it, R, err by -A_RR^-1 A_RB e_B, with A
the damped hessian: R is moved so before it is coded. Source: GPTQ, arXiv 2210.17323, for blocks of channels, with
errors and weights of 8 bits (docs/decisions/0007), on rows of K (hessian = mean of q q^T) and V (Gram matrix of
o_proj). Reading does not know of it. Served by sawkv, with a file of `sawkv prepare`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sawkv.format.codecs import IntegerCodec
from sawkv.format.feedback import fit_feedback
from sawkv.lab.methods.integer import META_BITS
from sawkv.prepare.samples import Reader, Sample


@dataclass(frozen=True)
class FedBack:
    """The product's INT4 codec, given the feedback that `sawkv prepare` would fit."""

    def bits(self, head_dim: int) -> float:
        return 4 + META_BITS / head_dim

    def fit(self, sample: Sample) -> Reader:
        codec, feedback = IntegerCodec(4), fit_feedback(sample.hessian)

        def read(rows: torch.Tensor) -> torch.Tensor:
            return codec.decode(*codec.encode(rows, feedback))

        return read
