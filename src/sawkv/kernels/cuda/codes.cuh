// Codes of 4, 3 and 2 bits in the words that hold them, as docs/format.md specifies.
//
// A code is masked in place, in both halves of a word at once. Its 16-bit pattern *is* a float: n * 2^-24 in fp16, n *
// 2^-133 in bf16, as long as it stays below bit 11, or bit 8. A code at bit e is 2^e times as large. That factor is
// divided out of the other operand of a product, or out of its result.
#pragma once
#include "common.cuh"

namespace sawkv {

// Eight codes: a word whose halves hold four each, from the lowest bit on. In `pair(i)` they are codes i and i + 4.
template <int BITS>
struct Eight {
  // Of the BITS words of 32 channels, those that hold the codes from channel 8 * quarter on: SOURCES from `source` on
  static constexpr int SOURCES = BITS == 3 ? 3 : 1;
  static __device__ int source(int quarter) { return BITS == 4 ? quarter : BITS == 2 ? quarter / 2 : 0; }
  static __device__ Eight of(const u32* sources, int quarter);

  u32 word, high;
  __device__ explicit Eight(u32 word) : word(word), high(word >> 2 * BITS) {}
  __device__ u32 pair(int i) const { return (i < 2 ? word : high) & ((1 << BITS) - 1 << i % 2 * BITS) * 0x10001u; }
  static __host__ __device__ constexpr int exponent(int i) { return i % 2 * BITS; }
};

// The half words of V that `ldmatrix` hands out, of two tokens. `plane(i)` is the i-th code of both, in bf16. At 3 bits
// the last plane is the top bit, which belongs to a code of another channel.
template <int BITS>
struct Unit : Eight<BITS> {
  static constexpr int PLANES = 4;
  using Eight<BITS>::Eight;
  __device__ u32 plane(int i) const { return this->pair(i); }
};
template <>
struct Unit<2> {
  static constexpr int PLANES = 8;
  u32 word, high;
  __device__ explicit Unit(u32 word) : word(word), high(word >> 8) {}
  __device__ u32 plane(int i) const { return (i < 4 ? word : high) & 0x00030003u << i % 4 * 2; }
  static __host__ __device__ constexpr int exponent(int i) { return i % 4 * 2; }
};
template <>
struct Unit<3> {
  static constexpr int PLANES = 6;
  u32 word, middle, high;
  __device__ explicit Unit(u32 word) : word(word), middle(word >> 6), high(word >> 8) {}
  __device__ u32 plane(int i) const {
    return i < 2   ? word & 0x00070007u << 3 * i
           : i < 3 ? middle & 0x00070007u
                   : high & (i < 5 ? 0x000e000eu << (i - 3) * 3 : 0x00800080u);
  }
  static __host__ __device__ constexpr int exponent(int i) { return i < 2 ? 3 * i : i < 3 ? 0 : i * 3 - 8; }
};

// The words of K that hold the codes of CODES channels. `pair(i)` are channels i and i + CODES / 2, in fp16.
template <int BITS>
struct Group : Eight<BITS> {
  static constexpr int WORDS = 1, CODES = 8;
  __device__ explicit Group(const u32* words) : Eight<BITS>(words[0]) {}
};
template <>
struct Group<2> : Unit<2> {
  static constexpr int WORDS = 1, CODES = 16;
  __device__ explicit Group(const u32* words) : Unit<2>(words[0]) {}
  __device__ u32 pair(int i) const { return plane(i); }
};
template <>
struct Group<3> {
  static constexpr int WORDS = 3, CODES = 32;
  u32 words[WORDS], high[WORDS];
  // Shifted so that the top bits of the words, which are one code, come to lie at bits 6, 7 and 8
  __device__ explicit Group(const u32* from) {
#pragma unroll
    for (int w = 0; w < WORDS; w++) words[w] = from[w], high[w] = from[w] >> (9 - w);
  }
  __device__ u32 pair(int i) const {
    if (i == 15) return (high[0] & 0x00400040u) | (high[1] & 0x00800080u) | (high[2] & 0x01000100u);
    return (i % 5 < 3 ? words[i / 5] : high[i / 5]) & 0x00070007u << exponent(i);
  }
  static __host__ __device__ constexpr int exponent(int i) {
    return i == 15 ? 6 : i % 5 < 3 ? i % 5 * 3 : (i % 5 - 3) * 3 + i / 5;
  }
};

template <>
__device__ inline Eight<4> Eight<4>::of(const u32* sources, int) {
  return Eight(*sources);
}
template <>
__device__ inline Eight<2> Eight<2>::of(const u32* sources, int quarter) {
  return Eight(__byte_perm(*sources, 0, quarter % 2 ? 0x4342 : 0x4140));  // two bytes, each in a half of its own
}
template <>
__device__ inline Eight<3> Eight<3>::of(const u32* sources, int quarter) {
  const int shift = quarter / 2 * 16;  // the quarter is in these halves, with the quarter beside it
  const u32 a = sources[0] >> shift, b = sources[1] >> shift, c = sources[2] >> shift;
  const u32 ten = (a & 0x7fff) | (b & 0x7fff) << 15;  // codes, and the six after them
  const u32 six = (c & 0x7fff) | (a & 0x8000) | (b & 0x8000) << 1 | (c & 0x8000) << 2;
  const u32 eight = quarter % 2 ? ten >> 24 | six << 6 : ten;
  return Eight((eight & 0xfff) | (eight & 0xfff000) << 4);
}

}  // namespace sawkv
