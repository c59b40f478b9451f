// gather: decode the pages of many sequences into contiguous 16- or 32-bit rows. A block decodes K and V of one KV head for TOKENS output tokens.
//
// Macros: HEAD_DIM, PAGE_SIZE, K_ORDER and V_ORDER (0: rows stay rotated), ELEMENT (of the output).
#include "pages.cuh"

namespace sawkv {

constexpr int THREADS = 256, LANES = 4, TOKENS = THREADS / LANES;  // lanes of a row: few, since rotation exchanges values between them

struct GatherParams {
  u8* pages;
  const int* block_table;
  const int* seq_lens;
  const int* cu_seq_lens;
  const float* k_center;  // added to rows, where not null
  const float* v_center;
  ELEMENT* k_out;
  ELEMENT* v_out;
  i64 page_stride, table_stride;
  int num_seqs, max_tokens, num_kv_heads;
};

template <int ORDER, bool IS_V>
__device__ inline void decode_row(u8* page_head, int offset, bool is_there, const float* center, ELEMENT* to) {
  const StoredRow<IS_V> stored(page_head, offset);
  auto y = Row<D, LANES>::filled(0);
  constexpr int VECTOR = y.VECTOR;
  if (is_there) {
    const u32 meta = *stored.meta;
    const float scale = ptx::low_half_to_float(meta), zero_point = ptx::high_half_to_float(meta);
#pragma unroll
    for (int i = 0; i < y.PER_LANE; i += VECTOR) {
      const auto packed = *(const Vector<u8, VECTOR / 2>*)stored.at(y.channel(i));
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        const float code = packed.x[e / 2] >> e % 2 * 4 & 15;
        y.x[i + e] = __fmul_rn(code - zero_point, scale);  // rounded before it is added to anything, as the reference does
      }
    }
  }
  rotate<ORDER>(y);
  if (!is_there) return;
  if (center) y.blend(1, Row<D, LANES>::load(center), 1);
  y.store(to);
}

}  // namespace sawkv

using namespace sawkv;

extern "C" {

__device__ int sawkv_tokens_per_block = TOKENS;

__global__ void __launch_bounds__(THREADS) sawkv_gather(const __grid_constant__ GatherParams p) {
  const int head = blockIdx.y, first = blockIdx.x * TOKENS;
  if (first >= p.cu_seq_lens[p.num_seqs]) return;
  int seq = 0;  // the last sequence that starts at or before `first`
  for (int high = p.num_seqs - 1; seq < high;) {
    const int middle = (seq + high + 1) / 2;
    if (p.cu_seq_lens[middle] <= first) seq = middle; else high = middle - 1;
  }
  const int token = first + threadIdx.x / LANES;
  while (seq + 1 < p.num_seqs && p.cu_seq_lens[seq + 1] <= token) seq++;
  const int position = token - p.cu_seq_lens[seq];
  const bool is_there = token < p.max_tokens && position >= 0 && position < p.seq_lens[seq];
  const i64 page = is_there ? p.block_table[seq * p.table_stride + position / PAGE_SIZE] : 0;
  u8* page_head = p.pages + page * p.page_stride + head * HEAD_BYTES;
  const i64 to = ((i64)token * p.num_kv_heads + head) * D;
  decode_row<K_ORDER, false>(page_head, position % PAGE_SIZE, is_there, p.k_center ? p.k_center + head * D : nullptr, p.k_out + to);
  decode_row<V_ORDER, true>(page_head, position % PAGE_SIZE, is_there, p.v_center ? p.v_center + head * D : nullptr, p.v_out + to);
}

}  // extern "C"
