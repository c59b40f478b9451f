// gather: decode the pages of many sequences into contiguous 16- or 32-bit rows. A block decodes one KV head of TOKENS
// output tokens, and each of its warps K or V of TILE of them.
//
// Codes are small integers, so their Hadamard transform is exact in fp32, in any order of summation. Tensor cores
// compute four of its stages from masked codes, as in decode. The others are sums within a lane. Scale and zero point
// are applied at the end: a constant transforms to ORDER times itself in a block's first channel, and 0 in the others.
//
// Macros: those of pages.cuh, K_ORDER and V_ORDER (0: rows stay rotated), ELEMENT (of the output), GAIN (1: gains of K
// or V, or both, must be undone), BY_BUCKET (1: K has a center per position bucket).
#include "pages.cuh"

namespace sawkv {

constexpr int THREADS = 128, LANES = 4, TILE = 16, TOKENS = THREADS / WARP / 2 * TILE;  // LANES per row
constexpr int LANE_ROWS = 2;  // rows that a lane holds a part of, 8 tokens apart

struct GatherParams {
  u8* pages;
  const int* block_table;
  const int* seq_lens;
  const int* cu_seq_lens;
  const float* center[2];        // of K (with BY_BUCKET [num_buckets] of them) and of V: as below; added to rows
  const float* gain_inverse[2];  // [num_kv_heads][D] or null; multiplies rows before that
  ELEMENT* k_out;
  ELEMENT* v_out;
  i64 page_stride, table_stride;
  int num_seqs, max_tokens, num_kv_heads, num_buckets;
  const int* first_positions;  // [num_seqs], of each table's first token; null: 0
};

// The page and offset that hold an output token's row of one KV head.
struct Source {
  bool is_there;
  int offset, bucket;
  u8* page_head;

  // `seq`: a sequence that starts at or before the token
  __device__ Source(const GatherParams& p, int token, int head, int seq) {
    while (seq + 1 < p.num_seqs && p.cu_seq_lens[seq + 1] <= token) seq++;
    const int position = token - p.cu_seq_lens[seq];
    is_there = token < p.max_tokens && position >= 0 && position < p.seq_lens[seq];
    const i64 page = is_there ? p.block_table[seq * p.table_stride + position / PAGE_SIZE] : 0;
    offset = position % PAGE_SIZE;
    bucket = 0;
    if (BY_BUCKET) bucket = bucket_of(position + (p.first_positions ? p.first_positions[seq] : 0), p.num_buckets);
    page_head = p.pages + page * p.page_stride + head * HEAD_BYTES;
  }
};

// An element of the Hadamard matrix as fp16, over 2^BITS for odd codes, which read as 2^BITS n. `in` and `out` are
// channels.
template <int BLOCK, int BITS>
__device__ inline u32 hadamard(int in, int out) {
  if ((in ^ out) & ~(BLOCK - 1)) return 0;  // different blocks
  const u32 one = 0x3c00 - (in % 2 ? BITS << 10 : 0);
  return one | (__popc(in & out & (BLOCK - 1)) & 1) << 15;
}

// One vector at a time, to save registers.
__device__ inline void store_restored(Row<D, LANES>& row, const float* gain_inverse, const float* center, ELEMENT* to) {
  using R = Row<D, LANES>;
#pragma unroll
  for (int i = 0; i < R::PER_LANE; i += R::VECTOR) {
    if (GAIN && gain_inverse) {
      const auto g = *(const Vector<float, R::VECTOR>*)(gain_inverse + R::channel(i));
#pragma unroll
      for (int e = 0; e < R::VECTOR; e++) row.x[i + e] *= g.x[e];
    }
    if (center) {
      const auto c = *(const Vector<float, R::VECTOR>*)(center + R::channel(i));
#pragma unroll
      for (int e = 0; e < R::VECTOR; e++) row.x[i + e] += c.x[e];
    }
    constexpr int PARTS = R::VECTOR * sizeof(ELEMENT) / 16;
    union {
      Vector<ELEMENT, R::VECTOR> v;
      uint4 parts[PARTS];
    };
#pragma unroll
    for (int e = 0; e < R::VECTOR; e++) v.x[e] = ELEMENT(row.x[i + e]);
#pragma unroll
    for (int k = 0; k < PARTS; k++) ptx::store_global((uint4*)(to + R::channel(i)) + k, parts[k]);
  }
}

// Each bit of the channel index is one stage of the transform. Tensor cores compute bits 0 (odd codes), 2 (half of a
// word), 3 and 4 (lane). Sums within a lane compute bit 1 and bits from 5 on.
template <int ORDER, int BITS>
__device__ inline void decode_rows(const Source (&sources)[LANE_ROWS], bool is_v, const float* gain_inverse,
                                   const float* center, i64 bucket_stride, ELEMENT* const (&to)[LANE_ROWS]) {
  using R = Row<D, LANES>;
  static_assert(R::VECTOR == 8, "a lane's vector is a word of codes");
  constexpr int BLOCK = ORDER ? ORDER : 1;
  using Codes = Eight<BITS>;
  u32 words[LANE_ROWS][D / 32][Codes::SOURCES], meta[LANE_ROWS];
#pragma unroll
  for (int r = 0; r < LANE_ROWS; r++) {
    const StoredRow<BITS> stored(sources[r].page_head, sources[r].offset, is_v);
    meta[r] = sources[r].is_there ? *stored.meta : 0;
#pragma unroll
    for (int w = 0; w < D / 32; w++)
#pragma unroll
      for (int i = 0; i < Codes::SOURCES; i++)
        words[r][w][i] =
            sources[r].is_there ? *(const u32*)stored.at((w * BITS + Codes::source(R::lane()) + i) * 4) : 0;
  }

  const int column = lane_index() / LANES;
  u32 matrix[2][2];  // operand B, for outputs with bit 2 off and on
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      const int in = R::lane() << 3 | odd, out = column >> 1 << 3 | half << 2 | column % 2;
      matrix[half][odd] = hadamard<BLOCK, BITS>(in, out) | hadamard<BLOCK, BITS>(in | 1 << 2, out) << 16;
    }
  R rows[LANE_ROWS];
#pragma unroll
  for (int w = 0; w < D / 32; w++) {
    const auto x = Codes::of(words[0][w], R::lane()), y = Codes::of(words[1][w], R::lane());
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const u32 a0 = x.pair(2 * k), a1 = y.pair(2 * k), a2 = x.pair(2 * k + 1), a3 = y.pair(2 * k + 1);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float sums[4] = {};
        ptx::mma_half(sums, a0, a1, a2, a3, matrix[half]);
#pragma unroll
        for (int e = 0; e < 4; e++) rows[e / 2].x[8 * w + 4 * half + 2 * k + e % 2] = sums[e];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < LANE_ROWS; r++) {
    R& row = rows[r];
    if (ORDER) row.add_pairs(2);
#pragma unroll
    for (int stride = 32; stride < ORDER; stride *= 2) row.add_pairs(stride / LANES);
    const float zero_point = ptx::high_half_to_float(meta[r]) * (BLOCK * power_of_two(-24));
#pragma unroll
    for (int i = 0; i < R::PER_LANE; i++)
      if (R::channel(i) % BLOCK == 0) row.x[i] -= zero_point;
    row.scale(ptx::low_half_to_float(meta[r]) * (inverse_root(BLOCK) * power_of_two(24)));
    if (!sources[r].is_there) continue;
    store_restored(row, gain_inverse, BY_BUCKET && center ? center + sources[r].bucket * bucket_stride : center, to[r]);
  }
}

}  // namespace sawkv

using namespace sawkv;

extern "C" {

__device__ int sawkv_threads = THREADS;
__device__ int sawkv_tokens_per_block = TOKENS;

__global__ void __launch_bounds__(THREADS, D <= 128 ? 4 : 2) sawkv_gather(const __grid_constant__ GatherParams p) {
  ptx::wait_for_prerequisites();
  const int head = blockIdx.x % p.num_kv_heads,
            first = blockIdx.x / p.num_kv_heads * TOKENS;  // so that neighbouring blocks read neighbouring heads
  if (first >= p.cu_seq_lens[p.num_seqs]) return;
  int seq = 0;  // the last sequence that starts at or before `first`
  for (int high = p.num_seqs - 1; seq < high;) {
    const int middle = (seq + high + 1) / 2;
    if (p.cu_seq_lens[middle] <= first)
      seq = middle;
    else
      high = middle - 1;
  }
  const bool is_v = warp_index() >= TOKENS / TILE;
  const int token = first + warp_index() % (TOKENS / TILE) * TILE + lane_index() / LANES;
  const Source sources[LANE_ROWS] = {{p, token, head, seq}, {p, token + TILE / LANE_ROWS, head, seq}};
  ELEMENT* start = (is_v ? p.v_out : p.k_out) + ((i64)token * p.num_kv_heads + head) * D;
  ELEMENT* const to[LANE_ROWS] = {start, start + (i64)TILE / LANE_ROWS * p.num_kv_heads * D};
  const float *center = p.center[is_v], *gain_inverse = p.gain_inverse[is_v];
  if (center) center += head * D;
  if (gain_inverse) gain_inverse += head * D;
  const i64 bucket_stride = is_v ? 0 : (i64)p.num_kv_heads * D;
  if (!is_v || (K_ORDER == V_ORDER && K_BITS == V_BITS))
    decode_rows<K_ORDER, K_BITS>(sources, is_v, gain_inverse, center, bucket_stride, to);
  else
    decode_rows<V_ORDER, V_BITS>(sources, is_v, gain_inverse, center, bucket_stride, to);
}

}  // extern "C"
