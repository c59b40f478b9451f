// Encodes, decodes and counts one row of a page.
#pragma once
#include <algorithm>

#include "format_constants.h"
#include "vectors.h"

namespace {

using namespace sawkv::format;

static_assert(CODEC_FP16 - CODEC_BF16 == kFp16 && CODEC_FP32 - CODEC_BF16 == kFp32,
              "float codecs are in DType's order");

// How rows of K or of V are stored, with their constants (sawkv.cache.Constants). A pointer is null where the cache has
// no such constant.
struct Side {
  const float* center;        // [num_buckets, num_kv_heads, head_dim]; V has one bucket
  const float* gain;          // [num_kv_heads, head_dim]
  const float* gain_inverse;  // likewise
  const int8_t* weights;      // of the feedback: [num_kv_heads, head_dim, head_dim]
  const float* step;          // [num_kv_heads]
  int32_t codec, row_bytes, order;
};

// Pages and their layout (sawkv.format.layout.PageLayout). docs/format.md explains the fields.
struct Cache {
  uint8_t* pages;
  int64_t page_stride, num_pages;
  int32_t num_kv_heads, head_dim, page_size, meta_bytes, swizzle_multiplier, swizzle_period;
  int32_t parts;        // rows per head: each is stored as a head of its own
  int32_t num_buckets;  // of positions that have a center of K
  Side k, v;
};

// `head` counts parts.
inline uint8_t* span_of(const Cache& cache, int64_t page, int head) {
  return cache.pages + page * cache.page_stride +
         int64_t(head) * cache.page_size * (cache.k.row_bytes + cache.v.row_bytes + 2 * cache.meta_bytes);
}
inline int64_t v_offset(const Cache& cache) {
  return int64_t(cache.page_size) * (cache.k.row_bytes + cache.meta_bytes);
}
// Of the row and the meta of the token at `offset` of a page, from the plane of K's codes or of V's.
inline int64_t row_offset(const Side& side, int offset) { return int64_t(offset) * side.row_bytes; }
inline int64_t meta_offset(const Cache& cache, const Side& side, int offset) {
  return int64_t(cache.page_size) * side.row_bytes + offset * cache.meta_bytes;
}
inline int swizzle_of(const Cache& cache, int offset) {
  return (offset * cache.swizzle_multiplier / 8) % cache.swizzle_period;
}

// The bucket of a position. The last one holds all later positions.
inline int bucket_at(const Cache& cache, int64_t position) {
  return int(std::max<int64_t>(std::min<int64_t>(position / BUCKET_SIZE, cache.num_buckets - 1), 0));
}
// Where the vectors of a bucket start.
inline int64_t of_bucket(const Cache& cache, int bucket) {
  return int64_t(bucket) * cache.num_kv_heads * cache.head_dim;
}

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

// x *= factors, with one head's factors.
void multiply(float* x, int head_dim, const float* factors, int head) {
  for (int d = 0; d < head_dim; ++d) x[d] *= factors[head * head_dim + d];
}

void add(float* x, int head_dim, const float* terms, int head) {
  for (int d = 0; d < head_dim; ++d) x[d] += terms[head * head_dim + d];
}

// Undo rotation and gain of a row.
void restore(float* x, int head_dim, const Side& side, int head) {
  rotate(x, head_dim, side.order);
  if (side.gain_inverse) multiply(x, head_dim, side.gain_inverse, head);
}

struct Meta {
  uint16_t scale, zero_point;
};

// The smallest fp16 at or above x, for 0 < x <= MAX_SCALE.
inline uint16_t fp16_up(float x) {
  const uint16_t nearest = to_fp16(x);
  return nearest + (from_fp16(nearest) < x);
}

inline float round_clamped(float x, float low, float high) { return std::nearbyint(std::min(std::max(low, x), high)); }

// Codes of a finite row with feedback, which passes the errors of each block of channels on to later blocks:
// docs/format.md, step 5. t: the codes before rounding. weights: [head_dim, head_dim], of one head.
void code_with_feedback(float* t, int head_dim, float max_code, const int8_t* weights, float step, uint8_t* codes) {
  alignas(32) int16_t errors[MAX_HEAD_DIM] = {};  // 8-bit errors, in 16 bits, which multiply faster; 0 until coded
  for (int start = 0; start < head_dim; start += 32) {
    const int end = std::min(start + 32, head_dim);
    for (int first = start; first < start + 8; ++first) {  // one block: every eighth channel
      for (int j = first; j < end; j += 8) {
        int32_t taken = 0;
        for (int i = 0; i < end; ++i) taken += int32_t(weights[j * head_dim + i]) * errors[i];
        t[j] = __builtin_fmaf(float(taken), step, t[j]);
      }
      for (int j = first; j < end; j += 8) {
        const float code = round_clamped(t[j], 0, max_code);
        codes[j] = uint8_t(code);
        errors[j] = int16_t(round_clamped((t[j] - code) * float(ERROR_STEPS), -MAX_WEIGHT, MAX_WEIGHT));
      }
    }
  }
}

// 2- to 8-bit codes of a row, one per byte, with scale and zero point. weights: the head's feedback weights, or null.
Meta quantize(const float* y, int head_dim, int max_code, const int8_t* weights, float step, uint8_t* codes) {
  if (!all_finite(y, head_dim)) {
    std::memset(codes, 0, head_dim);
    return {NAN_SCALE_BITS, 0};
  }
  vec low = load(y), high = load(y);
  for (int i = 0; i < head_dim; i += W) {
    low = min(low, load(y + i));
    high = max(high, load(y + i));
  }
  float lo = low[0], hi = high[0];
  for (int j = 1; j < W; ++j) lo = std::min(lo, low[j]), hi = std::max(hi, high[j]);
  // With feedback, and below 4 bits, the range is covered by the cells of the codes, else by the codes themselves.
  const bool cells = weights || max_code < 15;
  const float by_range = (hi - lo) * float(1.0 / (cells ? max_code + 1 : max_code));
  const float by_offset = std::max(std::fabs(lo), std::fabs(hi)) * (1 / MAX_ZERO_POINT);
  const float wanted = std::max(std::max(by_range, by_offset), MIN_SCALE);
  const uint16_t scale = fp16_up(std::min(wanted, MAX_SCALE));
  const float inv = 1.f / from_fp16(scale);
  const uint16_t zero_point =
      to_fp16(std::min(std::max((cells ? -0.5f : 0.f) - lo * inv, -MAX_ZERO_POINT), MAX_ZERO_POINT));
  const vec inv_v = splat(inv), zero_v = splat(from_fp16(zero_point)), top = splat(float(max_code));
  if (weights && wanted <= MAX_SCALE) {
    alignas(32) float t[MAX_HEAD_DIM];
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
inline int place(int b, int swizzle) { return b ^ (swizzle * SEGMENT_BYTES); }

// 16 codes of 3 bits in the low halves of three words: five in each, and the bits of the last one on top.
inline void pack_3(const uint8_t* codes, uint32_t words[3]) {
  for (int i = 0; i < 3; ++i) {
    words[i] = uint32_t(codes[15] >> i & 1) << 15;
    for (int j = 0; j < 5; ++j) words[i] |= uint32_t(codes[5 * i + j]) << 3 * j;
  }
}

// Codes of a row, one per byte, as they are stored.
void pack(const uint8_t* codes, int head_dim, int codec, uint8_t* bytes) {
  if (codec == CODEC_INT8) {
    std::memcpy(bytes, codes, head_dim);
  } else if (codec == CODEC_INT4) {
    for (int i = 0; i < head_dim / 2; ++i) bytes[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
  } else if (codec == CODEC_INT2) {
    for (int i = 0; i < head_dim / 4; ++i)
      bytes[i] = uint8_t(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6);
  } else {
    for (int first = 0; first < head_dim; first += 32) {
      uint32_t low[3], high[3];
      pack_3(codes + first, low);
      pack_3(codes + first + 16, high);
      for (int i = 0; i < 3; ++i) low[i] |= high[i] << 16;
      std::memcpy(bytes + first / 32 * 12, low, 12);
    }
  }
}

void encode_row(const Cache& cache, float* y, const Side& side, int head, uint8_t* row, uint8_t* meta_out,
                int swizzle) {
  const int n = cache.head_dim;
  alignas(32) uint8_t bytes[4 * MAX_HEAD_DIM], codes[MAX_HEAD_DIM];
  if (side.codec <= CODEC_INT8) {
    const int8_t* weights = side.weights ? side.weights + int64_t(head) * n * n : nullptr;
    const int bits = side.row_bytes * 8 / n;
    const Meta meta = quantize(y, n, (1 << bits) - 1, weights, weights ? side.step[head] : 0, codes);
    std::memcpy(meta_out, &meta, 4);
    pack(codes, n, side.codec, bytes);
  } else {
    write_floats(y, DType(side.codec - CODEC_BF16), n, bytes);
  }
  for (int b = 0; b < side.row_bytes; b += SEGMENT_BYTES)
    std::memcpy(row + place(b, swizzle), bytes + b, std::min(SEGMENT_BYTES, side.row_bytes - b));
}

// A word of a row, at its byte `b`.
inline uint32_t word_at(const uint8_t* row, int b, int swizzle) {
  uint32_t word;
  std::memcpy(&word, row + place(b, swizzle), 4);
  return word;
}

template <int CODEC>
inline void decode_row(const Side& side, const uint8_t* row, const uint8_t* meta, int swizzle, float* out) {
  if (CODEC <= CODEC_INT8) {
    Meta m;
    std::memcpy(&m, meta, 4);
    const vec scale = splat(from_fp16(m.scale)), zero = splat(from_fp16(m.zero_point));
    constexpr int step = CODEC == CODEC_INT2 ? 4 : CODEC == CODEC_INT3 ? 12 : 8;  // bytes
    for (int b = 0; b < side.row_bytes; b += step) {
      const uint8_t* codes = row + place(b, swizzle);
      if (CODEC == CODEC_INT2) {
        vec first, second;
        twos_to_float(word_at(row, b, swizzle), first, second);
        store(out + 4 * b, (first - zero) * scale);
        store(out + 4 * b + W, (second - zero) * scale);
      } else if (CODEC == CODEC_INT3) {
        vec values[4];
        threes_to_float(word_at(row, b, swizzle), word_at(row, b + 4, swizzle), word_at(row, b + 8, swizzle), values);
        for (int i = 0; i < 4; ++i) store(out + b / 12 * 32 + i * W, (values[i] - zero) * scale);
      } else if (CODEC == CODEC_INT4) {
        vec first, second;
        nibbles_to_float(codes, first, second);
        store(out + 2 * b, (first - zero) * scale);
        store(out + 2 * b + W, (second - zero) * scale);
      } else {
        store(out + b, (bytes_to_float(codes) - zero) * scale);
      }
    }
  } else {
    constexpr DType dtype = DType(CODEC - CODEC_BF16);
    constexpr int size = dtype == kFp32 ? 4 : 2;
    for (int b = 0; b < side.row_bytes; b += SEGMENT_BYTES)
      read_floats(row + place(b, swizzle), dtype, SEGMENT_BYTES / size, out + b / size);
  }
}

// Decodes K and V of `count` tokens of one sequence, from position `first`, to fp32 rows of `head_dim`.
template <int K_CODEC, int V_CODEC>
void decode_tokens(const Cache& cache, const int32_t* pages, int head, int first, int count, float* k, float* v) {
  const int part_dim = cache.head_dim / cache.parts;
  for (int t = 0; t < count; ++t) {
    const int offset = (first + t) % cache.page_size;
    for (int part = 0; part < cache.parts; ++part) {
      const uint8_t* span = span_of(cache, pages[(first + t) / cache.page_size], head * cache.parts + part);
      const int at = t * cache.head_dim + part * part_dim;
      if (k)
        decode_row<K_CODEC>(cache.k, span + row_offset(cache.k, offset), span + meta_offset(cache, cache.k, offset), 0,
                            k + at);
      span += v_offset(cache);
      if (v)
        decode_row<V_CODEC>(cache.v, span + row_offset(cache.v, offset), span + meta_offset(cache, cache.v, offset),
                            swizzle_of(cache, offset), v + at);
    }
  }
}

using DecodeTokens = void (*)(const Cache&, const int32_t*, int, int, int, float*, float*);
struct Decoder {
  int k_codec, v_codec;
  DecodeTokens decode;
};
template <int K_CODEC, int V_CODEC = K_CODEC>
constexpr Decoder kDecoder = {K_CODEC, V_CODEC, decode_tokens<K_CODEC, V_CODEC>};

// Of formats with one codec, and of those of sawkv.format.spec.NARROWER_V.
constexpr Decoder kDecoders[] = {kDecoder<CODEC_INT4>,
                                 kDecoder<CODEC_INT3>,
                                 kDecoder<CODEC_INT2>,
                                 kDecoder<CODEC_INT4, CODEC_INT3>,
                                 kDecoder<CODEC_INT4, CODEC_INT2>,
                                 kDecoder<CODEC_INT3, CODEC_INT2>,
                                 kDecoder<CODEC_INT8>,
                                 kDecoder<CODEC_BF16>,
                                 kDecoder<CODEC_FP16>,
                                 kDecoder<CODEC_FP32>};

DecodeTokens decode_tokens_of(const Cache& cache) {
  for (const Decoder& known : kDecoders)
    if (known.k_codec == cache.k.codec && known.v_codec == cache.v.codec) return known.decode;
  return nullptr;  // Python refuses other formats
}

inline void add(Counts& to, const Counts& from) {
  to.rows += from.rows;
  to.non_finite_rows += from.non_finite_rows;
  to.saturated_rows += from.saturated_rows;
  to.squared_error += from.squared_error;
  to.squared_norm += from.squared_norm;
  to.sampled_rows += from.sampled_rows;
}

// Counts the row `y` after it was written to `slot`. Mirrors sawkv.format.counters.is_sampled and kernels.reference.
void count_row(const Cache& cache, const float* y, const uint8_t* meta, int64_t slot, int head, bool is_v,
               Counts& counts) {
  const bool quantized = cache.k.codec <= CODEC_INT8, sampled = uint32_t(slot) * SAMPLE_HASH < (1ull << 32) / SAMPLE;
  uint16_t scale = 0;
  if (quantized) std::memcpy(&scale, meta, 2);
  alignas(32) float stored[MAX_HEAD_DIM];
  if (sampled || !quantized) {
    const int32_t page = int32_t(slot / cache.page_size);
    decode_tokens_of(cache)(cache, &page, head, int(slot % cache.page_size), 1, is_v ? nullptr : stored,
                            is_v ? stored : nullptr);
  }
  const bool finite = quantized ? scale != NAN_SCALE_BITS : all_finite(stored, cache.head_dim),
             saturated = scale == MAX_SCALE_BITS;
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

}  // namespace
