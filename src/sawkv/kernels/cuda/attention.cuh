// Shared by the attention kernels: their parameters, the query of each row, and how results are added and written.
//
// Macros: HEAD_DIM, GROUP (query heads per KV head), CHUNK_ROWS (most query rows of a unit), ROW_GROUPS (most groups
// of CHUNK_ROWS query rows per sequence and KV head; each group is a unit), UNITS (most of a chunk), V_ORDER, ELEMENT
// (of q and the output); 1 or 0: GAIN (K or V, or both, have gains), SOFTCAP, OFFSET (K has centers, and a soft-cap,
// sinks, the log-sum-exp or BY_BUCKET need the q . center that scores over centered keys lack), BY_BUCKET (K has a
// center per position bucket, so q . center differs between the keys of a query).
#pragma once
#include "pages.cuh"
#include "chunks.cuh"

namespace sawkv {

// A chunk's query rows: row r of unit u, or part u of row r, is number u * CHUNK_ROWS + r.
constexpr int QUERY_PARTS = PARTS * UNITS * CHUNK_ROWS;
static_assert(PARTS == 1 || UNITS == 1, "not both");

struct DecodeParams {
  const ELEMENT* q;
  const u8* pages;
  const int* block_table;
  ScheduleHeader* header;
  const Chunk* chunks;
  const SplitUnit* splits;
  float* partials;        // [chunks of split units][CHUNK_ROWS][HEAD_DIM], not divided by the sum of the weights
  float2* partial_stats;  // [chunks of split units][CHUNK_ROWS]
  const float* k_center;  // this and the next three: [KV heads][HEAD_DIM] or null; with BY_BUCKET, num_buckets of them
  const float* v_center;
  const float* k_gain_inverse;
  const float* v_gain_inverse;
  const float* sinks;  // [query heads] or null
  ELEMENT* out;
  float* lse;       // or null
  i64 page_stride;  // in bytes; other strides in elements
  i64 table_stride, q_token_stride, q_head_stride, out_token_stride, out_head_stride, lse_token_stride, lse_head_stride;
  float scale_log2;    // softmax_scale * log2(e); with a soft-cap times 2 / logit_softcap
  float softcap_log2;  // logit_softcap * log2(e)
  int window;          // 0: none
  int num_buckets, num_kv_heads;
  int num_pages, num_seqs, table_columns;
};

// The most buckets that one entry of the ring of chunks covers. A chunk over more is cut into several entries. In all
// of them but the last, `partial` is CONTINUED.
constexpr int CHUNK_BUCKETS = BY_BUCKET ? 8 : 1, CONTINUED = 0x7fffffff;
static_assert(BUCKET_SIZE % TILE == 0, "all tokens of a tile share a center of K");
__device__ inline bool is_continued(const Chunk& chunk) { return BY_BUCKET && chunk.partial == CONTINUED; }
// The bucket of a tile, counted from the first one of its entry
__device__ inline int chunk_bucket(const Chunk& chunk, int first_token) {
  return first_token / BUCKET_SIZE - chunk.first_tile * TILE / BUCKET_SIZE;
}

// Row groups per sequence and KV head
__device__ inline int num_row_groups(int query_len) {
  return ROW_GROUPS == 1 ? 1 : min(ROW_GROUPS, divide_up(query_len * GROUP, CHUNK_ROWS));
}
__device__ inline int kv_head_of(const Chunk& chunk, int unit) { return unit / num_row_groups(chunk.query_len); }

// The query of a unit's row r: its token, counted from the sequence's first query token, and its query head.
struct QueryRow {
  int token, head;
  __device__ QueryRow(int unit, int query_len, int r) {
    const int row_groups = num_row_groups(query_len), row = unit % row_groups * CHUNK_ROWS + r;
    token = row / GROUP;
    head = unit / row_groups * GROUP + row % GROUP;
  }
};

// q . center of a query row or of a part of it, in log2: scores over centered keys lack it. `q` is not rotated yet.
template <int N, int LANES>
__device__ inline float center_score(const DecodeParams& p, const Row<N, LANES>& q, const Row<N, LANES>& center) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Row<N, LANES>::PER_LANE; i++) sum += q.x[i] * center.x[i];
  return sum_over_lanes<LANES>(sum) * p.scale_log2;
}

// Attention over some tokens: `sum` and `out` are relative to 2^maximum. LANES neighbouring lanes hold a row. All lanes
// of a warp call these functions together; those for which `is_there` is false write nothing.
template <int LANES = WARP>
struct Result {
  using R = Row<HEAD_DIM, LANES>;
  R out;
  float maximum, sum;

  static __device__ Result none() { return {R::filled(0), -1e30f, 0}; }

  // Add N others. Their loads were issued together, so their latencies overlap.
  template <int N>
  __device__ void add(const R (&others)[N], const float2 (&stats)[N]) {
    float new_maximum = maximum;
#pragma unroll
    for (int i = 0; i < N; i++) new_maximum = fmaxf(new_maximum, stats[i].x);
    const float own = ptx::exp2(maximum - new_maximum);
    out.scale(own);
    sum *= own;
    maximum = new_maximum;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float weight = ptx::exp2(stats[i].x - maximum);
      out.blend(1, others[i], weight);
      sum += weight * stats[i].y;
    }
  }

  __device__ void write(const DecodeParams& p, int query_start, QueryRow row, bool is_there = true) {
    // Scores have the offset already with a soft-cap and by bucket. Else a sink and the log-sum-exp still need it.
    constexpr bool LACKS_OFFSET = OFFSET && !SOFTCAP && !BY_BUCKET;
    float total = sum, offset = 0;
    if constexpr (LACKS_OFFSET)
      offset =
          center_score(p, R::load(p.q + (i64)(query_start + row.token) * p.q_token_stride + row.head * p.q_head_stride),
                       R::load(p.k_center + row.head / GROUP * HEAD_DIM));
    if (p.sinks) {
      const float sink = p.sinks[row.head] * LOG2_E - offset, new_maximum = fmaxf(maximum, sink),
                  own = ptx::exp2(maximum - new_maximum);
      out.scale(own);
      sum *= own;
      total = sum + ptx::exp2(sink - new_maximum);
      maximum = new_maximum;
    }
    const float inverse = total == 0 ? 0 : 1 / total;
    out.scale(inverse);
    rotate<V_ORDER>(out);
    if (GAIN && p.v_gain_inverse) out.multiply(R::load(p.v_gain_inverse + row.head / GROUP * HEAD_DIM));
    if (p.v_center) out.blend(1, R::load(p.v_center + row.head / GROUP * HEAD_DIM), sum * inverse);
    if (!is_there) return;
    const i64 token = query_start + row.token;
    out.store(p.out + token * p.out_token_stride + row.head * p.out_head_stride);
    if constexpr (LACKS_OFFSET) maximum += offset;
    if (p.lse && R::lane() == 0)
      p.lse[token * p.lse_token_stride + row.head * p.lse_head_stride] = (maximum + ptx::log2(total)) * LN_2;
  }

  // Row r of a chunk: the output of a whole unit, or the partial result of a split one.
  __device__ void put(const DecodeParams& p, const Chunk& chunk, QueryRow row, int r, bool is_there = true) {
    if (chunk.partial < 0) {
      write(p, chunk.query_start, row, is_there);
    } else if (is_there) {
      const i64 index = (i64)chunk.partial * CHUNK_ROWS + r;
      out.store(p.partials + index * HEAD_DIM);
      if (R::lane() == 0) p.partial_stats[index] = {maximum, sum};
    }
  }
};

}  // namespace sawkv
