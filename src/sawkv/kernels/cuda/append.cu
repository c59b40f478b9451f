// append: center, rotate, quantize, pack and write new tokens' K and V in one launch. A block takes the K or the V of TOKENS tokens and one head.
//
// Equal to the reference byte for byte: docs/format.md fixes the order of operations. None of them may be contracted to fma but the one
// written so; there is no other product that is added to anything.
//
// Macros: HEAD_DIM, PAGE_SIZE, K_ORDER, V_ORDER, ELEMENT (of k and v).
#include "pages.cuh"

namespace sawkv {

constexpr int THREADS = 256, LANES = 4, TOKENS = THREADS / LANES;  // lanes of a row: few, since they spend their time exchanging values
constexpr float MAX_CODE = 15;

struct AppendParams {
  const ELEMENT* k;
  const ELEMENT* v;
  const float* k_center;  // [num_kv_heads][D] or null
  const float* v_center;
  const i64* slot_mapping;
  u8* pages;
  i64 page_stride;  // bytes; the other strides in elements
  i64 k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  i64 num_slots;
  int num_tokens;
};

struct Quantizer {
  float inverse, zero_point;
  u32 meta;
  bool is_finite;

  __device__ explicit Quantizer(const Row<D, LANES>& y) {
    float low = y.x[0], high = y.x[0];
    is_finite = true;
#pragma unroll
    for (int i = 0; i < y.PER_LANE; i++) {
      low = fminf(low, y.x[i]);
      high = fmaxf(high, y.x[i]);
      is_finite &= fabsf(y.x[i]) < infinity();
    }
    low = -max_over_lanes<LANES>(-low);
    high = max_over_lanes<LANES>(high);
    is_finite = max_over_lanes<LANES>(is_finite ? 0 : 1) == 0;
    const float by_range = (high - low) * (1 / MAX_CODE), by_offset = fmaxf(fabsf(low), fabsf(high)) * power_of_two(-10);
    const float bound = fminf(fmaxf(fmaxf(by_range, by_offset), power_of_two(-24)), 65504);
    u16 scale = ptx::float_to_half(bound);
    if (ptx::half_to_float(scale) < bound) scale++;  // the next fp16 up
    inverse = __frcp_rn(ptx::half_to_float(scale));
    const u16 zero_bits = ptx::float_to_half(fminf(fmaxf(__fsub_rn(0, __fmul_rn(low, inverse)), -1024), 1024));
    zero_point = ptx::half_to_float(zero_bits);
    meta = is_finite ? scale | (u32)zero_bits << 16 : 0x7e00u;
  }
  // Adding 2^23 rounds to an integer, half to even, and leaves it in the low bits. Conversions run at a quarter of the speed.
  __device__ u32 code(float y) const { return __float_as_uint(fminf(fmaxf(fmaf(y, inverse, zero_point), 0), MAX_CODE) + 8388608) & 15; }
};

template <int ORDER, bool IS_V>
__device__ inline void append_row(const AppendParams& p, const ELEMENT* x, const float* center, i64 token_stride, i64 head_stride) {
  const int token = blockIdx.x * TOKENS + threadIdx.x / LANES, head = blockIdx.y;
  const i64 slot = token < p.num_tokens ? p.slot_mapping[token] : -1;
  const bool is_kept = slot >= 0 && slot < p.num_slots;  // all lanes go on: they exchange values
  auto y = Row<D, LANES>::filled(0);
  if (is_kept) y = Row<D, LANES>::load(x + token * token_stride + head * head_stride);
  if (center && is_kept) {
    const auto c = Row<D, LANES>::load(center + head * D);
#pragma unroll
    for (int i = 0; i < y.PER_LANE; i++) y.x[i] -= c.x[i];
  }
  rotate<ORDER>(y);
  const Quantizer quantizer(y);
  if (!is_kept) return;
  const StoredRow<IS_V> stored(p.pages + slot / PAGE_SIZE * p.page_stride + head * HEAD_BYTES, slot % PAGE_SIZE);
  constexpr int VECTOR = y.VECTOR;
#pragma unroll
  for (int i = 0; i < y.PER_LANE; i += VECTOR) {
    Vector<u8, VECTOR / 2> packed;
#pragma unroll
    for (int e = 0; e < VECTOR; e += 2) packed.x[e / 2] = quantizer.is_finite ? quantizer.code(y.x[i + e]) | quantizer.code(y.x[i + e + 1]) << 4 : 0;
    *(Vector<u8, VECTOR / 2>*)stored.at(y.channel(i)) = packed;
  }
  if (y.lane() == 0) *stored.meta = quantizer.meta;
}

}  // namespace sawkv

using namespace sawkv;

extern "C" {

__device__ int sawkv_tokens_per_block = TOKENS;

__global__ void __launch_bounds__(THREADS) sawkv_append(const __grid_constant__ AppendParams p) {
  if (blockIdx.z == 0) {
    append_row<K_ORDER, false>(p, p.k, p.k_center, p.k_token_stride, p.k_head_stride);
  } else {
    append_row<V_ORDER, true>(p, p.v, p.v_center, p.v_token_stride, p.v_head_stride);
  }
}

}  // extern "C"
