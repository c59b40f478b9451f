// Shared by all kernels: constants, element types, and a row of channels spread over lanes.
#pragma once
#include "ptx.cuh"

namespace sawkv {

constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

__device__ inline int lane_index() { return threadIdx.x % WARP; }
__device__ inline int warp_index() { return threadIdx.x / WARP; }
__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// 2^exponent for exponents of normal fp32 numbers.
__device__ inline float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Element types of engines' tensors. Macros from the host choose among them (ELEMENTS in __init__.py).
struct Bfloat {
  u16 bits;
  Bfloat() = default;
  __device__ explicit Bfloat(float x) : bits(ptx::float_to_bfloat(x)) {}
  __device__ explicit operator float() const { return __uint_as_float((u32)bits << 16); }
};
struct Half {
  u16 bits;
  Half() = default;
  __device__ explicit Half(float x) : bits(ptx::float_to_half(x)) {}
  __device__ explicit operator float() const { return ptx::half_to_float(bits); }
};
__host__ __device__ constexpr int largest_power_of_two_in(int n) { return n & -n; }
__host__ __device__ constexpr bool is_power_of_two(int n) { return n > 0 && largest_power_of_two_in(n) == n; }

// N elements that one load or store moves
template <class Element, int N>
struct alignas(sizeof(Element) * N < 16 ? sizeof(Element) * N : 16) Vector {
  static_assert(is_power_of_two(N), "vectors have a power of two of elements");
  Element x[N];
};

// A row of D fp32 channels, spread over LANES neighbouring lanes so that each stage of butterflies is either within
// lanes or between pairs of lanes. In each block of LANES * VECTOR channels, lane l holds channels l * VECTOR to
// l * VECTOR + VECTOR - 1. Neighbouring lanes load and store neighbouring vectors, of 16 bytes at 16 bits per channel.
template <int D, int LANES = WARP>
struct Row {
  static_assert(D % LANES == 0 && is_power_of_two(LANES) && LANES <= WARP, "lanes hold equal parts of a row");
  static constexpr int PER_LANE = D / LANES;
  static constexpr int VECTOR = largest_power_of_two_in(PER_LANE) < 8 ? largest_power_of_two_in(PER_LANE) : 8;

  float x[PER_LANE];

  static __device__ int lane() { return threadIdx.x % LANES; }
  // The channel of this lane's element i
  static __device__ int channel(int i) { return (i / VECTOR * LANES + lane()) * VECTOR + i % VECTOR; }

  static __device__ Row filled(float value) {
    Row r;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) r.x[i] = value;
    return r;
  }
  // `p` is aligned to VECTOR elements, or to 16 bytes if that is less.
  template <class Element>
  static __device__ Row load(const Element* p) {
    Row r;
#pragma unroll
    for (int i = 0; i < PER_LANE; i += VECTOR) {
      const auto v = *(const Vector<Element, VECTOR>*)(p + channel(i));
#pragma unroll
      for (int e = 0; e < VECTOR; e++) r.x[i + e] = (float)v.x[e];
    }
    return r;
  }
  template <class Element>
  __device__ void store(Element* p) const {
#pragma unroll
    for (int i = 0; i < PER_LANE; i += VECTOR) {
      Vector<Element, VECTOR> v;
#pragma unroll
      for (int e = 0; e < VECTOR; e++) v.x[e] = Element(x[i + e]);
      *(Vector<Element, VECTOR>*)(p + channel(i)) = v;
    }
  }
  __device__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      x[i] = __fmul_rn(x[i], factor);  // never contracted to an fma: docs/format.md fixes the rounding
  }
  // The same with a factor per element
  __device__ void multiply(const Row& factors) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) x[i] = __fmul_rn(x[i], factors.x[i]);
  }
  // One stage of the Hadamard transform, on pairs that are `elements` apart within a lane
  __device__ void add_pairs(int elements) {
    const Row in = *this;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      x[i] = i & elements ? in.x[i ^ elements] - in.x[i] : in.x[i] + in.x[i ^ elements];
  }
  // this = this * own + other * weight
  __device__ void blend(float own, const Row& other, float weight) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) x[i] = x[i] * own + other.x[i] * weight;
  }
};

// Reductions of one value per lane. All of LANES neighbouring lanes get the result.
template <int LANES = WARP>
__device__ inline float max_over_lanes(float x) {
#pragma unroll
  for (int d = LANES / 2; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, d));
  return x;
}
template <int LANES = WARP>
__device__ inline float sum_over_lanes(float x) {
#pragma unroll
  for (int d = LANES / 2; d; d /= 2) x += __shfl_xor_sync(ALL_LANES, x, d);
  return x;
}

// n^-0.5, rounded once, for powers of two
__host__ __device__ constexpr float inverse_root(int n) {
  double root = 1;
  for (; n >= 4; n /= 4) root /= 2;
  return (float)(n == 2 ? root * 0.70710678118654752440 : root);
}

// Multiply by the normalized block-diagonal Hadamard matrix, in the order of operations that docs/format.md fixes.
template <int ORDER, int D, int LANES>
__device__ inline void rotate(Row<D, LANES>& row) {
  if constexpr (ORDER > 0) {
    static_assert(is_power_of_two(ORDER) && D % ORDER == 0, "orders are powers of two that divide head_dim");
    using R = Row<D, LANES>;
#pragma unroll
    for (int stride = 1; stride < ORDER; stride *= 2) {
      if (stride >= R::VECTOR && stride < LANES * R::VECTOR) {
        const int lanes = stride / R::VECTOR;
        const float sign = R::lane() & lanes ? -1 : 1;  // the product is exact
#pragma unroll
        for (int i = 0; i < R::PER_LANE; i++)
          row.x[i] = fmaf(row.x[i], sign, __shfl_xor_sync(ALL_LANES, row.x[i], lanes));
      } else {
        row.add_pairs(stride < R::VECTOR ? stride : stride / LANES);
      }
    }
    row.scale(inverse_root(ORDER));
  }
}

}  // namespace sawkv
