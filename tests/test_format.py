"""The format: names, bytes, error bound. Golden bytes change only with a decision note."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sawkv import CacheFormat, FormatError, PagedKVCache, PageLayout, append
from sawkv.format.codecs import CODECS, IntegerCodec
from sawkv.format.feedback import Feedback
from sawkv.format.layout import engine_page_size
from sawkv.format.rotation import hadamard_matrix, rotate
from sawkv.kernels import reference
from tests.kernel_checks import random_feedback

HEAD_DIMS = [64, 80, 96, 112, 128, 192, 256]


# ---- names


@pytest.mark.parametrize(
    "name",
    [
        *("int4-k128-v128", "int4-k0-v0", "int8-k16-v64", "bf16-k0-v0", "fp16-k32-v0", "int4"),
        *("int2", "int3-k64-v0", "int4v3", "int4v2-k16-v16", "int3v2", "int4-r64", "int3v2-k16-v16-r128"),
    ],
)
def test_a_name_parses_and_prints(name: str) -> None:
    assert str(CacheFormat.parse(name)) == name


@pytest.mark.parametrize("recent", [-16, 8, 1008, 100000])
def test_counts_of_newest_tokens_that_no_name_has_are_refused(recent: int) -> None:
    with pytest.raises(FormatError, match=f"expected a multiple of 16 below 1000, got {recent}"):
        CacheFormat("int4", recent=recent)
    if recent > 0:
        with pytest.raises(FormatError, match=f"expected a multiple of 16 below 1000, got {recent}"):
            CacheFormat.parse(f"int4-r{recent}")


def test_pages_do_not_depend_on_the_newest_tokens() -> None:
    assert CacheFormat.parse("int4-r64") != CacheFormat("int4")
    assert CacheFormat.parse("int4-r64").resolve(128) == CacheFormat("int4").resolve(128)
    with pytest.raises(FormatError, match="expected a format without -r64"):
        PageLayout(CacheFormat.parse("int4-r64"), 1, 128, 64)
    page_sizes = {
        name: engine_page_size(CacheFormat.parse(name)) for name in ("int4", "int4-k128-v128-r64", "int2-r64")
    }
    assert page_sizes == {"int4": 64, "int4-k128-v128-r64": 64, "int2-r64": 128}


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        parsed = CacheFormat.parse(text)
    except FormatError:
        return
    assert CacheFormat.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    "name",
    [
        "",
        "int4-k128",
        "int4-v128-k128",
        "int5-k0-v0",
        "int3v4",
        "int4v4",
        "int8v4",
        "v3",
        "int4-k8-v0",
        "int4-k48-v0",
        "int4-k128-v128 ",
        "INT4",
        "int4-k-1-v0",
        "int4-r40",
        "int4-r64-k16-v16",
        "int4-k\u0661\u0666-v0",
    ],
)
def test_a_wrong_name_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match="expected"):
        CacheFormat.parse(name)


@pytest.mark.parametrize(
    ("head_dim", "order"), [(64, 64), (80, 16), (96, 32), (112, 16), (128, 128), (192, 64), (256, 128)]
)
def test_default_orders_are_the_largest_power_of_two_up_to_128(head_dim: int, order: int) -> None:
    assert str(CacheFormat.parse("int4").resolve(head_dim)) == f"int4-k{order}-v{order}"


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FormatError, match="head_dim 96, got 64"):
        PageLayout(CacheFormat.parse("int4-k64-v32"), 1, 96, 16)
    with pytest.raises(FormatError, match="V in int3: expected a head_dim that is a multiple of 32, got 80"):
        PageLayout(CacheFormat("int4v3"), 1, 80, 16)
    for head_dim, page_size, heads in (
        (72, 16, 1),
        (272, 16, 1),
        (1024, 16, 1),
        (128, 24, 1),
        (128, 0, 1),
        (128, 16, 0),
    ):
        with pytest.raises(FormatError, match="expected"):
            PageLayout(CacheFormat("int4"), heads, head_dim, page_size)


# ---- rotation


@pytest.mark.parametrize("order", [16, 32, 64, 128, 256])
def test_hadamard_is_orthogonal_and_rotate_applies_it(order: int) -> None:
    h = hadamard_matrix(order)
    torch.testing.assert_close(h.T @ h, torch.eye(order, dtype=torch.float64))
    x = torch.randn(3, 2 * order)
    want = torch.cat([x.double()[:, :order] @ h, x.double()[:, order:] @ h], -1)
    torch.testing.assert_close(rotate(x, order).double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(rotate(x, order), order), x, atol=1e-5, rtol=1e-5)


# ---- codec


@settings(deadline=None)
@given(st.binary(min_size=64, max_size=64))
def test_packed_nibbles_are_what_was_encoded(raw: bytes) -> None:
    codes = torch.tensor([list(raw)], dtype=torch.uint8)
    meta = torch.tensor([[1.0, 0.0]], dtype=torch.float16)
    values = IntegerCodec(4).decode(codes, meta)  # the codes themselves
    assert values[0, ::2].tolist() == [b & 15 for b in raw]
    assert values[0, 1::2].tolist() == [b >> 4 for b in raw]


finite_rows = st.lists(st.floats(-3e4, 3e4, width=32), min_size=16, max_size=16)


@settings(max_examples=300, deadline=None)
@given(
    finite_rows, st.sampled_from([1.0, 1e-3, 1e-7]), st.sampled_from([0.0, 100.0, -3e4]), st.sampled_from([2, 3, 4, 8])
)
def test_the_error_of_any_finite_row_is_at_most_half_a_scale(
    row: list[float], factor: float, offset: float, bits: int
) -> None:
    """And the quarter of a code by which a large zero point is rounded, where cells end with the row's range."""
    y = torch.tensor([row + row]) * factor + offset
    codec = IntegerCodec(bits)
    codes, meta = codec.encode(y)
    scale = meta[0, 0].item()
    spread, peak = (y.max() - y.min()).item(), y.abs().max().item()
    assert meta[0, 1].abs().item() <= 1024
    assert scale <= max(spread / (codec.max_code + (bits < 4)), peak / 1024, 2**-24) * (1 + 2**-9) + 2**-24
    error = (codec.decode(codes, meta) - y).abs().max().item()
    assert error <= scale * (0.75 if bits < 4 else 0.5) * (1 + 1e-3) + peak * 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0, -3.25, 1e-30, 6e4])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_constant_rows(value: float, bits: int) -> None:
    y = torch.full((1, 128), value)
    decoded = IntegerCodec(bits).decode(*IntegerCodec(bits).encode(y))
    assert (decoded - y).abs().max().item() <= max(abs(value) / 2048, 2**-25) * 1.001


@pytest.mark.parametrize("outlier", [100.0, -100.0, 1000.0])
def test_a_channel_0_outlier_leaves_the_other_channels_intact(outlier: float) -> None:
    x = torch.randn(64, 128)
    x[:, 0] = outlier  # after the rotation this is the same large offset in every channel
    decoded = rotate(IntegerCodec(4).decode(*IntegerCodec(4).encode(rotate(x, 128))), 128)
    error = (decoded - x)[:, 1:].norm() / x[:, 1:].norm()
    assert error < 0.13
    # The control: zero points clamped to the codes' range, as elsewhere, lose the row.
    # A row that starts at 0, as a clamped zero point would have it.
    clamped = IntegerCodec(4).encode(rotate(x, 128).clamp(min=0))
    lost = rotate(IntegerCodec(4).decode(*clamped), 128)
    assert outlier > 0 or (lost - x)[:, 1:].norm() / x[:, 1:].norm() > 0.13


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codec", ["int2", "int3", "int4", "int8"])
def test_a_non_finite_row_decodes_to_nan_and_harms_no_other(codec: str, poison: float) -> None:
    y = torch.randn(3, 32)
    clean = CODECS[codec].decode(*CODECS[codec].encode(y))
    y[1, 5] = poison
    codes, meta = CODECS[codec].encode(y)
    decoded = CODECS[codec].decode(codes, meta)
    assert decoded[1].isnan().all()
    assert torch.equal(decoded[[0, 2]], clean[[0, 2]])
    assert not codes[1].any()


def test_a_range_beyond_fp16_saturates_and_stays_finite() -> None:
    y = torch.tensor([[-3e38, 3e38] * 8])
    assert IntegerCodec(4).decode(*IntegerCodec(4).encode(y)).isfinite().all()


# ---- bytes


def test_golden_bytes() -> None:
    """A hand-computed row: 0..15 has scale 1, zero point 0 and its own values as codes; 16 + 0..15 the same codes and
    zero point -16.
    """
    layout = PageLayout(CacheFormat.parse("int4-k0-v0"), 1, 16, 16)
    cache = PagedKVCache.allocate(layout, 2)
    cache.pages.zero_()
    row = torch.arange(16.0).view(1, 1, 16)
    append(row, row + 16, cache, torch.tensor([16 + 3]), backend="reference")
    span = cache.pages[1].flatten().tolist()
    packed = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    k_meta, v_codes, v_meta = 16 * 8, 16 * 12, 16 * 20
    want = [0] * layout.span_bytes
    want[3 * 8 : 3 * 8 + 8] = packed
    want[k_meta + 12 : k_meta + 16] = [0x00, 0x3C, 0x00, 0x00]  # fp16 1.0, then 0.0
    want[v_codes + 24 : v_codes + 32] = packed
    want[v_meta + 12 : v_meta + 16] = [0x00, 0x3C, 0x00, 0xCC]  # fp16 1.0, then -16.0
    assert span == want
    assert not cache.pages[0].any()


def test_golden_feedback() -> None:
    """A hand-computed row of V, from 0 to 16: sixteen cells of scale 1, codes in their middles, so zero point -0.5.

    It is 0.5 + (0..15), but for its ends, which have codes 0 and 15 and errors of -32 and 32 steps, and 1.75 in
    channels 1 and 2: both have code 1, and an error of 16 steps. K, which has no feedback, holds 0..15 in codes of
    scale 1.
    """
    layout = PageLayout(CacheFormat.parse("int4-k0-v0"), 1, 16, 16)
    weights = torch.zeros(1, 16, 16, dtype=torch.int8)
    weights[0, 4, 1] = 64  # channel 4 takes 16 * 64 / 512 = 2 codes of channel 1,
    weights[0, 12, 1], weights[0, 12, 2] = -127, 7  # channel 12 takes 16 * (7 - 127) / 512 = -3.75,
    weights[0, 13, 2] = 127  # and channel 13 takes 3.97, which leads beyond 15
    weights[0, 3, 1] = 32  # channel 3 takes one code of channel 1, which is coded two blocks before it,
    weights[0, 5, 0] = 16  # and channel 5 takes -1 of channel 0
    weights[0, 6, 8] = 100  # channel 8 has no error
    feedback = Feedback(weights, torch.tensor([1 / 512]))
    cache = PagedKVCache.allocate(layout, 1, v_feedback=feedback)
    row = torch.arange(16.0).view(1, 1, 16)
    v = row + 0.5
    v[..., 0], v[..., 1:3], v[..., 15] = 0, 1.75, 16
    append(row, v, cache, torch.tensor([0]), backend="reference")
    k_codes, k_meta, v_codes, v_meta = (plane[0, 0, 0].tolist() for plane in reference.planes(cache))
    assert k_meta == [0x00, 0x3C, 0x00, 0x00]  # fp16 1.0, then 0.0
    assert v_meta == [0x00, 0x3C, 0x00, 0xB8]  # fp16 1.0, then -0.5
    assert k_codes == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert v_codes == [0x10, 0x41, 0x46, 0x76, 0x98, 0xBA, 0xF8, 0xFE]


def test_golden_gain() -> None:
    """K has codes 0..15 after centering and gain. The difference is rounded before it is multiplied."""
    layout = PageLayout(CacheFormat.parse("int4-k0-v0"), 1, 16, 16)
    gain = torch.ones(1, 16)
    gain[0, 3], gain[0, 7] = 0.5, 3
    cache = PagedKVCache.allocate(layout, 1, k_center=torch.full((1, 16), 2.0), k_gain=gain)
    row = torch.arange(16.0).view(1, 1, 16)
    append(row / gain + 2, row, cache, torch.tensor([0]), backend="reference")
    k_codes, k_meta, v_codes, v_meta = (plane[0, 0, 0].tolist() for plane in reference.planes(cache))
    assert k_meta == v_meta == [0x00, 0x3C, 0x00, 0x00]  # fp16 1.0, then 0.0
    assert k_codes == v_codes == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]

    layout = PageLayout(CacheFormat.parse("fp32-k0-v0"), 1, 16, 16)
    x, center, gain = (torch.full((1, 16), value) for value in (1 + 2**-23, 2**-24, 1 + 2**-23))
    cache = PagedKVCache.allocate(layout, 1, k_center=center, k_gain=gain)
    append(x[None], x[None], cache, torch.tensor([0]), backend="reference")
    stored = reference.planes(cache)[0][0, 0, 0].view(torch.float32)
    difference = 1.0  # 1 + 2^-23 - 2^-24 is a tie, and 1 is even
    assert stored.tolist() == [difference * (1 + 2**-23)] * 16


def test_golden_rotation_and_swizzle() -> None:
    """A unit vector rotates to the constant 128 ** -0.5, whose bytes are known; V's segments of token 2 are stored at s
    ^ 1.
    """
    layout = PageLayout(CacheFormat.parse("int4-k128-v0"), 1, 128, 16)
    cache = PagedKVCache.allocate(layout, 1)
    cache.pages.zero_()
    k, v = torch.zeros(1, 1, 128), torch.arange(128.0).view(1, 1, 128) % 16
    k[..., 0] = 1
    append(k, v, cache, torch.tensor([2]), backend="reference")
    # A constant row c has scale fp16_up(c / 1024) = 0x05A9 and zero point -c / scale = -1023.0...
    scale = torch.tensor([128**-0.5 / 1024]).half()
    scale = scale if scale.double() >= 128**-0.5 / 1024 else torch.nextafter(scale.float(), torch.tensor([1.0])).half()
    k_meta = cache.pages.flatten()[1024 + 8 : 1024 + 12].view(torch.float16)
    assert k_meta[0].item() == pytest.approx(scale.item(), rel=2**-9)
    assert k_meta[0].item() >= 128**-0.5 / 1024
    stored = reference.planes(cache)[2][0, 0, 2].tolist()
    plain = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 8
    assert layout.swizzle(2) == 1
    assert stored == plain[16:32] + plain[:16] + plain[48:] + plain[32:48]


@pytest.mark.parametrize("codec", ["int4", "int8", "bf16", "int4v3"])
def test_a_head_of_512_is_stored_as_two_of_256(codec: str) -> None:
    wide, narrow = PageLayout(CacheFormat(codec), 2, 512, 32), PageLayout(CacheFormat(codec), 4, 256, 32)
    assert wide.rows == narrow
    assert wide.head_bytes == 2 * narrow.head_bytes, "so that blocks of layers with both need no padding"
    k, v = torch.randn(2, 40, 2, 512) * torch.rand(512) + torch.randn(512)
    pages = torch.zeros(2, *narrow.pages_shape(2), dtype=torch.uint8)
    center, gain = torch.randn(2, 512), 0.5 + torch.rand(2, 512)
    feedback = random_feedback(4, 256, "cpu") if wide.format.feeds_back else None
    caches = []
    for i, layout in enumerate((wide, narrow)):
        shape = (layout.num_kv_heads, layout.head_dim)
        vectors = {"k_center": center.view(shape), "v_center": center.view(shape), "v_gain": gain.view(shape)}
        caches.append(PagedKVCache(pages[i], layout, **vectors, k_feedback=feedback, v_feedback=feedback))
        append(k.view(40, *shape), v.view(40, *shape), caches[i], torch.arange(3, 43), backend="reference")
    assert torch.equal(pages[0], pages[1])
    assert caches[0].fingerprint() != caches[1].fingerprint(), "they are read alike, but are not pages of one model"
    with pytest.raises(FormatError, match="K rotation order: expected a divisor of 256, half of head_dim 512, got 512"):
        PageLayout(CacheFormat.parse("int4-k512-v512"), 1, 512, 16)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("codec", ["int4", "int8", "bf16", "fp32", "int2", "int3", "int4v2"])
def test_planes_fill_a_span_and_v_rows_fall_in_different_banks(head_dim: int, codec: str) -> None:
    if codec == "int3" and head_dim % 32:
        head_dim += 16
    layout = PageLayout(CacheFormat(codec), 2, head_dim, 32)
    assert layout.v_meta_offset + 32 * layout.meta_bytes == layout.span_bytes == 32 * layout.token_bytes
    assert all(
        offset % 16 == 0
        for offset in (layout.k_meta_offset, layout.v_codes_offset, layout.v_meta_offset, layout.span_bytes)
    )
    segments, rest = divmod(layout.v_row_bytes, 16)
    for s in range(segments if not rest else 0):
        for first in range(0, 32, 8):
            places = [s ^ layout.swizzle(t) for t in range(first, first + 8)]
            assert max(places) < segments
            assert (
                len({(t * segments + place) % 8 for t, place in zip(range(first, first + 8), places, strict=True)}) == 8
            )


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 15))
def test_slots_are_a_bijection_onto_page_and_offset(page: int, offset: int) -> None:
    layout = PageLayout(CacheFormat.parse("int8-k0-v0"), 2, 16, 16)
    cache = PagedKVCache.allocate(layout, 6)
    cache.pages.zero_()
    append(torch.randn(1, 2, 16), torch.randn(1, 2, 16), cache, torch.tensor([page * 16 + offset]), backend="reference")
    for plane in reference.planes(cache):
        written = plane.any(-1).any(1).nonzero().tolist()
        assert written == [[page, offset]]


def test_fingerprint_changes_with_everything_that_changes_the_bytes() -> None:
    def fingerprint(
        name: str = "int4-k64-v64",
        head_dim: int = 64,
        page_size: int = 16,
        k_center: tuple[float, ...] = (),
        **others: Any,
    ) -> str:
        layout = PageLayout(CacheFormat.parse(name), 2, head_dim, page_size)
        center = torch.stack([torch.full((2, head_dim), x) for x in k_center]) if k_center else None
        return PagedKVCache.allocate(layout, 1, k_center=center, **others).fingerprint()

    weights, step = torch.zeros(2, 64, 64, dtype=torch.int8), torch.ones(2)
    feedback = Feedback(weights, step)

    same = fingerprint("int4")
    assert same == fingerprint()
    others = [
        fingerprint("int4-k32-v64"),
        fingerprint("int4-k64-v32"),
        fingerprint("int8-k64-v64"),
        fingerprint("int4v3"),
        fingerprint(head_dim=128),
        fingerprint(page_size=32),
        fingerprint(k_center=(0.0,)),
        fingerprint(k_center=(1.0,)),
        fingerprint(k_center=(1.0, 1.0)),
        fingerprint(k_center=(1.0, 2.0)),
        fingerprint(k_gain=torch.ones(2, 64)),
        fingerprint(v_gain=torch.ones(2, 64)),
        fingerprint(v_gain=torch.ones(2, 64) * 2),
        fingerprint(k_feedback=feedback),
        fingerprint(v_feedback=feedback),
        fingerprint(k_feedback=feedback, v_feedback=feedback),
        fingerprint(k_feedback=Feedback(weights + 1, step)),
        fingerprint(k_feedback=Feedback(weights, 2 * step)),
    ]
    assert len({same, *others}) == len(others) + 1
