// The CPU backend's kernels: plain C++ with GCC/Clang vector extensions and OpenMP, called through ctypes with the
// structs at the end.
//
// Reading order: vectors -> one row (rotate, encode, decode) -> one tile of tokens (scores, softmax, weighted values)
// -> work items -> entry points. After a row is decoded to fp32, all formats share the same arithmetic, so equal values
// give equal bits whatever they were stored as. Compiled with -ffp-contract=off: the only fused operations are those
// written as fma, as docs/format.md requires.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// -------------------------------------------------------------------------------------------------
// vectors

constexpr int W = 8;  // fp32 lanes of a vector; the compiler joins or splits them for other widths
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec splat(float x) { return vec{x, x, x, x, x, x, x, x}; }
// The three operations that compilers do not make of portable code.
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
inline vec max(vec a, vec b) { return a > b ? a : b; }
inline vec min(vec a, vec b) { return a < b ? a : b; }
inline vec round_even(vec a) {  // adding 1.5 * 2^23 leaves no fraction bits; exact for |a| < 2^22
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

// -------------------------------------------------------------------------------------------------
// float types

enum DType : int32_t { kBf16, kFp16, kFp32 };

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

// -------------------------------------------------------------------------------------------------
// a cache

constexpr int kMaxHeadDim = 256;
constexpr int kSegment = 16;

enum Codec : int32_t { kInt4, kInt8, kCodecBf16, kCodecFp16, kCodecFp32 };

// Mirrors sawkv.cache.Constants: what K or V is written and read with. Pointers are null where there is nothing.
struct Constants {
  const float *center, *gain, *gain_inverse;  // [num_kv_heads, head_dim]
  const int8_t* weights;                      // of the feedback: [num_kv_heads, head_dim, head_dim]
  const float* step;                          // [num_kv_heads]
};

// Mirrors sawkv.format.layout.PageLayout; docs/format.md explains the fields.
struct Cache {
  uint8_t* pages;
  int64_t page_stride, num_pages;
  int32_t codec, num_kv_heads, head_dim, page_size, row_bytes, meta_bytes, k_order, v_order, swizzle_multiplier,
      swizzle_period;
  Constants k, v;

  uint8_t* span(int64_t page, int head) const {
    return pages + page * page_stride + int64_t(head) * page_size * 2 * (row_bytes + meta_bytes);
  }
  int64_t v_offset() const { return int64_t(page_size) * (row_bytes + meta_bytes); }
  int swizzle(int offset) const { return (offset * swizzle_multiplier / 8) % swizzle_period; }
};

// -------------------------------------------------------------------------------------------------
// a row

// Block-diagonal normalized Hadamard product, in the order of operations that the format fixes.
void rotate(float* x, int head_dim, int order) {
  if (!order) return;
  for (int stride = 1; stride < order; stride *= 2)
    for (int start = 0; start < head_dim; start += 2 * stride)
      for (int i = start; i < start + stride; ++i) {
        const float a = x[i], b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
  const float norm = float(1 / std::sqrt(double(order)));
  for (int i = 0; i < head_dim; ++i) x[i] *= norm;
}

// x *= factors, those of a head.
void multiply(float* x, int head_dim, const float* factors, int head) {
  for (int d = 0; d < head_dim; ++d) x[d] *= factors[head * head_dim + d];
}

// Undo rotation, gain and centering of a row.
void restore(float* x, int head_dim, int order, const Constants& constants, int head) {
  rotate(x, head_dim, order);
  if (constants.gain_inverse) multiply(x, head_dim, constants.gain_inverse, head);
  if (constants.center)
    for (int d = 0; d < head_dim; ++d) x[d] += constants.center[head * head_dim + d];
}

struct Meta {
  uint16_t scale, zero_point;
};

// The smallest fp16 at or above x, for 0 < x <= 65504.
inline uint16_t fp16_up(float x) {
  const uint16_t nearest = to_fp16(x);
  return nearest + (from_fp16(nearest) < x);
}

constexpr float kErrorSteps = 64;  // in one code

inline float round_clamped(float x, float low, float high) { return std::nearbyint(std::min(std::max(low, x), high)); }

// Codes of a finite row, with the errors of each block of channels passed on to the blocks after it: docs/format.md,
// step 5. t: the codes before rounding. weights: [head_dim, head_dim], of one head.
void code_with_feedback(float* t, int head_dim, float max_code, const int8_t* weights, float step, uint8_t* codes) {
  alignas(32) int16_t errors[kMaxHeadDim] = {};  // of 8 bits, which multiply faster as 16; zero where not coded yet
  for (int start = 0; start < head_dim; start += 32) {
    const int end = std::min(start + 32, head_dim);
    for (int first = start; first < start + 8; ++first) {  // of a block, which is one of each eight channels
      for (int j = first; j < end; j += 8) {
        int32_t taken = 0;
        for (int i = 0; i < end; ++i) taken += int32_t(weights[j * head_dim + i]) * errors[i];
        t[j] = __builtin_fmaf(float(taken), step, t[j]);
      }
      for (int j = first; j < end; j += 8) {
        const float code = round_clamped(t[j], 0, max_code);
        codes[j] = uint8_t(code);
        errors[j] = int16_t(round_clamped((t[j] - code) * kErrorSteps, -127, 127));
      }
    }
  }
}

// Codes of a row of 4- or 8-bit integers, one in a byte, and their scale and zero point. weights: of the head's
// feedback, or null.
Meta quantize(const float* y, int head_dim, int max_code, const int8_t* weights, float step, uint8_t* codes) {
  if (!all_finite(y, head_dim)) {
    std::memset(codes, 0, head_dim);
    return {0x7E00, 0};
  }
  vec low = load(y), high = load(y);
  for (int i = 0; i < head_dim; i += W) {
    low = min(low, load(y + i));
    high = max(high, load(y + i));
  }
  float lo = low[0], hi = high[0];
  for (int j = 1; j < W; ++j) lo = std::min(lo, low[j]), hi = std::max(hi, high[j]);
  // With feedback the cells of the codes cover the range, and without it the codes do.
  const float by_range = (hi - lo) * float(1.0 / (weights ? max_code + 1 : max_code));
  const float by_offset = std::max(std::fabs(lo), std::fabs(hi)) * 0x1p-10f;
  const float wanted = std::max(std::max(by_range, by_offset), 0x1p-24f);
  const uint16_t scale = fp16_up(std::min(wanted, 65504.f));
  const float inv = 1.f / from_fp16(scale);
  const uint16_t zero_point = to_fp16(std::min(std::max((weights ? -0.5f : 0.f) - lo * inv, -1024.f), 1024.f));
  const vec inv_v = splat(inv), zero_v = splat(from_fp16(zero_point)), top = splat(float(max_code));
  if (weights && wanted <= 65504.f) {
    alignas(32) float t[kMaxHeadDim];
    for (int i = 0; i < head_dim; i += W) store(t + i, fma(load(y + i), inv_v, zero_v));
    code_with_feedback(t, head_dim, float(max_code), weights, step, codes);
    return {scale, zero_point};
  }
  for (int i = 0; i < head_dim; i += W) {
    const vec shifted =
        min(max(fma(load(y + i), inv_v, zero_v), splat(-1.f)), top);  // clamping first keeps round_even in its range
    const ivec code = __builtin_convertvector(max(round_even(shifted), splat(0.f)), ivec);
    for (int j = 0; j < W; ++j) codes[i + j] = uint8_t(code[j]);
  }
  return {scale, zero_point};
}

// Position of a row's byte `b`: segments of V rows are XORed with the token's swizzle, those of K rows (swizzle 0) are
// in order.
inline int place(int b, int swizzle) { return b ^ (swizzle * kSegment); }

void encode_row(const Cache& cache, float* y, const Constants& constants, int head, uint8_t* row, uint8_t* meta_out,
                int swizzle) {
  const int n = cache.head_dim;
  alignas(32) uint8_t bytes[4 * kMaxHeadDim], codes[kMaxHeadDim];
  if (cache.codec <= kInt8) {
    const int8_t* weights = constants.weights ? constants.weights + int64_t(head) * n * n : nullptr;
    const Meta meta =
        quantize(y, n, cache.codec == kInt4 ? 15 : 255, weights, weights ? constants.step[head] : 0, codes);
    std::memcpy(meta_out, &meta, 4);
    if (cache.codec == kInt4)
      for (int i = 0; i < n / 2; ++i) bytes[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
    else
      std::memcpy(bytes, codes, n);
  } else {
    write_floats(y, DType(cache.codec - kCodecBf16), n, bytes);
  }
  for (int b = 0; b < cache.row_bytes; b += kSegment)
    std::memcpy(row + place(b, swizzle), bytes + b, std::min(kSegment, cache.row_bytes - b));
}

template <int CODEC>
inline void decode_row(const Cache& cache, const uint8_t* row, const uint8_t* meta, int swizzle, float* out) {
  if (CODEC <= kInt8) {
    Meta m;
    std::memcpy(&m, meta, 4);
    const vec scale = splat(from_fp16(m.scale)), zero = splat(from_fp16(m.zero_point));
    for (int b = 0; b < cache.row_bytes; b += 8) {
      const uint8_t* codes = row + place(b, swizzle);
      if (CODEC == kInt4) {
        vec first, second;
        nibbles_to_float(codes, first, second);
        store(out + 2 * b, (first - zero) * scale);
        store(out + 2 * b + W, (second - zero) * scale);
      } else {
        store(out + b, (bytes_to_float(codes) - zero) * scale);
      }
    }
  } else {
    constexpr DType dtype = DType(CODEC - kCodecBf16);
    constexpr int size = dtype == kFp32 ? 4 : 2;
    for (int b = 0; b < cache.row_bytes; b += kSegment)
      read_floats(row + place(b, swizzle), dtype, kSegment / size, out + b / size);
  }
}

// `count` tokens of one sequence from position `first`, K and V, as fp32 rows of `head_dim`.
template <int CODEC>
void decode_tokens(const Cache& cache, const int32_t* pages, int head, int first, int count, float* k, float* v) {
  for (int t = 0; t < count; ++t) {
    const int offset = (first + t) % cache.page_size;
    const uint8_t* span = cache.span(pages[(first + t) / cache.page_size], head);
    const int64_t row = int64_t(offset) * cache.row_bytes,
                  meta = int64_t(cache.page_size) * cache.row_bytes + offset * cache.meta_bytes;
    if (k) decode_row<CODEC>(cache, span + row, span + meta, 0, k + t * cache.head_dim);
    span += cache.v_offset();
    if (v) decode_row<CODEC>(cache, span + row, span + meta, cache.swizzle(offset), v + t * cache.head_dim);
  }
}

using DecodeTokens = void (*)(const Cache&, const int32_t*, int, int, int, float*, float*);
DecodeTokens decode_tokens_of(int codec) {
  switch (codec) {
    case kInt4:
      return decode_tokens<kInt4>;
    case kInt8:
      return decode_tokens<kInt8>;
    case kCodecBf16:
      return decode_tokens<kCodecBf16>;
    case kCodecFp16:
      return decode_tokens<kCodecFp16>;
    default:
      return decode_tokens<kCodecFp32>;
  }
}

// What append counts of the rows of K or V, in the order of sawkv.format.counters.COLUMNS.
struct Counts {
  double rows, non_finite_rows, saturated_rows, squared_error, squared_norm, sampled_rows;
};

inline void add(Counts& to, const Counts& from) {
  to.rows += from.rows;
  to.non_finite_rows += from.non_finite_rows;
  to.saturated_rows += from.saturated_rows;
  to.squared_error += from.squared_error;
  to.squared_norm += from.squared_norm;
  to.sampled_rows += from.sampled_rows;
}

constexpr uint16_t kNanScale = 0x7E00, kMaxScale = 0x7BFF;  // fp16
constexpr uint32_t kSample = 1024;

// Counts the row `y` after it was written to `slot`. Mirrors sawkv.format.counters.is_sampled and kernels.reference.
void count_row(const Cache& cache, const float* y, const uint8_t* meta, int64_t slot, int head, bool is_v,
               Counts& counts) {
  const bool quantized = cache.codec <= kInt8, sampled = uint32_t(slot) * 2654435761u < (1ull << 32) / kSample;
  uint16_t scale = 0;
  if (quantized) std::memcpy(&scale, meta, 2);
  alignas(32) float stored[kMaxHeadDim];
  if (sampled || !quantized) {
    const int32_t page = int32_t(slot / cache.page_size);
    decode_tokens_of(cache.codec)(cache, &page, head, int(slot % cache.page_size), 1, is_v ? nullptr : stored,
                                  is_v ? stored : nullptr);
  }
  const bool finite = quantized ? scale != kNanScale : all_finite(stored, cache.head_dim),
             saturated = scale == kMaxScale;
  counts.rows += 1;
  counts.non_finite_rows += !finite;
  counts.saturated_rows += saturated;
  if (!sampled || !finite || saturated) return;
  counts.sampled_rows += 1;
  for (int d = 0; d < cache.head_dim; ++d) {
    const double error = stored[d] - y[d];
    counts.squared_error += error * error;
    counts.squared_norm += double(y[d]) * y[d];
  }
}

// -------------------------------------------------------------------------------------------------
// attention over one tile

constexpr int kTile = 32;  // tokens decoded at once; at head_dim 128, K and V of a tile fill a 32 KiB L1 cache
constexpr int kRows = 64;  // query rows (tokens x heads of a group) that a work item aims at
constexpr int kMaxRows =
    128;  // and the most it can have: the largest group of heads; kernels/cpu/__init__.py checks it
constexpr int kSplit =
    1024;  // tokens a work item covers where queries are few; fixed, so that a result depends on no other sequence
constexpr int kMaxSplitQueries = 8;  // more query tokens than this and the queries themselves give enough items

// What attention over part of the keys leaves: softmax maximum and sum, and the weighted values, for each row.
struct Partial {
  float* max;
  float* sum;
  float* values;  // [rows, head_dim]
};

// scores[r][t] = q[r] . k[t] for R rows and T tokens; each dot product has the same order of operations for any R and
// T.
template <int R, int T>
inline void dot_block(const float* q, const float* k, int head_dim, float* scores) {
  vec acc[R][T] = {};
  for (int d = 0; d < head_dim; d += W) {
    vec b[T];
    for (int t = 0; t < T; ++t) b[t] = load(k + t * head_dim + d);
    for (int r = 0; r < R; ++r) {
      const vec a = load(q + r * head_dim + d);
      for (int t = 0; t < T; ++t) acc[r][t] = fma(a, b[t], acc[r][t]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) scores[r * kTile + t] = sum(acc[r][t]);
}

// values[r] += sum over t of p[r][t] v[t], in the order of t.
template <int R>
inline void weigh_block(const float* p, const float* v, int first, int last, int head_dim, float* values) {
  for (int d = 0; d < head_dim; d += 2 * W) {
    vec acc[R][2];
    for (int r = 0; r < R; ++r)
      acc[r][0] = load(values + r * head_dim + d), acc[r][1] = load(values + r * head_dim + d + W);
    for (int t = first; t < last; ++t) {
      const vec v0 = load(v + t * head_dim + d), v1 = load(v + t * head_dim + d + W);
      for (int r = 0; r < R; ++r) {
        const vec w = splat(p[r * kTile + t]);
        acc[r][0] = fma(w, v0, acc[r][0]);
        acc[r][1] = fma(w, v1, acc[r][1]);
      }
    }
    for (int r = 0; r < R; ++r)
      store(values + r * head_dim + d, acc[r][0]), store(values + r * head_dim + d + W, acc[r][1]);
  }
}

struct Rows {              // the query rows of a work item
  const float* q;          // [count, head_dim], gain undone, rotated, times the softmax scale
  float offset[kMaxRows];  // with a soft-cap alone: what centering took from each row's scores
  int count;
  int first[kMaxRows], last[kMaxRows];  // keys that each row sees: positions first to last - 1
};

// Online softmax over the tile of `count` tokens that starts at position `start`.
void attend_tile(const Rows& rows, const float* k, const float* v, int start, int count, int head_dim, float softcap,
                 Partial out) {
  alignas(32) float p[kMaxRows * kTile];
  const int padded = (count + 3) / 4 * 4;  // k has room for padding; its scores are hidden below
  int r = 0;
  for (; r + 4 <= rows.count; r += 4)
    for (int t = 0; t < padded; t += 2)
      dot_block<4, 2>(rows.q + r * head_dim, k + t * head_dim, head_dim, p + r * kTile + t);
  for (; r + 2 <= rows.count; r += 2)
    for (int t = 0; t < padded; t += 4)
      dot_block<2, 4>(rows.q + r * head_dim, k + t * head_dim, head_dim, p + r * kTile + t);
  for (; r < rows.count; ++r)
    for (int t = 0; t < padded; t += 4)
      dot_block<1, 4>(rows.q + r * head_dim, k + t * head_dim, head_dim, p + r * kTile + t);

  int first[kMaxRows], last[kMaxRows];
  bool all_see_all = true;
  for (r = 0; r < rows.count; ++r) {
    first[r] = std::min(std::max(rows.first[r] - start, 0), count);
    last[r] = std::max(std::min(rows.last[r] - start, count), first[r]);
    all_see_all &= first[r] == 0 && last[r] == count;
  }
  // Rows are weighed several at once, with weight 0 for what one of them does not see. That hides all values but NaN
  // and infinity.
  const bool together = all_see_all || all_finite(v, count * head_dim);
  for (r = 0; r < rows.count; ++r) {
    float* row = p + r * kTile;
    if (softcap > 0)
      for (int t = first[r]; t < last[r]; ++t) row[t] = softcap * std::tanh((row[t] + rows.offset[r]) / softcap);
    for (int t = 0; t < first[r]; ++t) row[t] = -INFINITY;
    for (int t = last[r]; t < kTile; ++t) row[t] = -INFINITY;
    if (first[r] == last[r]) {
      std::memset(row, 0, sizeof(float) * kTile);
      continue;
    }
    vec high = splat(out.max[r]);
    for (int t = 0; t < kTile; t += W) high = max(load(row + t), high);  // in this order NaN is passed over
    float m = high[0];
    for (int j = 1; j < W; ++j) m = std::max(m, high[j]);
    if (m == -INFINITY) m = 0;  // every score is NaN or -inf
    const float shrink = std::exp(out.max[r] - m);
    vec total = splat(0.f);
    for (int t = 0; t < kTile; t += W) {
      const vec e = exp(load(row + t) - splat(m));
      store(row + t, e);
      total += e;
    }
    out.max[r] = m;
    out.sum[r] = out.sum[r] * shrink + sum(total);
    if (shrink != 1)
      for (int d = 0; d < head_dim; d += W)
        store(out.values + r * head_dim + d, load(out.values + r * head_dim + d) * splat(shrink));
  }
  for (r = 0; r < rows.count;) {
    const float* row = p + r * kTile;
    float* values = out.values + r * head_dim;
    if (together && r + 4 <= rows.count) {
      const int lo = *std::min_element(first + r, first + r + 4), hi = *std::max_element(last + r, last + r + 4);
      weigh_block<4>(row, v, lo, hi, head_dim, values);
      r += 4;
    } else if (together && r + 2 <= rows.count) {
      weigh_block<2>(row, v, std::min(first[r], first[r + 1]), std::max(last[r], last[r + 1]), head_dim, values);
      r += 2;
    } else {
      weigh_block<1>(row, v, first[r], last[r], head_dim, values);
      r += 1;
    }
  }
}

}  // namespace

// -------------------------------------------------------------------------------------------------
// entry points

extern "C" {

struct AppendArguments {
  Cache cache;
  const void *k, *v;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;  // bytes
  const int64_t* slots;
  Counts* counters;  // of K and of V, or null
  int64_t num_slots;
  int32_t dtype, num_threads;
};

namespace {

void append_token(const AppendArguments& a, int64_t token, Counts counts[2]) {
  const Cache& cache = a.cache;
  const int64_t slot = a.slots[token];
  if (slot < 0 || slot >= cache.num_pages * cache.page_size) return;
  const int offset = int(slot % cache.page_size);
  const int64_t row = int64_t(offset) * cache.row_bytes,
                meta = int64_t(cache.page_size) * cache.row_bytes + offset * cache.meta_bytes;
  alignas(32) float y[kMaxHeadDim];
  for (int head = 0; head < cache.num_kv_heads; ++head) {
    uint8_t* span = cache.span(slot / cache.page_size, head);
    for (int is_v = 0; is_v < 2; ++is_v) {
      const char* x = is_v ? static_cast<const char*>(a.v) + token * a.v_token_stride + head * a.v_head_stride
                           : static_cast<const char*>(a.k) + token * a.k_token_stride + head * a.k_head_stride;
      const Constants& constants = is_v ? cache.v : cache.k;
      read_floats(x, DType(a.dtype), cache.head_dim, y);
      if (constants.center)
        for (int d = 0; d < cache.head_dim; ++d) y[d] -= constants.center[head * cache.head_dim + d];
      if (constants.gain) multiply(y, cache.head_dim, constants.gain, head);
      rotate(y, cache.head_dim, is_v ? cache.v_order : cache.k_order);
      encode_row(cache, y, constants, head, span + row, span + meta, is_v ? cache.swizzle(offset) : 0);
      if (a.counters) count_row(cache, y, span + meta, slot, head, is_v, counts[is_v]);
      span += cache.v_offset();
    }
  }
}

}  // namespace

void sawkv_append(const AppendArguments* a) {
#pragma omp parallel num_threads(a->num_threads) if (a -> num_slots > 4)
  {
    Counts counts[2] = {};
#pragma omp for schedule(static)
    for (int64_t token = 0; token < a->num_slots; ++token) append_token(*a, token, counts);
    if (a->counters) {
#pragma omp critical
      for (int is_v = 0; is_v < 2; ++is_v) add(a->counters[is_v], counts[is_v]);
    }
  }
}

struct AttentionArguments {
  Cache cache;
  const void* q;
  void* out;
  int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;  // bytes
  const int32_t* block_table;
  int64_t block_table_stride;  // entries
  const int32_t *seq_lens, *query_start;
  float* lse;          // [tokens, num_q_heads] or null
  const float* sinks;  // [num_q_heads] or null
  int32_t num_seqs, num_q_heads, sliding_window, dtype, num_threads;
  float softmax_scale, softcap;
};

namespace {

struct Item {
  int seq, head, query, num_queries;  // query tokens `query` to `query + num_queries - 1` of the sequence
  int split, num_splits;              // which part of the keys
  int64_t partial;                    // index of its first row among the partial results
};

const char* query_row(const AttentionArguments& a, int64_t token, int head) {
  return static_cast<const char*>(a.q) + token * a.q_token_stride + head * a.q_head_stride;
}

// What centering K took from all scores of a query row.
float center_score(const AttentionArguments& a, int64_t token, int head, int kv_head) {
  const int head_dim = a.cache.head_dim;
  if (!a.cache.k.center) return 0;
  alignas(32) float q[kMaxHeadDim];
  read_floats(query_row(a, token, head), DType(a.dtype), head_dim, q);
  vec total = splat(0.f);
  for (int d = 0; d < head_dim; d += W)
    total = fma(load(q + d), load(a.cache.k.center + kv_head * head_dim + d), total);
  return sum(total) * a.softmax_scale;
}

// Rows of an item are ordered by query token, then by head of the group.
void load_rows(const AttentionArguments& a, const Item& item, int group, float* q, Rows& rows) {
  const Cache& cache = a.cache;
  const int length = a.seq_lens[item.seq], num_queries = a.query_start[item.seq + 1] - a.query_start[item.seq];
  rows.q = q;
  rows.count = item.num_queries * group;
  for (int r = 0; r < rows.count; ++r) {
    const int query = item.query + r / group, head = item.head * group + r % group;
    const int64_t token = a.query_start[item.seq] + query;
    float* y = q + r * cache.head_dim;
    read_floats(query_row(a, token, head), DType(a.dtype), cache.head_dim, y);
    if (cache.k.gain_inverse) multiply(y, cache.head_dim, cache.k.gain_inverse, item.head);
    rotate(y, cache.head_dim, cache.k_order);
    for (int d = 0; d < cache.head_dim; ++d) y[d] *= a.softmax_scale;
    rows.offset[r] = a.softcap > 0 ? center_score(a, token, head, item.head) : 0;
    rows.last[r] = std::max(length - num_queries + query + 1, 0);
    rows.first[r] = a.sliding_window ? std::max(rows.last[r] - a.sliding_window, 0) : 0;
  }
}

void attend_item(const AttentionArguments& a, const Item& item, int group, DecodeTokens decode, Partial out) {
  const Cache& cache = a.cache;
  const int head_dim = cache.head_dim;
  alignas(32) static thread_local float q[kMaxRows * kMaxHeadDim], k[(kTile + 4) * kMaxHeadDim], v[kTile * kMaxHeadDim];
  Rows rows;
  load_rows(a, item, group, q, rows);
  std::fill_n(out.max, rows.count, -INFINITY);
  std::fill_n(out.sum, rows.count, 0.f);
  std::fill_n(out.values, rows.count * head_dim, 0.f);
  int begin = *std::min_element(rows.first, rows.first + rows.count),
      end = *std::max_element(rows.last, rows.last + rows.count);
  if (item.num_splits > 1) {
    begin = std::max(begin, item.split * kSplit);
    end = std::min(end, (item.split + 1) * kSplit);
  }
  const int32_t* pages = a.block_table + item.seq * a.block_table_stride;
  for (int start = begin / kTile * kTile; start < end; start += kTile) {
    const int count = std::min(kTile, end - start);
    decode(cache, pages, item.head, start, count, k, v);
    std::fill_n(k + count * head_dim, 4 * head_dim, 0.f);
    attend_tile(rows, k, v, start, count, head_dim, a.softcap, out);
  }
}

// Joins the parts of one query row, adds the sink, un-rotates and writes.
void finish_row(const AttentionArguments& a, const Item& item, int row, int group, const Partial* parts) {
  const Cache& cache = a.cache;
  const int head_dim = cache.head_dim, head = item.head * group + row % group;
  const int64_t token = a.query_start[item.seq] + item.query + row / group;
  float m = -INFINITY;
  for (int s = 0; s < item.num_splits; ++s) m = std::max(m, parts[s].max[row]);
  const float key_max = m;
  // Scores under a soft-cap are whole already. Others lack the same number each, which only a sink and the log-sum-exp
  // see.
  const float offset = a.softcap == 0 && (a.sinks || a.lse) ? center_score(a, token, head, item.head) : 0;
  const float sink = a.sinks ? a.sinks[head] - offset : -INFINITY;
  m = std::max(m, sink);
  alignas(32) float values[kMaxHeadDim] = {};
  float total = 0;
  for (int s = 0; s < item.num_splits; ++s) {
    if (parts[s].max[row] == -INFINITY) continue;
    const float factor = std::exp(parts[s].max[row] - m);
    total += parts[s].sum[row] * factor;
    for (int d = 0; d < head_dim; ++d) values[d] += parts[s].values[row * head_dim + d] * factor;
  }
  const float with_sink = total + (a.sinks ? std::exp(sink - m) : 0.f);
  const bool sees_nothing = key_max == -INFINITY;
  for (int d = 0; d < head_dim; ++d) values[d] = sees_nothing ? 0.f : values[d] / with_sink;
  rotate(values, head_dim, cache.v_order);
  if (cache.v.gain_inverse) multiply(values, head_dim, cache.v.gain_inverse, item.head);
  if (cache.v.center && !sees_nothing)
    for (int d = 0; d < head_dim; ++d) values[d] += cache.v.center[item.head * head_dim + d] * (total / with_sink);
  write_floats(values, DType(a.dtype), head_dim,
               static_cast<char*>(a.out) + token * a.out_token_stride + head * a.out_head_stride);
  if (a.lse) a.lse[token * a.num_q_heads + head] = with_sink == 0 ? -INFINITY : m + std::log(with_sink) + offset;
}

}  // namespace

void sawkv_attention(const AttentionArguments* args) {
  const AttentionArguments& a = *args;
  const Cache& cache = a.cache;
  const int group = a.num_q_heads / cache.num_kv_heads, queries_at_once = std::max(1, kRows / group);
  std::vector<Item> items;
  int64_t num_rows = 0;
  for (int seq = 0; seq < a.num_seqs; ++seq) {
    const int num_queries = a.query_start[seq + 1] - a.query_start[seq], length = a.seq_lens[seq];
    const int num_splits = num_queries > kMaxSplitQueries ? 1 : std::max(1, (length + kSplit - 1) / kSplit);
    for (int query = num_queries; query > 0; query -= queries_at_once)  // the last queries see most: they come first
      for (int head = 0; head < cache.num_kv_heads; ++head)
        for (int split = 0; split < num_splits; ++split) {
          const int first = std::max(0, query - queries_at_once);
          items.push_back({seq, head, first, query - first, split, num_splits, num_rows});
          num_rows += (query - first) * group;
        }
  }
  std::vector<float> stats(2 * num_rows);
  std::vector<float> values(num_rows * cache.head_dim + W);
  const DecodeTokens decode = decode_tokens_of(cache.codec);
  auto partial = [&](const Item& item) {
    return Partial{stats.data() + 2 * item.partial, stats.data() + 2 * item.partial + item.num_queries * group,
                   values.data() + item.partial * cache.head_dim};
  };
  const int64_t num_items = int64_t(items.size());
#pragma omp parallel num_threads(a.num_threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_items; ++i) attend_item(a, items[i], group, decode, partial(items[i]));
#pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < num_items; ++i) {
      if (items[i].split) continue;
      std::vector<Partial> parts;
      for (int s = 0; s < items[i].num_splits; ++s) parts.push_back(partial(items[i + s]));
      for (int row = 0; row < items[i].num_queries * group; ++row) finish_row(a, items[i], row, group, parts.data());
    }
  }
}

struct GatherArguments {
  Cache cache;
  const int32_t* block_table;
  int64_t block_table_stride;  // entries
  const int32_t *seq_lens, *starts;
  void *k, *v;  // [max_tokens, num_kv_heads, head_dim]
  int64_t max_tokens;
  int32_t num_seqs, dtype, num_threads, rotated;
};

void sawkv_gather(const GatherArguments* args) {
  const GatherArguments& a = *args;
  const Cache& cache = a.cache;
  const DecodeTokens decode = decode_tokens_of(cache.codec);
  const DType dtype = DType(a.dtype);
  std::vector<std::pair<int, int>> pages;  // (sequence, index of page)
  for (int seq = 0; seq < a.num_seqs; ++seq)
    for (int page = 0; page * cache.page_size < a.seq_lens[seq]; ++page) pages.emplace_back(seq, page);
  const int64_t num_pages = int64_t(pages.size());
#pragma omp parallel for num_threads(a.num_threads) schedule(static)
  for (int64_t i = 0; i < num_pages; ++i) {
    const auto [seq, page] = pages[i];
    alignas(32) float k[kMaxHeadDim], v[kMaxHeadDim];
    const int first = page * cache.page_size, last = std::min(first + cache.page_size, a.seq_lens[seq]);
    for (int t = first; t < last && a.starts[seq] + t < a.max_tokens; ++t)
      for (int head = 0; head < cache.num_kv_heads; ++head) {
        decode(cache, a.block_table + seq * a.block_table_stride, head, t, 1, k, v);
        const int64_t at = ((int64_t(a.starts[seq]) + t) * cache.num_kv_heads + head) * cache.head_dim * size_of(dtype);
        if (!a.rotated) {
          restore(k, cache.head_dim, cache.k_order, cache.k, head);
          restore(v, cache.head_dim, cache.v_order, cache.v, head);
        }
        write_floats(k, dtype, cache.head_dim, static_cast<char*>(a.k) + at);
        write_floats(v, dtype, cache.head_dim, static_cast<char*>(a.v) + at);
      }
  }
}

}  // extern "C"
