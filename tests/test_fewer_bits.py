"""Formats of fewer than four bits: how codes share bytes, and cells without feedback."""

from __future__ import annotations

import pytest
import torch

from sawkv import CacheFormat, PagedKVCache, PageLayout, append
from sawkv.format.codecs import CODECS
from sawkv.format.codecs.integer import pack, unpack
from sawkv.format.feedback import Feedback
from tests.kernel_checks import random_feedback


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacked_codes_are_those_that_were_packed(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 2, 96), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, 96 * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)
    assert not torch.equal(unpack(packed.flip(-1), bits), codes), "the control"


def test_golden_bytes_below_four_bits() -> None:
    """A hand-computed page: K from 0 to 8 in eight cells of 3 bits, V from 0 to 4 in four of 2 bits, all of scale 1."""
    layout = PageLayout(CacheFormat.parse("int3v2-k0-v0"), 1, 32, 16)
    cache = PagedKVCache.allocate(layout, 2)
    cache.pages.zero_()
    channel = torch.arange(32)
    k, v = (channel % 8 + 0.5).view(1, 1, 32), (channel % 4 + 0.5).view(1, 1, 32)
    k[..., 0], k[..., 7], k[..., 16] = 0, 8, 5.5  # codes 0, 7 and 5: 0 1 2 .. 7 0 .. 7, then 5 1 2 .. 7 0 .. 7
    v[..., 0], v[..., 3], v[..., 30] = 0, 4, 0.5  # codes 0, 3 and 0: 0 1 2 3 0 .. 3, at last 0 1 0 3
    append(k, v, cache, torch.tensor([16 + 3]), backend="reference")
    span = cache.pages[1].flatten().tolist()
    k_meta, v_codes, v_meta = 16 * 12, 16 * 16, 16 * 24
    want = [0] * layout.span_bytes
    assert layout.span_bytes == 16 * 28
    # Channels 0 to 15: 0x4688, 0x11F5 and 0x6B1A are five codes each, and the top bits are those of code 7.
    want[3 * 12 : 4 * 12] = [0x88, 0xC6, 0x8D, 0xC6, 0xF5, 0x91, 0xF5, 0x91, 0x1A, 0xEB, 0x1A, 0xEB]
    want[v_codes + 3 * 8 : v_codes + 4 * 8] = [0xE4] * 7 + [0xC4]
    for meta in (k_meta, v_meta):
        want[meta + 12 : meta + 16] = [0x00, 0x3C, 0x00, 0xB8]  # fp16 1.0, then -0.5
    assert span == want
    assert not cache.pages[0].any()


@pytest.mark.parametrize("name", ["int3", "int2"])
def test_rows_below_four_bits_are_divided_into_cells_with_and_without_feedback(name: str) -> None:
    y, codec = torch.randn(5, 2, 64), CODECS[name]
    feedback = random_feedback(2, 64, "cpu")
    silent = Feedback(torch.zeros_like(feedback.weights), feedback.step)
    plain, with_zeros, fed_back = (codec.encode(y, each) for each in (None, silent, feedback))
    assert all(torch.equal(a, b) for a, b in zip(plain, with_zeros, strict=True))
    assert torch.equal(fed_back[1], plain[1])
    assert not torch.equal(fed_back[0], plain[0])
