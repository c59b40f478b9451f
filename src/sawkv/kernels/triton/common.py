"""Functions that kernels share: the rotation, the swizzle, and three operations that the interpreter lacks."""

from __future__ import annotations

import os

import triton
import triton.language as tl

from sawkv.format import constants
from sawkv.kernels.constants import CLEARED_ROWS as cleared_rows

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in numpy on CPU tensors, for tests."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NO_SCORE = tl.constexpr(-1e30)
BUCKET_SIZE = tl.constexpr(constants.BUCKET_SIZE)
CLEARED_ROWS = tl.constexpr(cleared_rows)


@triton.jit
def bucket_of(position, num_buckets):
    """The bucket of each position. The last one holds all later positions."""
    return tl.minimum(tl.maximum(position // BUCKET_SIZE, 0), num_buckets - 1)


@triton.jit
def rotate(y, ORDER: tl.constexpr):
    """Rows [R, WIDTH] fp32, WIDTH a power of two, times the normalized block-diagonal Hadamard matrix, in the order of
    operations of docs/format.md. Padding channels form blocks of their own, so zeros stay zeros.
    """
    R: tl.constexpr = y.shape[0]
    WIDTH: tl.constexpr = y.shape[1]
    for i in tl.static_range(8):
        if (1 << i) < ORDER:
            pairs = tl.permute(tl.reshape(y, (R, WIDTH // (2 << i), 2, 1 << i)), (0, 1, 3, 2))
            a, b = tl.split(pairs)
            y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (R, WIDTH))
    if ORDER > 0:
        y = y * (ORDER**-0.5)
    return y


@triton.jit
def swizzled(column, offset, SEGMENT: tl.constexpr, MULTIPLIER: tl.constexpr, PERIOD: tl.constexpr):
    """Place of V's element `column` in the row at `offset` of a page. SEGMENT elements are 16 bytes. See
    `PageLayout.swizzle`.
    """
    if PERIOD > 1:
        column = ((column // SEGMENT) ^ (offset * MULTIPLIER // 8 % PERIOD)) * SEGMENT + column % SEGMENT
    return column


@triton.jit
def low_half(word):
    """The low 16 bits of int32 words, an fp16, as fp32."""
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(word):
    return ((word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def multiply(a, b, sums):
    """a @ b + sums. The interpreter would read bf16 as integers."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), sums)
    else:
        return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def widen(x):
    """16-bit floats as fp32. The interpreter misreads bf16's subnormals."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round fp32 to the nearest 16-bit float, half to even. The interpreter truncates, and the compiler converts bf16
    one value at a time.
    """
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return tl.where(x == x, bits >> 16, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return x.to(DTYPE)


@triton.constexpr_function
def planes_of(bits):
    """Planes of a row of codes: the places that a code may have in a 16-bit word. At 3 bits the last one is the top
    bit, which belongs to the code of another channel.
    """
    return 6 if bits == 3 else 16 // bits


@triton.constexpr_function
def columns_of(part, bits):
    """Words of 16 bits in a row of `part` channels, and padding up to a power of two that products take."""
    return max(16, part // 4 if bits == 3 else part * bits // 16)


@triton.constexpr_function
def _shift_of(plane, bits):
    """Bits by which a word is shifted to the right, so that its code lies below bit 8."""
    return 6 if (bits, plane) == (3, 2) else plane * bits // 8 * 8


@triton.constexpr_function
def exponent_of(plane, bits):
    """The bit at which a plane's codes lie after that: they read as 2^exponent n."""
    return 0 if bits == 16 else plane * bits - _shift_of(plane, bits)


@triton.jit
def place_of(channel, PART: tl.constexpr, BITS: tl.constexpr):
    """A channel's place in a row in the order of parts and planes.

    At 3 bits the last of every 16 channels has three, in the last plane: this one, and those 2 and 4 further. They hold
    the bits of its code, the lowest first.
    """
    PLANES: tl.constexpr = planes_of(BITS)
    COLUMNS: tl.constexpr = columns_of(PART, BITS)
    if BITS == 3:
        i = channel % 16
        unit = channel % PART // 32 * 6 + channel // 16 % 2 + tl.where(i < 15, i // 5 * 2, 0)
        return channel // PART * (PLANES * COLUMNS) + tl.where(i < 15, i % 5, 5) * COLUMNS + unit
    else:
        return channel // PART * (PLANES * COLUMNS) + channel % PLANES * COLUMNS + channel % PART // PLANES


@triton.constexpr_function
def _shift_and_mask(shift, mask):
    """PTX that handles two 16-bit words in a register."""
    return f"{{ .reg .b32 moved; shr.b32 moved, $1, {shift}; and.b32 $0, moved, {mask << 16 | mask}; }}"


@triton.jit
def codes_in(words, PLANE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Code `PLANE` of each 16-bit word, masked in place, and read as a float: n * 2^-24 in fp16, n * 2^-133 in bf16,
    times 2^exponent (`exponent_of`). No conversion is needed: two words share a register, and take one or two
    instructions.
    """
    if BITS < 16:
        SHIFT: tl.constexpr = _shift_of(PLANE, BITS)
        WIDTH: tl.constexpr = 1 if BITS == 3 and PLANE == 5 else BITS
        MASK: tl.constexpr = ((1 << WIDTH) - 1) << exponent_of(PLANE, BITS)
        if INTERPRETED:
            words = (words >> SHIFT) & MASK
        else:
            words = tl.inline_asm_elementwise(
                _shift_and_mask(SHIFT, MASK),
                "=r,r",
                [words],
                dtype=tl.uint16,
                is_pure=True,
                pack=2,
            )
    return words.to(DTYPE, bitcast=True)
