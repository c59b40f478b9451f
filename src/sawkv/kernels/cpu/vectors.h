// Vectors of fp32, and conversions from and to the float types of rows.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int W = 8;  // fp32 lanes per vector; the compiler joins or splits vectors for other widths
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec splat(float x) { return vec{x, x, x, x, x, x, x, x}; }
// Three operations for which compilers find no good instructions in portable code.
inline vec fma(vec a, vec b, vec c) {
#ifdef __FMA__
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}
inline vec bytes_to_float(const uint8_t* p) {
#ifdef __AVX2__
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vec v;
  for (int i = 0; i < W; ++i) v[i] = p[i];
  return v;
#endif
}
inline void nibbles_to_float(const uint8_t* p, vec& first, vec& second) {  // 8 bytes, low nibbles first
#ifdef __AVX2__
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
  const __m128i bytes = _mm_unpacklo_epi8(_mm_and_si128(raw, mask), _mm_and_si128(_mm_srli_epi16(raw, 4), mask));
  first = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  second = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes)));
#else
  for (int i = 0; i < W; ++i) {
    first[i] = (p[i / 2] >> (4 * (i % 2))) & 15;
    second[i] = (p[4 + i / 2] >> (4 * (i % 2))) & 15;
  }
#endif
}
// Codes of eight words: `mask` of each, above its lowest `shift` bits.
inline vec codes_to_float(uvec words, uvec shifts, uint32_t mask) {
  return __builtin_convertvector(ivec((words >> shifts) & mask), vec);
}
inline void twos_to_float(uint32_t word, vec& first, vec& second) {
  const uvec words = {word, word, word, word, word, word, word, word}, shifts = {0, 2, 4, 6, 8, 10, 12, 14};
  first = codes_to_float(words, shifts, 3);
  second = codes_to_float(words, shifts + 16, 3);
}
// 32 codes of 3 bits: 16 in the low halves of three words, five in each and the bits of the last one on top, and 16 in
// the high halves.
inline void threes_to_float(uint32_t a, uint32_t b, uint32_t c, vec values[4]) {
  const uint32_t tops = (a >> 15 & 0x10001) | (b >> 14 & 0x20002) | (c >> 13 & 0x40004);
  const uvec first_shifts = {0, 3, 6, 9, 12, 0, 3, 6}, second_shifts = {9, 12, 0, 3, 6, 9, 12, 0};
  const uvec first = {a, a, a, a, a, b, b, b}, second = {b, b, c, c, c, c, c, tops};
  for (int half = 0; half < 2; ++half) {
    values[2 * half] = codes_to_float(first >> 16 * half, first_shifts, 7);
    values[2 * half + 1] = codes_to_float(second >> 16 * half, second_shifts, 7);
  }
}
inline vec max(vec a, vec b) { return a > b ? a : b; }
inline vec min(vec a, vec b) { return a < b ? a : b; }
inline vec round_even(vec a) {  // adding 1.5 * 2^23 leaves no bits for a fraction; exact for |a| < 2^22
  const vec magic = splat(12582912.f);
  return (a + magic) - magic;
}
inline float sum(vec v) {
  typedef float half __attribute__((vector_size(2 * W)));
  half h[2];
  std::memcpy(h, &v, sizeof v);
  const half s = h[0] + h[1];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

inline bool all_finite(const float* p, int n) {
  vec zero = splat(0.f);
  for (int i = 0; i < n; i += W) zero += load(p + i) - load(p + i);  // NaN where not finite
  return sum(zero) == 0;
}

// e^x, to about 2 units in the last place; 0 below -87, NaN for NaN.
inline vec exp(vec x) {
  const ivec tiny = x < splat(-87.f);
  x = x < splat(-87.f) ? splat(-87.f) : x;
  x = x > splat(88.f) ? splat(88.f) : x;
  const vec n = round_even(x * splat(1.44269504088896341f));
  vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.f);
  const ivec bits = (__builtin_convertvector(n, ivec) + 127) << 23;
  vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return tiny ? splat(0.f) : p * scale;
}

enum DType : int32_t { kBf16, kFp16, kFp32 };  // in the order of DTYPES in __init__.py

inline float bits_to_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}
inline float from_bf16(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }
inline uint16_t to_bf16(float f) {
  const uint32_t b = float_to_bits(f);
  if (f != f) return 0x7FC0;
  return uint16_t((b + 0x7FFF + ((b >> 16) & 1)) >> 16);
}
#ifdef __F16C__  // older compilers have no half type in C++
inline float from_fp16(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t to_fp16(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float from_fp16(uint16_t h) {
  _Float16 x;
  std::memcpy(&x, &h, 2);
  return float(x);
}
inline uint16_t to_fp16(float f) {
  const _Float16 x = _Float16(f);
  uint16_t h;
  std::memcpy(&h, &x, 2);
  return h;
}
#endif

inline void read_floats(const void* p, DType dtype, int n, float* out) {
  const uint16_t* h = static_cast<const uint16_t*>(p);
  if (dtype == kBf16) {
    for (int i = 0; i < n; ++i) out[i] = from_bf16(h[i]);
  } else if (dtype == kFp16) {
    for (int i = 0; i < n; ++i) out[i] = from_fp16(h[i]);
  } else {
    std::memcpy(out, p, 4 * n);
  }
}
inline void write_floats(const float* x, DType dtype, int n, void* p) {
  uint16_t* h = static_cast<uint16_t*>(p);
  if (dtype == kBf16) {
    for (int i = 0; i < n; ++i) h[i] = to_bf16(x[i]);
  } else if (dtype == kFp16) {
    for (int i = 0; i < n; ++i) h[i] = to_fp16(x[i]);
  } else {
    std::memcpy(p, x, 4 * n);
  }
}
inline int size_of(DType dtype) { return dtype == kFp32 ? 4 : 2; }

}  // namespace
