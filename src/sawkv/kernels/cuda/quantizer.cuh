// The scale, zero point and codes of a row.
//
// Macros: those of pages.cuh, and FEEDBACK.
#pragma once
#include "format_constants.h"
#include "pages.cuh"

namespace sawkv {

using namespace format;

constexpr int LANES = 4;  // per row: few, because lanes spend most time on exchanging values

constexpr float ROUNDER =
    12582912;  // 1.5 * 2^23: adding it rounds to an integer, half to even, and leaves it in the low bits

// For the counters: sums over a lane's channels of squared errors, in codes, and of squared values.
struct Sums {
  float error, norm;
};

// Turns a row into codes. With feedback and below 4 bits, the row's range is covered by the cells of the codes, else by
// the codes themselves. The constructor may change the row.
template <int BITS>
struct Quantizer {
  static constexpr float MAX_CODE = (1 << BITS) - 1;
  float inverse, zero_point;
  u32 meta;
  bool is_bounded;  // finite, and the scale does not saturate

  Quantizer() = default;
  __device__ Quantizer(Row<D, LANES>& y, bool has_feedback) {
    float low, high;
    if (!FEEDBACK || !find_range_of_both_signs(y, low, high)) {
      low = high = y.x[0];
#pragma unroll
      for (int i = 1; i < y.PER_LANE; i++) low = ptx::min_or_nan(low, y.x[i]), high = ptx::max_or_nan(high, y.x[i]);
#pragma unroll
      for (int d = LANES / 2; d; d /= 2) {
        low = ptx::min_or_nan(low, __shfl_xor_sync(ALL_LANES, low, d));
        high = ptx::max_or_nan(high, __shfl_xor_sync(ALL_LANES, high, d));
      }
    }
    const bool is_finite = fabsf(low) < infinity() && fabsf(high) < infinity(), has_cells = has_feedback || BITS < 4;
    const float by_range = (high - low) * (has_cells ? 1 / (MAX_CODE + 1) : 1 / MAX_CODE),
                by_offset = fmaxf(fabsf(low), fabsf(high)) * (1 / MAX_ZERO_POINT);
    const float wanted = fmaxf(fmaxf(by_range, by_offset), MIN_SCALE), bound = fminf(wanted, MAX_SCALE);
    u16 scale = ptx::float_to_half(bound);
    if (ptx::half_to_float(scale) < bound) scale++;  // the next fp16 up
    inverse = __frcp_rn(ptx::half_to_float(scale));
    const u16 zero_bits = ptx::float_to_half(
        fminf(fmaxf(__fsub_rn(has_cells ? -0.5f : 0, __fmul_rn(low, inverse)), -MAX_ZERO_POINT), MAX_ZERO_POINT));
    zero_point = ptx::half_to_float(zero_bits);
    meta = is_finite ? scale | (u32)zero_bits << 16 : (u32)NAN_SCALE_BITS;
    is_bounded = is_finite && wanted <= MAX_SCALE;
    if (!is_bounded) {  // rare: codes need clamping, or are all 0, so the row is replaced by its codes
#pragma unroll
      for (int i = 0; i < y.PER_LANE; i++)
        y.x[i] = is_finite ? fminf(fmaxf(fmaf(y.x[i], inverse, zero_point), 0), MAX_CODE) : 0;
      inverse = 1;
      zero_point = 0;
    }
  }
  // N codes, and nothing else. Conversion instructions would run at a quarter of the speed.
  template <int N>
  __device__ u32 codes(const float* y) const {
    u32 packed = 0;
#pragma unroll
    for (int i = N - 1; i >= 0; i--) packed = (packed << BITS) + shifted(y[i]) - __float_as_uint(ROUNDER);
    return packed;
  }

  __device__ Sums sums(const Row<D, LANES>& y) const {
    Sums sums{};
#pragma unroll
    for (int i = 0; i < y.PER_LANE; i++) {
      const float wanted = fmaf(y.x[i], inverse, zero_point);
      const float error = clamped(wanted) + ROUNDER - ROUNDER - wanted;
      sums.error += error * error;
      sums.norm += y.x[i] * y.x[i];
    }
    return sums;
  }
  // The same of other codes, eight to a word
  __device__ Sums sums(const Row<D, LANES>& y, const u32 (&codes)[D / 32]) const {
    Sums sums{};
#pragma unroll
    for (int i = 0; i < y.PER_LANE; i++) {
      const int code = codes[i / 8] >> BITS * (i % 8) & (1 << BITS) - 1;
      const float error = code - fmaf(y.x[i], inverse, zero_point);
      sums.error += error * error;
      sums.norm += y.x[i] * y.x[i];
    }
    return sums;
  }

 private:
  // Of rows that hold values of both signs, by instructions for integers that take three. Among floats as signed
  // integers, the largest is the largest positive one; unsigned, the largest is that of the negative ones with the
  // largest magnitude, NaN included.
  static __device__ bool find_range_of_both_signs(const Row<D, LANES>& y, float& low, float& high) {
    int top = __float_as_int(y.x[0]);
    u32 bottom = __float_as_uint(y.x[0]);
#pragma unroll
    for (int i = 1; i + 1 < y.PER_LANE; i += 2) {
      top = max(max(top, __float_as_int(y.x[i])), __float_as_int(y.x[i + 1]));
      bottom = max(max(bottom, __float_as_uint(y.x[i])), __float_as_uint(y.x[i + 1]));
    }
    top = max(top, __float_as_int(y.x[y.PER_LANE - 1]));
    bottom = max(bottom, __float_as_uint(y.x[y.PER_LANE - 1]));
#pragma unroll
    for (int d = LANES / 2; d; d /= 2) {
      top = max(top, __shfl_xor_sync(ALL_LANES, top, d));
      bottom = max(bottom, __shfl_xor_sync(ALL_LANES, bottom, d));
    }
    high = __int_as_float(top);
    low = __uint_as_float(bottom);
    return __all_sync(ALL_LANES, top >= 0 && (int)bottom < 0);
  }
  // With codes at both ends of the range no clamp is needed, because an unrounded one lies between -0.26 and 15.26.
  static __device__ float clamped(float x) { return BITS < 4 ? fminf(fmaxf(x, 0), MAX_CODE) : x; }
  __device__ u32 shifted(float y) const { return __float_as_uint(clamped(fmaf(y, inverse, zero_point)) + ROUNDER); }
};

}  // namespace sawkv
