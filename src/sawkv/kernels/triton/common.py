"""Functions that kernels share: the rotation, the swizzle, and three operations that the interpreter lacks."""

from __future__ import annotations

import os

import triton
import triton.language as tl

from sawkv.format import constants

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in numpy on CPU tensors, for tests."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
BUCKET_SIZE = tl.constexpr(constants.BUCKET_SIZE)


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
        return tl.dot(a, b, sums)


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
def _shift_and_mask(shift, mask):
    """PTX that handles two 16-bit words in a register."""
    return f"{{ .reg .b32 moved; shr.b32 moved, $1, {shift}; and.b32 $0, moved, {mask << 16 | mask}; }}"


@triton.jit
def codes_in(words, PLANE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Code `PLANE` of each 16-bit word, masked in place, and read as a float: n * 2^-24 in fp16, n * 2^-133 in bf16.

    Odd nibbles of a byte are not shifted, and read as 16 n (see `ODD_NIBBLE`). No conversion is needed: two words share
    a register, and take one or two instructions.
    """
    if BITS < 16:
        SHIFT: tl.constexpr = 8 if PLANE * BITS >= 8 else 0
        MASK: tl.constexpr = 0x00FF if BITS == 8 else (0x00F0 if PLANE % 2 else 0x000F)
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
