// append: center, multiply by gains, rotate, quantize, pack and write K and V of new tokens in one launch. A block
// handles K or V of TOKENS tokens and one head.
//
// Bytes equal the reference's: docs/format.md fixes the order of operations. The compiler must not contract any of them
// to an fma, except the one that is written as fma. Products with gains and norms use __fmul_rn, which is never
// contracted.
//
// Macros: those of pages.cuh, K_ORDER, V_ORDER, ELEMENT (of k and v); 1 or 0: GAIN and FEEDBACK (of K or V, or both),
// COUNT (update the counters), BY_BUCKET (K has a center per position bucket).
#include "feedback.cuh"
#include "format_constants.h"
#include "pages.cuh"
#include "quantizer.cuh"

namespace sawkv {

using namespace format;

constexpr int THREADS = 128, TOKENS = THREADS / LANES, QUADS = WARP / LANES;

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

__device__ inline bool is_sampled(i64 slot) { return (u32)slot * SAMPLE_HASH < (1ull << 32) / SAMPLE; }

// Counts a row before it is written. All threads of a block must call it, or of a warp if BY_WARP. Mirrors
// sawkv.format.counters and the reference.
template <bool BY_WARP>
__device__ inline void count_row(const AppendParams& p, bool is_v, u32 meta, Sums sums, i64 slot, bool is_kept,
                                 bool is_first_lane) {
  double* counters = p.counters + (is_v ? NUM_COLUMNS : 0);
  if (blockIdx.y == 0) {  // once for all heads, which keep the same tokens
    const bool is_one = is_kept && is_first_lane;
    if (BY_WARP) {
      const int kept = __popc(__ballot_sync(ALL_LANES, is_one));
      if (lane_index() == 0) atomicAdd(&counters[COLUMN_ROWS], (double)(kept * gridDim.y));
    } else {
      const int kept = __syncthreads_count(is_one);
      if (threadIdx.x == 0) atomicAdd(&counters[COLUMN_ROWS], (double)kept * gridDim.y);
    }
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

// Writes eight codes of each lane, which lie in this 32 channels. All four lanes of a row must call it.
template <int BITS>
__device__ inline void store_eight(const StoredRow<BITS>& stored, int group, u32 own, bool is_kept) {
  using R = Row<D, LANES>;
  static_assert(LANES == 4 && R::VECTOR == 8, "a lane has a quarter of every 32 channels");
  if constexpr (BITS == 3) {
    // 16 channels are the lanes' low halves of three words, five codes in each and the sixteenth's bits on top.
    const u32 other = __shfl_xor_sync(ALL_LANES, own, 1);
    const bool is_odd = R::lane() % 2;
    const u64 half = is_odd ? (u64)own << 24 | other : (u64)other << 24 | own;
    const u64 other_half = __shfl_xor_sync(ALL_LANES, half, 2);
    const u64 low = R::lane() < 2 ? half : other_half, high = R::lane() < 2 ? other_half : half;
    const int word = R::lane();  // of each 32 channels; the fourth lane stores nothing
    const auto sixteen = [&](u64 codes) {
      return (u32)(codes >> 15 * word) & 0x7fff | (u32)(codes >> (45 + word) & 1) << 15;
    };
    if (is_kept && word < 3) *(u32*)stored.at((group * BITS + word) * 4) = sixteen(low) | sixteen(high) << 16;
  } else {
    u8* to = stored.at(R::channel(group * 8) / 8 * BITS);
    if (is_kept && BITS == 4) *(u32*)to = own;
    if (is_kept && BITS == 2) *(u16*)to = own;
  }
}

// Writes the codes of a row. All four lanes of a row must call it.
template <int BITS>
__device__ inline void store_codes(const StoredRow<BITS>& stored, const Quantizer<BITS>& quantizer,
                                   const Row<D, LANES>& y, bool is_kept) {
  using R = Row<D, LANES>;
#pragma unroll
  for (int i = 0; i < R::PER_LANE; i += R::VECTOR) {
    if constexpr (BITS == 3) {
      store_eight(stored, i / R::VECTOR, quantizer.template codes<8>(&y.x[i]), is_kept);
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
  Quantizer<BITS> quantizer(y, false);
  Sums sums{};
  if (COUNT && is_sampled(slot)) sums = quantizer.sums(y);
  if (COUNT) count_row<false>(p, is_v, quantizer.meta, sums, slot, is_kept, y.lane() == 0);
  if (BITS != 3 && !is_kept) return;
  const StoredRow<BITS> stored(p.pages + slot / PAGE_SIZE * p.page_stride + head * HEAD_BYTES, slot % PAGE_SIZE, is_v);
  store_codes(stored, quantizer, y, is_kept);
  if ((BITS != 3 || is_kept) && y.lane() == 0) *stored.meta = quantizer.meta;
}

// A row of x. Pairs of bf16 take two instructions, one less than by themselves.
template <class Element>
__device__ inline Row<D, LANES> load_row(const Element* x) {
  return Row<D, LANES>::load(x);
}
__device__ inline Row<D, LANES> load_row(const Bfloat* x) {
  using R = Row<D, LANES>;
  R y;
#pragma unroll
  for (int i = 0; i < R::PER_LANE; i += R::VECTOR) {
    const auto pairs = *(const Vector<u32, R::VECTOR / 2>*)(x + R::channel(i));
#pragma unroll
    for (int e = 0; e < R::VECTOR; e++)
      y.x[i + e] = e % 2 ? ptx::high_bfloat_to_float(pairs.x[e / 2]) : ptx::low_bfloat_to_float(pairs.x[e / 2]);
  }
  return y;
}

// Loads rows of `token` and of those that the next quads of lanes leave to this one. Centers and multiplies them. If it
// IS_HURRIED, all is loaded at once, which takes more registers.
template <bool IS_HURRIED, int ROWS>
__device__ inline void load_rows(Row<D, LANES> (&y)[ROWS], const AppendParams& p, bool is_v, int token, int head) {
  using R = Row<D, LANES>;
  static_assert(!IS_HURRIED || ROWS == 1, "two rows leave too few registers");
  const bool has_center = p.center[is_v], has_gain = GAIN && p.gain[is_v], is_by_bucket = BY_BUCKET && !is_v;
  const auto center_of = [&](int row) {
    const float* center = p.center[is_v] + head * D;
    if (is_by_bucket) {
      const i64 position = token + row * QUADS < p.num_tokens ? p.positions[token + row * QUADS] : 0;
      center += bucket_of(position, p.num_buckets) * (i64)gridDim.y * D;
    }
    return R::load(center);
  };
  R center, gain;
  if (IS_HURRIED && has_center) center = center_of(0);
  if (IS_HURRIED && has_gain) gain = R::load(p.gain[is_v] + head * D);
#pragma unroll
  for (int row = 0; row < ROWS; row++)
    y[row] = load_row(p.x[is_v] + min(token + row * QUADS, p.num_tokens - 1) * p.token_stride[is_v] +
                      head * p.head_stride[is_v]);
  if (has_center) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      if (!IS_HURRIED && (row == 0 || is_by_bucket)) center = center_of(row);
#pragma unroll
      for (int i = 0; i < R::PER_LANE; i++) y[row].x[i] -= center.x[i];
    }
  }
  if (has_gain) {
    if (!IS_HURRIED) gain = R::load(p.gain[is_v] + head * D);
#pragma unroll
    for (int row = 0; row < ROWS; row++) y[row].multiply(gain);
  }
}

// append with feedback of K or V, or both. A warp handles eight tokens, or 16 if lanes have two rows: a product then
// serves twice as many. A block has one head, whose weights are copied once. If it STAYS, it takes tile after tile.
template <int ORDER, int BITS, int ROWS, bool STAYS>
__device__ inline void append_tiles(const AppendParams& p, bool is_v, Weights& weights) {
  using R = Row<D, LANES>;
  constexpr int TILE = ROWS * QUADS, WARPS = THREADS / WARP;
  constexpr u32 NONE = ~0u;  // slots have 32 bits here, since 2^32 of the smallest take 170 GB
  static_assert(WARPS == Weights::WARPS, "every warp copies its part");
  const int head = blockIdx.y;
  const bool has_feedback = p.weights[is_v];
  bool lacks_weights = has_feedback;
  int tile = blockIdx.x * WARPS + warp_index();
  if (STAYS) tile = __shfl_sync(ALL_LANES, tile, 0);  // tells the compiler that it is uniform, and so is the loop
#pragma unroll 1
  do {
    const int token = tile * TILE + lane_index() / LANES;
    u32 slots[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      const i64 slot = token + row * QUADS < p.num_tokens ? p.slot_mapping[token + row * QUADS] : -1;
      slots[row] = slot >= 0 && slot < p.num_slots ? (u32)slot : NONE;
    }
    R y[ROWS];
    if (lacks_weights) weights.copy(p.weights[is_v] + head * D * D);
    load_rows<!STAYS>(y, p, is_v, token, head);
    const float step = has_feedback ? p.step[is_v][head] : 0;  // without feedback, steps have no length
    Quantizer<BITS> quantizers[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      rotate<ORDER>(y[row]);
      quantizers[row] = Quantizer<BITS>(y[row], has_feedback);
    }
    if (lacks_weights) {
      ptx::wait_for_copies();
      __syncthreads();
      lacks_weights = false;
    }
    u32 codes[ROWS][D / 32];
    feed_back(y, quantizers, weights, step, codes);
    Sums sums[ROWS] = {};
    if (COUNT && __any_sync(ALL_LANES, is_sampled(slots[0]) || is_sampled(slots[ROWS - 1]))) {
      // Rare. Rows are loaded again, because keeping them takes too many registers.
#pragma unroll 1
      for (int row = 0; row < ROWS; row++) {
        R again[1];
        load_rows<false>(again, p, is_v, token + row * QUADS, head);
        rotate<ORDER>(again[0]);
        u32 own[D / 32];
#pragma unroll
        for (int i = 0; i < D / 32; i++) own[i] = row ? codes[ROWS - 1][i] : codes[0][i];
        const Sums found = Quantizer<BITS>(again[0], has_feedback).sums(again[0], own);
        sums[0] = row ? sums[0] : found;
        sums[ROWS - 1] = row == ROWS - 1 ? found : sums[ROWS - 1];
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      const u32 slot = slots[row];
      if (COUNT) count_row<true>(p, is_v, quantizers[row].meta, sums[row], slot, slot != NONE, R::lane() == 0);
      const StoredRow<BITS> stored(p.pages + slot / PAGE_SIZE * p.page_stride + head * HEAD_BYTES, slot % PAGE_SIZE,
                                   is_v);
#pragma unroll
      for (int i = 0; i < D / 32; i++) store_eight(stored, i, codes[row][i], slot != NONE);
      if (slot != NONE && R::lane() == 0) *stored.meta = quantizers[row].meta;
    }
    tile += gridDim.x * WARPS;
  } while (STAYS && tile * TILE < p.num_tokens);
}

}  // namespace sawkv

using namespace sawkv;

extern "C" {

__device__ int sawkv_threads = THREADS;
__device__ int sawkv_tokens_per_block = TOKENS;

#if FEEDBACK
constexpr int BLOCKS = D <= 128 ? 4 : 2;     // per SM
constexpr int MANY_ROWS = D <= 128 ? 2 : 1;  // per lane, as registers allow
__device__ int sawkv_many_tokens_per_block = MANY_ROWS * TOKENS;
__device__ int sawkv_blocks_per_sm = BLOCKS;

#define KERNEL(NAME, ROWS, STAYS)                                                                   \
  __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ AppendParams p) { \
    __shared__ Weights weights;                                                                     \
    ptx::wait_for_prerequisites();                                                                  \
    ptx::let_dependents_launch();                                                                   \
    const bool is_v = blockIdx.z;                                                                   \
    if (!is_v || (K_ORDER == V_ORDER && K_BITS == V_BITS))                                          \
      append_tiles<K_ORDER, K_BITS, ROWS, STAYS>(p, is_v, weights);                                 \
    else                                                                                            \
      append_tiles<V_ORDER, V_BITS, ROWS, STAYS>(p, is_v, weights);                                 \
  }
KERNEL(sawkv_append, 1, false)
KERNEL(sawkv_append_many, MANY_ROWS, true)  // blocks stay: the grid is what fits on the GPU at once
#else
__global__ void __launch_bounds__(THREADS, D <= 128 ? 8 : 4) sawkv_append(const __grid_constant__ AppendParams p) {
  ptx::wait_for_prerequisites();
  ptx::let_dependents_launch();  // the decode kernel starts up meanwhile
  const bool is_v = blockIdx.z;
  if (!is_v || (K_ORDER == V_ORDER && K_BITS == V_BITS))
    append_row<K_ORDER, K_BITS>(p, is_v);
  else
    append_row<V_ORDER, V_BITS>(p, is_v);
}
#endif

}  // extern "C"
