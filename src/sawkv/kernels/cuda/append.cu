// append: center, multiply by gains, rotate, quantize, pack and write K and V of new tokens in one launch. A block
// handles K or V of TOKENS tokens and one head.
//
// Bytes equal the reference's: docs/format.md fixes the order of operations. The compiler must not contract any of them
// to an fma, except the one that is written as fma. Products with gains and norms use __fmul_rn, which is never
// contracted.
//
// Macros: those of pages.cuh, K_ORDER, V_ORDER, ELEMENT (of k and v); 1 or 0: GAIN and FEEDBACK (of K or V, or both),
// COUNT (update the counters), BY_BUCKET (K has a center per position bucket).
#include "format_constants.h"
#include "pages.cuh"

namespace sawkv {

using namespace format;

constexpr int THREADS = 128, LANES = 4,
              TOKENS = THREADS / LANES;  // LANES per row: few, because lanes spend most time on exchanging values

struct AppendParams {
  const i64* slot_mapping;
  u8* pages;
  double* counters;                     // [2][NUM_COLUMNS], or null without COUNT
  const ELEMENT* x[2];                  // of K and of V, like all pairs below
  const float* center[2];               // [num_kv_heads][D] or null; K with BY_BUCKET: [num_buckets] of them
  const float* gain[2];                 // [num_kv_heads][D] or null
  const u8* weights[2];                 // of feedback, signed: [num_kv_heads][D][D] or null
  const float* step[2];                 // [num_kv_heads]
  i64 token_stride[2], head_stride[2];  // in elements
  i64 page_stride;                      // bytes
  i64 num_slots;
  int num_tokens, num_buckets;
  const i64* positions;  // of tokens; read with BY_BUCKET
};

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

  __device__ Quantizer(Row<D, LANES>& y, bool has_feedback) {
    float low = y.x[0], high = y.x[0];
#pragma unroll
    for (int i = 1; i < y.PER_LANE; i++) low = ptx::min_or_nan(low, y.x[i]), high = ptx::max_or_nan(high, y.x[i]);
#pragma unroll
    for (int d = LANES / 2; d; d /= 2) {
      low = ptx::min_or_nan(low, __shfl_xor_sync(ALL_LANES, low, d));
      high = ptx::max_or_nan(high, __shfl_xor_sync(ALL_LANES, high, d));
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

  // Replace the row by its codes, and pass the errors of each block of channels on to later blocks: docs/format.md,
  // step 5. The sums of weights * errors are products of 8-bit integer matrices, with the warp's eight rows as rows and
  // four blocks of channels as 16 columns. A lane holds one channel of each block, and its errors are its own part of
  // the next operand, so no value moves between lanes. One product adds the errors of all earlier columns. The errors
  // within the four blocks are added as soon as each block is coded.
  __device__ Sums feed_back(Row<D, LANES>& y, const u8* weights, float step) {
    static_assert(LANES == 4 && Row<D, LANES>::VECTOR == 8, "a lane holds a channel of each block");
    const int lane = lane_index(), column = lane / 4, quad = lane % 4;
    if (!is_bounded) step = 0;
    Sums sums{};
#pragma unroll
    for (int i = 0; i < y.PER_LANE; i++) sums.norm += y.x[i] * y.x[i];  // here, to free y's registers
    u32 errors[D / 32][2] = {};                                         // of eight blocks, four per word
#pragma unroll
    for (int four = 0; four < D / 16; four++) {  // groups of four blocks
      const int zero = __float_as_int(ROUNDER);  // adding an integer below 2^22 to these bits converts it to float
      int taken[2][4] = {{zero, zero}, {zero, zero}};
      u32 own_weights[2];  // for errors within these four blocks
#pragma unroll
      for (int k = 0; k <= four / 2; k++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int channel = four / 2 * 32 + column / 2 * 8 + four % 2 * 4 + half * 2 + column % 2;
          const uint2 w = *(const uint2*)(weights + channel * D + k * 32 + quad * 8);
          if (k == four / 2) own_weights[half] = four % 2 ? w.y : w.x;
          if (k < four / 2)
            ptx::mma_int8(taken[half], errors[k], w);
          else if (four % 2)
            ptx::mma_int8(taken[half], errors[k][0], w.x);
        }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float sum = __int_as_float(taken[i / 2][i % 2]) - ROUNDER;
        float& x = y.x[4 * four + i];
        const float wanted = fmaf(x, inverse, zero_point), moved = fmaf(sum, step, wanted);
        const float code = fminf(fmaxf(moved, 0), MAX_CODE) + ROUNDER - ROUNDER;
        constexpr float MAX_ERROR = (float)MAX_WEIGHT / ERROR_STEPS;  // in codes
        const float error = fmaf(fminf(fmaxf(moved - code, -MAX_ERROR), MAX_ERROR), ERROR_STEPS, ROUNDER);
        const u32 passed =
            __byte_perm(__float_as_uint(error), 0, 0x4444 ^ 4 << 4 * i);  // its low byte in byte i, 0 in the others
        errors[four / 2][four % 2] |= passed;
#pragma unroll
        for (int half = (i + 1) / 2; half < 2; half++)
          if (i < 3) ptx::mma_int8(taken[half], passed, own_weights[half]);
        sums.error += (code - wanted) * (code - wanted);
        x = code;
      }
    }
    inverse = 1;
    zero_point = 0;
    return sums;
  }

 private:
  // With codes at both ends of the range no clamp is needed, because an unrounded one lies between -0.26 and 15.26.
  static __device__ float clamped(float x) { return BITS < 4 ? fminf(fmaxf(x, 0), MAX_CODE) : x; }
  __device__ u32 shifted(float y) const { return __float_as_uint(clamped(fmaf(y, inverse, zero_point)) + ROUNDER); }
};

__device__ inline bool is_sampled(i64 slot) { return (u32)slot * SAMPLE_HASH < (1ull << 32) / SAMPLE; }

// Counts a row before it is written. All threads of a block must call it. Mirrors sawkv.format.counters and the
// reference.
__device__ inline void count_row(const AppendParams& p, bool is_v, u32 meta, Sums sums, i64 slot, bool is_kept,
                                 bool is_first_lane) {
  double* counters = p.counters + (is_v ? NUM_COLUMNS : 0);
  if (blockIdx.y == 0) {  // once for all heads, which keep the same tokens
    const int kept = __syncthreads_count(is_kept && is_first_lane);
    if (threadIdx.x == 0) atomicAdd(&counters[COLUMN_ROWS], (double)kept * gridDim.y);
  }
  if (!is_kept) return;
  const u32 scale_bits = meta & 0xffff;
  const bool is_finite = scale_bits != NAN_SCALE_BITS, is_saturated = scale_bits == MAX_SCALE_BITS;
  if ((!is_finite || is_saturated) && is_first_lane)
    atomicAdd(&counters[is_finite ? COLUMN_SATURATED_ROWS : COLUMN_NON_FINITE_ROWS], 1.0);
  if (!is_finite || is_saturated || !is_sampled(slot)) return;
  const double scale = ptx::half_to_float(scale_bits);
  atomicAdd(&counters[COLUMN_SQUARED_ERROR], sums.error * scale * scale);
  atomicAdd(&counters[COLUMN_SQUARED_NORM], (double)sums.norm);
  if (is_first_lane) atomicAdd(&counters[COLUMN_SAMPLED_ROWS], 1.0);
}

// Writes the codes of a row. The lane has eight channels of each 32. All four lanes of a row must call it.
template <int BITS>
__device__ inline void store_codes(const StoredRow<BITS>& stored, const Quantizer<BITS>& quantizer,
                                   const Row<D, LANES>& y, bool is_kept) {
  using R = Row<D, LANES>;
  static_assert(LANES == 4 && R::VECTOR == 8, "a lane has a quarter of every 32 channels");
#pragma unroll
  for (int i = 0; i < R::PER_LANE; i += R::VECTOR) {
    if constexpr (BITS == 3) {
      // 16 channels are the lanes' low halves of three words, five codes in each and the sixteenth's bits on top.
      const u32 own = quantizer.template codes<8>(&y.x[i]), other = __shfl_xor_sync(ALL_LANES, own, 1);
      const bool is_odd = R::lane() % 2;
      const u64 half = is_odd ? (u64)own << 24 | other : (u64)other << 24 | own;
      const u64 other_half = __shfl_xor_sync(ALL_LANES, half, 2);
      const u64 low = R::lane() < 2 ? half : other_half, high = R::lane() < 2 ? other_half : half;
      const int word = R::lane();  // of each 32 channels; the fourth lane stores nothing
      const auto sixteen = [&](u64 codes) {
        return (u32)(codes >> 15 * word) & 0x7fff | (u32)(codes >> (45 + word) & 1) << 15;
      };
      if (is_kept && word < 3) *(u32*)stored.at((i / R::VECTOR * BITS + word) * 4) = sixteen(low) | sixteen(high) << 16;
    } else {
      constexpr int PER_BYTE = 8 / BITS;
      Vector<u8, R::VECTOR / PER_BYTE> packed;
#pragma unroll
      for (int e = 0; e < R::VECTOR; e += PER_BYTE)
        packed.x[e / PER_BYTE] = quantizer.template codes<PER_BYTE>(&y.x[i + e]);
      *(Vector<u8, R::VECTOR / PER_BYTE>*)stored.at(y.channel(i) / PER_BYTE) = packed;
    }
  }
}

// K and V share one instance if their orders and bits are equal: the code is long, and fetching instructions takes time
// too.
template <int ORDER, int BITS>
__device__ inline void append_row(const AppendParams& p, bool is_v) {
  const int token = blockIdx.x * TOKENS + threadIdx.x / LANES, head = blockIdx.y;
  // Load the row before it is known to be kept, so that the loads of row and slot overlap.
  auto y =
      Row<D, LANES>::load(p.x[is_v] + min(token, p.num_tokens - 1) * p.token_stride[is_v] + head * p.head_stride[is_v]);
  const i64 slot = token < p.num_tokens ? p.slot_mapping[token] : -1;
  const bool is_kept = slot >= 0 && slot < p.num_slots;  // all lanes continue, since they exchange values
  if (p.center[is_v]) {
    const float* center = p.center[is_v] + head * D;
    if (BY_BUCKET && !is_v) {
      const i64 position = token < p.num_tokens ? p.positions[token] : 0;
      center += bucket_of(position, p.num_buckets) * (i64)gridDim.y * D;
    }
    const auto c = Row<D, LANES>::load(center);
#pragma unroll
    for (int i = 0; i < y.PER_LANE; i++) y.x[i] -= c.x[i];
  }
  if (GAIN && p.gain[is_v]) y.multiply(Row<D, LANES>::load(p.gain[is_v] + head * D));
  rotate<ORDER>(y);
  const bool has_feedback = FEEDBACK && p.weights[is_v];
  Quantizer<BITS> quantizer(y, has_feedback);
  Sums sums{};
  if (has_feedback) {
    sums = quantizer.feed_back(y, p.weights[is_v] + head * D * D, p.step[is_v][head]);
  } else if (COUNT && is_sampled(slot)) {
    sums = quantizer.sums(y);
  }
  if (COUNT) count_row(p, is_v, quantizer.meta, sums, slot, is_kept, y.lane() == 0);
  if (BITS != 3 && !is_kept) return;
  const StoredRow<BITS> stored(p.pages + slot / PAGE_SIZE * p.page_stride + head * HEAD_BYTES, slot % PAGE_SIZE, is_v);
  store_codes(stored, quantizer, y, is_kept);
  if ((BITS != 3 || is_kept) && y.lane() == 0) *stored.meta = quantizer.meta;
}

}  // namespace sawkv

using namespace sawkv;

extern "C" {

__device__ int sawkv_threads = THREADS;
__device__ int sawkv_tokens_per_block = TOKENS;

__global__ void __launch_bounds__(THREADS, (D <= 128 ? 8 : 4) >> FEEDBACK)
    sawkv_append(const __grid_constant__ AppendParams p) {
  ptx::wait_for_prerequisites();
  ptx::let_dependents_launch();  // the decode kernel starts up meanwhile
  const bool is_v = blockIdx.z;
  if (!is_v || (K_ORDER == V_ORDER && K_BITS == V_BITS))
    append_row<K_ORDER, K_BITS>(p, is_v);
  else
    append_row<V_ORDER, V_BITS>(p, is_v);
}

}  // extern "C"
