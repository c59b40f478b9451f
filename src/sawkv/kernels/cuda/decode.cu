// Decode attention over INT4 pages for Hopper: one persistent block per SM. docs/kernels.md draws it.
//
//   scheduler warp   takes chunks from the plan; loads, rotates and normalizes their queries
//   producer warp    brings tiles of pages into a ring in shared memory, one bulk copy for each page and KV head; two
//   where pages are small 8 consumer warps attend: tile i goes to consumer group i % GROUPS merge warps      2 or 1,
//   add the groups' results of a finished chunk while the consumers go on with the next; the rows of a block's last
//   chunk
//                    are shared by all warps that are not consumers, which have nothing else to do by then
//
// The codes are never converted. A nibble n, masked in place, *is* the 16-bit float n * 2^-24 (fp16) or n * 2^-133
// (bf16), so it goes to the tensor cores as it is; scale and zero point act on scores and on weights:
//   score = k_scale * (q . n - k_zero * sum(q));    out = sum(p * v_scale * n) - sum(p * v_scale * v_zero).
// Odd nibbles stay in place as 16 n, and the 16 is divided out of q, or out of the output.
//
// Macros: HEAD_DIM, PAGE_SIZE, GROUP (query heads per KV head), ROWS (query rows of a row block, at most 8 *
// COLUMN_TILES), COLUMN_TILES (of 8 rows), ROW_BLOCKS (dealt to consumer warps), ROW_GROUPS (dealt to chunks), K_ORDER,
// V_ORDER, ELEMENT (of q and the output); 1 or 0: GAIN (K or V, or both, have gains), SOFTCAP, OFFSET (K has centers,
// and a soft-cap, sinks or the log-sum-exp see what scores lack by them).
#include "pages.cuh"
#include "plan.cuh"

namespace sawkv {

// ----------------------------------------------------------------------------------------------------------------
// geometry
constexpr int TILE_BYTES = TILE * TOKEN_BYTES;
static_assert(PAGE_SIZE % TILE == 0 || TILE % PAGE_SIZE == 0, "tiles are whole pages, or the reverse");

// A tile is one or more spans of tokens, each laid out like a page: K codes, K meta, V codes, V meta.
constexpr int SPAN = PAGE_SIZE < TILE ? PAGE_SIZE : TILE;
constexpr int SPAN_BYTES = SPAN * TOKEN_BYTES, SPANS = TILE / SPAN;
constexpr int K_META = SPAN * ROW_BYTES, V_CODES = SPAN * (ROW_BYTES + META_BYTES),
              V_META = SPAN * (2 * ROW_BYTES + META_BYTES);

constexpr int CONSUMERS = 8, HELPERS = 4;  // helpers: all but the consumers, producers first
constexpr int PRODUCERS = SPANS < 4 ? 1 : 2, SCHEDULER = PRODUCERS, FIRST_MERGER = SCHEDULER + 1,
              MERGERS = HELPERS - FIRST_MERGER;
constexpr int GROUPS = CONSUMERS / ROW_BLOCKS;  // the warps of a group share a tile, each with its own query rows
constexpr int BLOCK_ROWS = 8 * COLUMN_TILES;    // rows of a row block, with padding
constexpr int CHUNK_ROWS = ROW_BLOCKS * BLOCK_ROWS;
constexpr int THREADS = (CONSUMERS + HELPERS) * WARP;
static_assert(CONSUMERS % ROW_BLOCKS == 0 && ROWS <= BLOCK_ROWS, "row blocks are dealt evenly");

constexpr int SHARED_LIMIT = 227 << 10;
constexpr int CHUNK_SLOTS = CHUNK_ROWS <= 16 ? 4 : 2;
constexpr int RESULT_BYTES = CONSUMERS * ROWS * (D + 2) * 4;
constexpr int RESULT_SLOTS = RESULT_BYTES <= 36 << 10 ? 2 : 1;
constexpr int STAGES_THAT_FIT =
    (SHARED_LIMIT - 4096 - RESULT_SLOTS * RESULT_BYTES - CHUNK_SLOTS * CHUNK_ROWS * (2 * D + 8)) / TILE_BYTES;
// A stage must always belong to the same group and producer: a warp that skipped a phase of its barrier would misread
// the parity.
constexpr int STAGES = STAGES_THAT_FIT >= 24 ? 24 : STAGES_THAT_FIT / CONSUMERS * CONSUMERS;
static_assert(STAGES > 0, "no room for the ring");

// A lane of each warp arrives at barriers for all of them, after __syncwarp. compute-sanitizer's racecheck follows only
// lanes that arrive themselves; EVERY_LANE_ARRIVES is for it.
#ifdef EVERY_LANE_ARRIVES
constexpr int WARP_ARRIVALS = WARP;
#else
constexpr int WARP_ARRIVALS = 1;
#endif
__device__ inline bool arrives() { return lane_index() < WARP_ARRIVALS; }

struct alignas(sizeof(float) * (SOFTCAP && OFFSET ? 4 : 2)) QueryStats {
  float sum, factor;  // of the row in units of codes; what a score is multiplied by
#if SOFTCAP && OFFSET
  float offset;  // what a score lacks by K's center, in log2
#endif
};

struct Shared {
  u8 tiles[STAGES][TILE_BYTES];
  u16 queries[CHUNK_SLOTS][CHUNK_ROWS * D];  // fp16, rotated and normalized, in the order of `fragment_index`
  QueryStats query_stats[CHUNK_SLOTS][CHUNK_ROWS];
  float results[RESULT_SLOTS][CONSUMERS][ROWS][D];
  float2 result_stats[RESULT_SLOTS][CONSUMERS][ROWS];  // x: maximum of the scores in log2; y: sum of the weights
  Chunk chunks[CHUNK_SLOTS];
  u64 tile_full[STAGES], tile_empty[STAGES];
  u64 chunk_full[CHUNK_SLOTS], queries_full[CHUNK_SLOTS], chunk_empty[CHUNK_SLOTS];
  u64 results_full[RESULT_SLOTS], results_empty[RESULT_SLOTS];
  u64 last_results_full;  // those of the block's last chunk

  __device__ void init_barriers() {
    for (int i = 0; i < STAGES; i++)
      ptx::init_barrier(&tile_full[i], 1), ptx::init_barrier(&tile_empty[i], ROW_BLOCKS * WARP_ARRIVALS);
    for (int i = 0; i < CHUNK_SLOTS; i++)
      ptx::init_barrier(&chunk_full[i], WARP_ARRIVALS), ptx::init_barrier(&queries_full[i], WARP_ARRIVALS),
          ptx::init_barrier(&chunk_empty[i], MERGERS * WARP_ARRIVALS);
    for (int i = 0; i < RESULT_SLOTS; i++)
      ptx::init_barrier(&results_full[i], CONSUMERS * WARP_ARRIVALS),
          ptx::init_barrier(&results_empty[i], MERGERS * WARP_ARRIVALS);
    ptx::init_barrier(&last_results_full, WARP_ARRIVALS);
    ptx::publish_barriers();
  }
};
static_assert(sizeof(Shared) <= SHARED_LIMIT, "no room in shared memory");

// Position in a ring: slot and phase of the n-th use.
template <int SLOTS>
struct Turn {
  int n;
  __device__ int slot() const { return n % SLOTS; }
  __device__ u32 phase() const { return n / SLOTS & 1; }
};

struct DecodeParams {
  const ELEMENT* q;
  const u8* pages;
  const int* block_table;
  PlanHeader* header;
  const Chunk* chunks;
  const SplitUnit* splits;
  float* partials;        // [chunks of split units][CHUNK_ROWS][D], not yet divided by the sum of the weights
  float2* partial_stats;  // [chunks of split units][CHUNK_ROWS]
  const float* k_center;  // this and the next three: [KV heads][D] or null
  const float* v_center;
  const float* k_gain_inverse;
  const float* v_gain_inverse;
  const float* sinks;  // [query heads] or null
  ELEMENT* out;
  float* lse;       // or null
  i64 page_stride;  // bytes; the other strides in elements
  i64 table_stride, q_token_stride, q_head_stride, out_token_stride, out_head_stride, lse_token_stride, lse_head_stride;
  float scale_log2;    // softmax_scale * log2(e); with a soft-cap, of 2 score / logit_softcap
  float softcap_log2;  // logit_softcap * log2(e)
  int window;          // 0: none
};

// The query row that a unit's row r is: token in the sequence's query, and query head.
struct QueryRow {
  int token, head;
  __device__ QueryRow(int unit, int r) {
    const int row = unit % ROW_GROUPS * CHUNK_ROWS + r;
    token = row / GROUP;
    head = unit / ROW_GROUPS * GROUP + row % GROUP;
  }
};
__device__ inline bool is_padding(int r) { return r % BLOCK_ROWS >= ROWS; }

// What the scores of a query row, of one lane's channels before rotation, lack by K's center, in log2
__device__ inline float center_score(const DecodeParams& p, const Row<D>& q, const Row<D>& center) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Row<D>::PER_LANE; i++) sum += q.x[i] * center.x[i];
  return sum_over_lanes(sum) * p.scale_log2;
}

// ----------------------------------------------------------------------------------------------------------------
// results Attention over some tokens: `sum` and `out` are relative to 2^maximum.
struct Result {
  Row<D> out;
  float maximum, sum;

  static __device__ Result none() { return {Row<D>::filled(0), -1e30f, 0}; }

  // Add N others, all of whose loads are under way.
  template <int N>
  __device__ void add(const Row<D> (&others)[N], const float2 (&stats)[N]) {
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

  __device__ void write(const DecodeParams& p, int query_start, QueryRow row) {
    float total = sum,
          offset = 0;  // all scores lack the offset: a soft-cap has seen to it, a sink and the log-sum-exp have not
    if constexpr (OFFSET && !SOFTCAP)
      offset = center_score(
          p, Row<D>::load(p.q + (i64)(query_start + row.token) * p.q_token_stride + row.head * p.q_head_stride),
          Row<D>::load(p.k_center + row.head / GROUP * D));
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
    if (GAIN && p.v_gain_inverse) out.multiply(Row<D>::load(p.v_gain_inverse + row.head / GROUP * D));
    if (p.v_center) out.blend(1, Row<D>::load(p.v_center + row.head / GROUP * D), sum * inverse);
    const i64 token = query_start + row.token;
    out.store(p.out + token * p.out_token_stride + row.head * p.out_head_stride);
    if constexpr (OFFSET && !SOFTCAP) maximum += offset;
    if (p.lse && lane_index() == 0)
      p.lse[token * p.lse_token_stride + row.head * p.lse_head_stride] = (maximum + ptx::log2(total)) * LN_2;
  }
};

// ----------------------------------------------------------------------------------------------------------------
// scheduler Where channel c of row r stands among a chunk's queries. A consumer lane reads its B fragments of 8 rows
// and 32 channels as 16 bytes, next to its neighbour's. In these the two nibbles of an A fragment's word are four
// channels apart, and even and odd nibbles alternate.
__device__ inline int fragment_index(int r, int c) {
  const int quad = c / (D / 4), word = c % (D / 4) / 8;
  return (((r / 8 * (D / 32) + word) * 8 + r % 8) * 4 + quad) * 8 + (c >> 1 & 1) * 4 + (c & 1) * 2 + (c >> 2 & 1);
}

__device__ void store_query(Shared& s, const DecodeParams& p, int slot, int r, Row<D> q, int kv_head,
                            const Row<D>& gain_inverse) {
  QueryStats stats;
#if SOFTCAP && OFFSET
  stats.offset = center_score(p, q, Row<D>::load(p.k_center + kv_head * D));
#endif
  if (GAIN) q.multiply(gain_inverse);
  rotate<K_ORDER>(q);
  float largest = 0;
#pragma unroll
  for (int i = 0; i < Row<D>::PER_LANE; i++) largest = fmaxf(largest, fabsf(q.x[i]));
  // To the top of fp16's range by a power of two. NaN and infinities stay what they are.
  const int exponent = min(max((int)(__float_as_uint(max_over_lanes(largest)) >> 23) - 127, -100), 100);
  q.scale(power_of_two(13 - exponent));
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Row<D>::PER_LANE; i++) {
    const int c = Row<D>::channel(i);
    sum += ptx::half_to_float(ptx::float_to_half(q.x[i]));
    s.queries[slot][fragment_index(r, c)] = ptx::float_to_half(c % 2 ? q.x[i] / 16 : q.x[i]);
  }
  sum = sum_over_lanes(sum);
  stats.sum = sum * power_of_two(-24);
  stats.factor = p.scale_log2 * power_of_two(24 + exponent - 13);
  if (lane_index() == 0) s.query_stats[slot][r] = stats;
}

__device__ void prepare_queries(Shared& s, const DecodeParams& p, const Chunk& chunk, int slot) {
  constexpr int AT_ONCE = ROWS <= 4 || (SOFTCAP && OFFSET && D > 128) ? 4 : 8;  // loads in flight, as registers allow
  const int kv_head = chunk.unit / ROW_GROUPS;
  const auto gain_inverse = GAIN && p.k_gain_inverse ? Row<D>::load(p.k_gain_inverse + kv_head * D) : Row<D>::filled(1);
  for (int first = 0; first < CHUNK_ROWS; first += AT_ONCE) {
    if (is_padding(first)) continue;
    Row<D> rows[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const QueryRow row(chunk.unit, first + i);
      rows[i] = Row<D>::filled(0);
      if (!is_padding(first + i) && row.token < chunk.query_len)
        rows[i] =
            Row<D>::load(p.q + (i64)(chunk.query_start + row.token) * p.q_token_stride + row.head * p.q_head_stride);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) store_query(s, p, slot, first + i, rows[i], kv_head, gain_inverse);
  }
}

// run_scheduler and run_producer return the number of the block's chunks.
__device__ int run_scheduler(Shared& s, const DecodeParams& p) {
  const int num_chunks = p.header->num_chunks;
  int next = blockIdx.x;  // the first chunk is fixed, the others are claimed
  for (int n = 0;; n++) {
    const Turn<CHUNK_SLOTS> turn{n};
    const int slot = turn.slot();
    Chunk chunk = p.chunks[next];  // the plan has room for a block's claim beyond the last
    if (next >= num_chunks) chunk.num_tiles = 0;
    ptx::wait(&s.chunk_empty[slot], turn.phase() ^ 1);
    if (arrives()) {
      if (lane_index() == 0) s.chunks[slot] = chunk;
      ptx::arrive(&s.chunk_full[slot]);
      // Each block's last claim finds nothing, so there are as many claims as chunks, and the counter wraps to 0 for
      // the next launch.
      if (lane_index() == 0 && chunk.num_tiles) next = gridDim.x + atomicInc(&p.header->claimed, num_chunks - 1);
    }
    if (chunk.num_tiles) prepare_queries(s, p, chunk, slot);
    __syncwarp();
    if (arrives()) ptx::arrive(&s.queries_full[slot]);
    if (!chunk.num_tiles) return n;
    next = __shfl_sync(ALL_LANES, next, 0);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// producers Copies under way at once, in tiles of some 9 KB. The memory serves more of them in a worse order: without
// this bound, decode is 1 to 4% slower.
constexpr int MOST_UNDER_WAY = 8;
static_assert(STAGES <= WARP, "a lane for each stage");
static_assert(MOST_UNDER_WAY <= STAGES && MOST_UNDER_WAY % PRODUCERS == 0 && STAGES % PRODUCERS == 0,
              "each tile's earlier ones are its producer's");

// Ids of the pages that a tile's spans lie in
struct TilePages {
  int ids[SPANS];
  __device__ TilePages(const DecodeParams& p, const Chunk& chunk, int tile) {
#pragma unroll
    for (int i = 0; i < SPANS; i++) {
      const int token = (chunk.first_tile + tile) * TILE + i * SPAN;
      const bool is_needed = tile < chunk.num_tiles && token < chunk.length;
      ids[i] = is_needed ? p.block_table[chunk.sequence * p.table_stride + token / PAGE_SIZE] : 0;
    }
  }
};

// A tile may be brought when its stage is empty and the tile MOST_UNDER_WAY before it has come.
__device__ void wait_for_room(Shared& s, Turn<STAGES> stage) {
  const Turn<STAGES> earlier{stage.n - MOST_UNDER_WAY};
  ptx::wait(&s.tile_empty[stage.slot()], stage.phase() ^ 1);
  if (earlier.n >= 0) ptx::wait(&s.tile_full[earlier.slot()], earlier.phase());
}
__device__ bool has_room(Shared& s, Turn<STAGES> stage) {
  const Turn<STAGES> earlier{stage.n - MOST_UNDER_WAY};
  return ptx::has_ended(&s.tile_empty[stage.slot()], stage.phase() ^ 1) &&
         (earlier.n < 0 || ptx::has_ended(&s.tile_full[earlier.slot()], earlier.phase()));
}

__device__ int run_producer(Shared& s, const DecodeParams& p, int producer) {
  // Pages are read once a step. If they are few, let L2 forget them first and keep what others left there; if they are
  // many, all is forgotten anyway, and ordinary replacement was measured 2% faster.
  constexpr i64 MANY_BYTES = 400ll << 20;
  const bool is_many = p.header->total_tiles > MANY_BYTES / TILE_BYTES;
  const u64 policy = is_many ? ptx::evict_normal_policy() : ptx::evict_first_policy();
  int tiles_before = 0;
  for (int n = 0;; n++) {
    const Turn<CHUNK_SLOTS> turn{n};
    ptx::wait(&s.chunk_full[turn.slot()], turn.phase());
    const Chunk chunk = s.chunks[turn.slot()];
    if (!chunk.num_tiles) return n;
    const u8* head = p.pages + (i64)(chunk.unit / ROW_GROUPS) * HEAD_BYTES;
    int first = (producer + PRODUCERS - tiles_before % PRODUCERS) % PRODUCERS;
    TilePages next_pages(p, chunk, first + lane_index() * PRODUCERS);
    // Once around the ring, a lane for each tile: what a copy needs is worked out for all of them at once, before any
    // stage is free.
#pragma unroll 1
    for (; first < chunk.num_tiles; first += STAGES) {
      const TilePages pages = next_pages;
      const int tile = first + lane_index() * PRODUCERS, token = (chunk.first_tile + tile) * TILE;
      next_pages = TilePages(p, chunk, tile + STAGES);
      const Turn<STAGES> stage{tiles_before + tile};
      const int spans = max(0, min(SPANS, divide_up(chunk.length - token, SPAN)));
      const u8* from[SPANS];
#pragma unroll
      for (int i = 0; i < SPANS; i++) from[i] = head + pages.ids[i] * p.page_stride;
      u8* to = s.tiles[stage.slot()];
      u64* full = &s.tile_full[stage.slot()];

      u32 due = __ballot_sync(ALL_LANES, lane_index() < STAGES / PRODUCERS && tile < chunk.num_tiles);
#pragma unroll 1
      while (due) {
        wait_for_room(s, {tiles_before + first + (__ffs(due) - 1) * PRODUCERS});
        // In order: a tile must not fill a stage anew while an earlier one waits to see that stage full.
        const u32 blocked = due & ~__ballot_sync(ALL_LANES, has_room(s, stage)),
                  ready = due & ((blocked & -blocked) - 1);
        if (ready >> lane_index() & 1) {
          ptx::arrive_expecting(full, spans * SPAN_BYTES);
          if constexpr (PAGE_SIZE == SPAN) {
#pragma unroll
            for (int i = 0; i < SPANS; i++)
              if (i < spans) ptx::copy_to_shared(to + i * SPAN_BYTES, from[i], SPAN_BYTES, full, policy);
          } else if (spans) {  // a part of a page: one copy for each of its planes
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const int plane = i / 2 * (ROW_BYTES + META_BYTES) + i % 2 * ROW_BYTES,
                        bytes = i % 2 ? META_BYTES : ROW_BYTES;
              ptx::copy_to_shared(to + SPAN * plane, from[0] + PAGE_SIZE * plane + token % PAGE_SIZE * bytes,
                                  SPAN * bytes, full, policy);
            }
          }
        }
        due &= ~ready;
      }
    }
    tiles_before += chunk.num_tiles;
  }
}

// ----------------------------------------------------------------------------------------------------------------
// consumers Fragment layouts of mma.m16n8k16 give lane l the row l / 4 of A and the columns 2 (l % 4) and + 1 of the
// result. Scores are S^T = K Q^T (tokens by queries), the output is O^T = V^T P^T (channels by queries).

constexpr int V_SHIFT =
    60;  // weights are stored in bf16 times 2^60: far from both ends of the range for every fp16 scale

struct Consumer {
  static constexpr int WORDS = D / 32;              // of K codes that a lane holds of one token
  static constexpr int PART = TILE / COLUMN_TILES;  // tokens attended at once: as many as registers hold scores for
  static constexpr int BLOCKS = PART / 16;

  float maximum[COLUMN_TILES][2], sum[COLUMN_TILES][2];
  float zero[COLUMN_TILES][2];  // sum of weight * v_scale * v_zero
  float out[COLUMN_TILES][D / 16][4];

  __device__ void start() {
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        maximum[t][e] = -1e30f;
        sum[t][e] = zero[t][e] = 0;
      }
#pragma unroll
      for (int i = 0; i < D / 16; i++) out[t][i][0] = out[t][i][1] = out[t][i][2] = out[t][i][3] = 0;
    }
  }

  // The 16 tokens from `token` on: their span, and their place in it.
  static __device__ const u8* span_of(const u8* tile, int token) { return tile + token / SPAN * SPAN_BYTES; }

  // `queries`: this lane's part of those of the warp's rows
  static __device__ void multiply_keys(const u8* tile, int part, const uint4* queries,
                                       float (&scores)[COLUMN_TILES][BLOCKS][4]) {
    constexpr int LOAD = largest_power_of_two_in(WORDS) < 4 ? largest_power_of_two_in(WORDS) : 4;
    u32 upper[BLOCKS][WORDS], lower[BLOCKS][WORDS];  // tokens l / 4 and l / 4 + 8
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int token = part + 16 * b;
      const u8* row =
          span_of(tile, token) + (token % SPAN + lane_index() / 4) * ROW_BYTES + lane_index() % 4 * (ROW_BYTES / 4);
#pragma unroll
      for (int w = 0; w < WORDS; w += LOAD) {
        const auto u = *(const Vector<u32, LOAD>*)(row + 4 * w),
                   l = *(const Vector<u32, LOAD>*)(row + 8 * ROW_BYTES + 4 * w);
#pragma unroll
        for (int e = 0; e < LOAD; e++) upper[b][w + e] = u.x[e], lower[b][w + e] = l.x[e];
      }
#pragma unroll
      for (int t = 0; t < COLUMN_TILES; t++) scores[t][b][0] = scores[t][b][1] = scores[t][b][2] = scores[t][b][3] = 0;
    }
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      u32 query[COLUMN_TILES][2][2];
#pragma unroll
      for (int t = 0; t < COLUMN_TILES; t++) {
        const uint4 q = queries[(t * WORDS + w) * WARP];
        query[t][0][0] = q.x, query[t][0][1] = q.y, query[t][1][0] = q.z, query[t][1][1] = q.w;
      }
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        const u32 u = upper[b][w], l = lower[b][w], u_high = u >> 8, l_high = l >> 8;
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const u32 a0 = nibbles(u, u_high, 2 * k), a1 = nibbles(l, l_high, 2 * k);
          const u32 a2 = nibbles(u, u_high, 2 * k + 1), a3 = nibbles(l, l_high, 2 * k + 1);
#pragma unroll
          for (int t = 0; t < COLUMN_TILES; t++) ptx::mma_half(scores[t][b], a0, a1, a2, a3, query[t][k]);
        }
      }
    }
  }

  // `stats`: those of the lane's first query column
  static __device__ void scale_scores(const u8* tile, int part, const QueryStats* stats, float softcap_log2,
                                      float (&scores)[COLUMN_TILES][BLOCKS][4]) {
    QueryStats query[COLUMN_TILES][2];
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) query[t][e] = stats[8 * t + e];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int token = part + 16 * b;
      const u32* meta = (const u32*)(span_of(tile, token) + K_META) + token % SPAN + lane_index() / 4;
#pragma unroll
      for (int h = 0; h < 2; h++) {  // the lane's two tokens
        const float scale = ptx::low_half_to_float(meta[8 * h]), zero_point = ptx::high_half_to_float(meta[8 * h]);
#pragma unroll
        for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float& score = scores[t][b][2 * h + e];
            score = (score - zero_point * query[t][e].sum) * (scale * query[t][e].factor);
#if SOFTCAP
#if OFFSET
            score += query[t][e].offset;
#endif
            score =
                softcap_log2 * (1 - 2 / (1 + ptx::exp2(score)));  // cap * tanh(x / cap): the score is 2 x / cap in log2
#endif
          }
      }
    }
  }

  // Scores of tokens that a query does not see, or that are not there, to minus infinity.
  __device__ void mask_scores(const Chunk& chunk, int window, int first_row, int first_token,
                              float (&scores)[COLUMN_TILES][BLOCKS][4]) const {
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const QueryRow row(chunk.unit, first_row + 8 * t + 2 * (lane_index() % 4) + e);
        const int last = min(chunk.length - chunk.query_len + row.token, chunk.length - 1);
        const int first = window ? last - window + 1 : 0;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int token = first_token + 16 * b + 8 * h + lane_index() / 4;
            if (token > last || token < first) scores[t][b][2 * h + e] = -infinity();
          }
      }
  }

  // Rescale lazily: only when a maximum grows by more than 4 in log2, so weights stay below 2^4.
  __device__ void raise_maximum(const float (&scores)[COLUMN_TILES][BLOCKS][4]) {
    float largest[COLUMN_TILES][2];
    bool grows = false;
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        largest[t][e] = maximum[t][e];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
          largest[t][e] = fmaxf(largest[t][e], fmaxf(scores[t][b][e], scores[t][b][2 + e]));
        grows |= largest[t][e] > maximum[t][e] + 4;
      }
    if (!__any_sync(ALL_LANES, grows)) return;
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
#pragma unroll
        for (int d = 4; d < WARP; d *= 2)
          largest[t][e] = fmaxf(largest[t][e], __shfl_xor_sync(ALL_LANES, largest[t][e], d));
        const float factor = ptx::exp2(maximum[t][e] - largest[t][e]);
        maximum[t][e] = largest[t][e];
        sum[t][e] *= factor;
        zero[t][e] *= factor;
#pragma unroll
        for (int i = 0; i < D / 16; i++) out[t][i][e] *= factor, out[t][i][2 + e] *= factor;
      }
  }

  // `is_masked`: some weights are 0 because their token is not to be seen; its scale and zero point may be NaN.
  __device__ void multiply_values(const u8* tile, int part, bool is_masked,
                                  const float (&scores)[COLUMN_TILES][BLOCKS][4]) {
    const int lane = lane_index();
    const int swizzle = lane % 8 * ODD_SEGMENTS * SWIZZLE_PERIOD / 8 % SWIZZLE_PERIOD;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int token = part + 16 * b;
      const u8* span = span_of(tile, token);
      const u32* meta = (const u32*)(span + V_META) + token % SPAN + lane / 4;
      u32 weights[COLUMN_TILES][2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float scale = ptx::low_half_to_float(meta[8 * h]) * power_of_two(V_SHIFT),
                    zero_point = ptx::high_half_to_float(meta[8 * h]);
#pragma unroll
        for (int t = 0; t < COLUMN_TILES; t++) {
          float scaled[2];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const float weight = ptx::exp2(scores[t][b][2 * h + e] - maximum[t][e]);
            sum[t][e] += weight;
            scaled[e] = is_masked && weight == 0 ? 0 : weight * scale;
          }
          const u32 rounded = ptx::pack_bfloats(scaled[0], scaled[1]);
          // From the rounded weights, so that rounding acts on n - zero and not on n and zero apart
          zero[t][0] += is_masked && scaled[0] == 0 ? 0 : ptx::low_bfloat_to_float(rounded) * zero_point;
          zero[t][1] += is_masked && scaled[1] == 0 ? 0 : ptx::high_bfloat_to_float(rounded) * zero_point;
          weights[t][h] = ptx::transpose_matrix(rounded);
        }
      }
      const u32 rows = ptx::shared_address(span + V_CODES + (token % SPAN + lane % 16) * ROW_BYTES);
#pragma unroll
      for (int segment = 0; segment < SEGMENTS; segment += 2) {
        u32 r[4];  // segment: tokens 0-7, 8-15; segment + 1: the same
        if (segment + 1 < SEGMENTS) {
          ptx::load_4_matrices_transposed(r, rows + ((segment + lane / 16) ^ swizzle) * 16);
        } else {
          ptx::load_2_matrices_transposed(r[0], r[1], rows + (segment ^ swizzle) * 16);
        }
#pragma unroll
        for (int i = 0; i < 2 && segment + i < SEGMENTS; i++) {
          const u32 x = r[2 * i], y = r[2 * i + 1], x_high = x >> 8, y_high = y >> 8;
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const u32 a0 = nibbles(x, x_high, 2 * k), a1 = nibbles(x, x_high, 2 * k + 1);
            const u32 a2 = nibbles(y, y_high, 2 * k), a3 = nibbles(y, y_high, 2 * k + 1);
#pragma unroll
            for (int t = 0; t < COLUMN_TILES; t++)
              ptx::mma_bfloat(out[t][2 * (segment + i) + k], a0, a1, a2, a3, weights[t]);
          }
        }
      }
    }
  }

  // Attend the tokens of `tile` from `part` on. `first_token` is the position of the tile's first.
  __device__ void attend(const u8* tile, int part, const Shared& s, int slot, const Chunk& chunk, const DecodeParams& p,
                         int first_row, int first_token) {
    float scores[COLUMN_TILES][BLOCKS][4];
    multiply_keys(tile, part, (const uint4*)&s.queries[slot][first_row * D] + lane_index(), scores);
    scale_scores(tile, part, &s.query_stats[slot][first_row + 2 * (lane_index() % 4)], p.softcap_log2, scores);
    const int begin = first_token + part;
    const bool is_masked =
        begin + PART > chunk.length - chunk.query_len + 1 || (p.window && begin < chunk.length - p.window);
    if (is_masked) mask_scores(chunk, p.window, first_row, begin, scores);
    raise_maximum(scores);
    multiply_values(tile, part, is_masked, scores);
  }

  // Hand the result of a chunk to the merge warp.
  __device__ void store(Shared& s, int slot, int warp) {
    const int lane = lane_index();
    constexpr int CODE_EXPONENT = 133 - V_SHIFT;  // bf16 codes are n * 2^-133
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
#pragma unroll
        for (int d = 4; d < WARP; d *= 2) {
          sum[t][e] += __shfl_xor_sync(ALL_LANES, sum[t][e], d);
          zero[t][e] += __shfl_xor_sync(ALL_LANES, zero[t][e], d);
        }
        const int row = 8 * t + 2 * (lane % 4) + e;
        if (row >= ROWS) continue;
        const float even = power_of_two(CODE_EXPONENT), odd = power_of_two(CODE_EXPONENT - 4),
                    offset = zero[t][e] * power_of_two(-V_SHIFT);
        auto* channels = (Vector<float, 4>*)s.results[slot][warp][row];
#pragma unroll
        for (int i = 0; i < SEGMENTS; i++)  // 32 channels, four of them this lane's
          channels[8 * i + lane / 4] = {out[t][2 * i][e] * even - offset, out[t][2 * i][2 + e] * odd - offset,
                                        out[t][2 * i + 1][e] * even - offset, out[t][2 * i + 1][2 + e] * odd - offset};
        if (lane / 4 == 0) s.result_stats[slot][warp][row] = {maximum[t][e], sum[t][e]};
      }
  }
};

__device__ void run_consumer(Shared& s, const DecodeParams& p, int warp) {
  const int group = warp / ROW_BLOCKS, first_row = warp % ROW_BLOCKS * BLOCK_ROWS;
  int tiles_before = 0;
  for (int n = 0;; n++) {
    const Turn<CHUNK_SLOTS> turn{n};
    ptx::wait(&s.queries_full[turn.slot()], turn.phase());
    const Chunk chunk = s.chunks[turn.slot()];
    if (!chunk.num_tiles) return;
    Consumer consumer;
    consumer.start();
    for (int tile = (group + GROUPS - tiles_before % GROUPS) % GROUPS; tile < chunk.num_tiles; tile += GROUPS) {
      const Turn<STAGES> stage{tiles_before + tile};
      ptx::wait(&s.tile_full[stage.slot()], stage.phase());
#pragma unroll 1
      for (int part = 0; part < TILE; part += Consumer::PART)
        consumer.attend(s.tiles[stage.slot()], part, s, turn.slot(), chunk, p, first_row,
                        (chunk.first_tile + tile) * TILE);
      __syncwarp();
      if (arrives()) ptx::arrive(&s.tile_empty[stage.slot()]);
    }
    tiles_before += chunk.num_tiles;
    const Turn<RESULT_SLOTS> result{n};
    ptx::wait(&s.results_empty[result.slot()], result.phase() ^ 1);
    consumer.store(s, result.slot(), warp);
    __syncwarp();
    if (arrives()) ptx::arrive(&s.results_full[result.slot()]);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// merge Add the groups' results of rows first, first + step, ... of the n-th chunk. They are there.
__device__ void merge_rows(const Shared& s, const DecodeParams& p, int n, int first, int step) {
  const Chunk chunk = s.chunks[Turn<CHUNK_SLOTS>{n}.slot()];
  const int slot = Turn<RESULT_SLOTS>{n}.slot();
  for (int r = first; r < CHUNK_ROWS; r += step) {
    const QueryRow row(chunk.unit, r);
    if (is_padding(r) || row.token >= chunk.query_len) continue;
    Row<D> outs[GROUPS];
    float2 stats[GROUPS];
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      const int warp = group * ROW_BLOCKS + r / BLOCK_ROWS;
      outs[group] = Row<D>::load(s.results[slot][warp][r % BLOCK_ROWS]);
      stats[group] = s.result_stats[slot][warp][r % BLOCK_ROWS];
    }
    Result merged = Result::none();
    merged.add(outs, stats);
    if (chunk.partial < 0) {
      merged.write(p, chunk.query_start, row);
    } else {
      const i64 index = (i64)chunk.partial * CHUNK_ROWS + r;
      merged.out.store(p.partials + index * D);
      if (lane_index() == 0) p.partial_stats[index] = {merged.maximum, merged.sum};
    }
  }
}

// Whether the n-th chunk, once it is known, turns out to be none.
__device__ bool is_end(Shared& s, int n) {
  const Turn<CHUNK_SLOTS> turn{n};
  ptx::wait(&s.chunk_full[turn.slot()], turn.phase());
  return s.chunks[turn.slot()].num_tiles == 0;
}

// Where all helpers end. Merge warps share the rows of every chunk from the first on; the others come for the last one,
// n, which all share.
__device__ void run_merger(Shared& s, const DecodeParams& p, int helper, int n) {
  for (;; n++) {
    const bool is_last = helper < FIRST_MERGER || is_end(s, n + 1);
    const Turn<RESULT_SLOTS> result{n};
    if (helper >= FIRST_MERGER) {
      ptx::wait(&s.results_full[result.slot()], result.phase());
      if (is_last && helper == FIRST_MERGER && arrives()) ptx::arrive(&s.last_results_full);
    } else {
      ptx::wait(&s.last_results_full, 0);
    }
    merge_rows(s, p, n, is_last ? helper : helper - FIRST_MERGER, is_last ? HELPERS : MERGERS);
    if (is_last) return;
    __syncwarp();
    if (arrives()) {
      ptx::arrive(&s.results_empty[result.slot()]);
      ptx::arrive(&s.chunk_empty[Turn<CHUNK_SLOTS>{n}.slot()]);
    }
  }
}

}  // namespace sawkv

using namespace sawkv;

extern "C" {

__device__ int sawkv_threads = THREADS;
__device__ int sawkv_shared_bytes = sizeof(Shared);

__global__ void __launch_bounds__(THREADS, 1) sawkv_decode(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) u8 dynamic[];
  Shared& s = *(Shared*)dynamic;
  if (threadIdx.x == 0) s.init_barriers();
  if constexpr (ROWS < BLOCK_ROWS) {  // rows of padding stay zero
#pragma unroll 1                      // code is read from memory too, and nothing runs beside this
    for (int i = threadIdx.x; i < (int)sizeof(s.queries) / 16; i += THREADS) ((uint4*)s.queries)[i] = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = threadIdx.x; i < (int)sizeof(s.query_stats) / 8; i += THREADS) ((float2*)s.query_stats)[i] = {0, 0};
  }
  __syncthreads();
  ptx::wait_for_prerequisites();
  ptx::let_dependents_launch();  // after the wait: the merge kernel may read the plan at once
  const int warp = warp_index();
  if (warp < CONSUMERS) {
    run_consumer(s, p, warp);
    return;
  }
  const int helper = warp - CONSUMERS;
  int chunk = 0;
  if (helper < PRODUCERS)
    chunk = run_producer(s, p, helper) - 1;
  else if (helper == SCHEDULER)
    chunk = run_scheduler(s, p) - 1;
  else if (is_end(s, 0))
    return;
  if (chunk >= 0) run_merger(s, p, helper, chunk);
}

// Add the chunks of each split unit. A warp takes a row where there are few chunks; all warps of a block share one
// where there are many.
constexpr int MERGE_WARPS = 8;

__global__ void __launch_bounds__(MERGE_WARPS* WARP) sawkv_merge(const __grid_constant__ DecodeParams p) {
  constexpr int MANY = 8, AT_ONCE = 4, ROWS_PER_UNIT = ROW_BLOCKS * ROWS;
  __shared__ float shared_outs[MERGE_WARPS][D];
  __shared__ float2 shared_stats[MERGE_WARPS];
  const PlanHeader header = *p.header;  // the decode kernel started after the plan was there
  const bool share = header.num_split_chunks > MANY * header.num_split_units;
  const int num_rows = header.num_split_units * ROWS_PER_UNIT, warp = warp_index();
  const int first = share ? blockIdx.x : blockIdx.x * MERGE_WARPS + warp,
            step = share ? gridDim.x : gridDim.x * MERGE_WARPS;
  SplitUnit split{};
  if (first < num_rows) split = p.splits[first / ROWS_PER_UNIT];
  ptx::wait_for_prerequisites();
  ptx::let_dependents_launch();
  for (int i = first; i < num_rows; i += step) {
    if (i != first) split = p.splits[i / ROWS_PER_UNIT];
    const int r = i % ROWS_PER_UNIT / ROWS * BLOCK_ROWS + i % ROWS;
    const QueryRow row(split.unit, r);
    if (row.token >= split.query_len) continue;  // the same for all warps that share it
    Result merged = Result::none();
    const int begin = share ? warp : 0, stride = share ? MERGE_WARPS : 1;
    for (int c = begin; c < split.num_chunks; c += AT_ONCE * stride) {
      Row<D> outs[AT_ONCE];
      float2 stats[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const bool is_there = c + k * stride < split.num_chunks;
        const i64 index = (i64)(split.first_chunk + c + k * stride) * CHUNK_ROWS + r;
        outs[k] = is_there ? Row<D>::load(p.partials + index * D) : Row<D>::filled(0);
        stats[k] = is_there ? p.partial_stats[index] : float2{-1e30f, 0};
      }
      merged.add(outs, stats);
    }
    if (share) {
      __syncthreads();
      merged.out.store(shared_outs[warp]);
      if (lane_index() == 0) shared_stats[warp] = {merged.maximum, merged.sum};
      __syncthreads();
      if (warp != 0) continue;
      Row<D> outs[MERGE_WARPS - 1];
      float2 stats[MERGE_WARPS - 1];
#pragma unroll
      for (int w = 1; w < MERGE_WARPS; w++) {
        outs[w - 1] = Row<D>::load(shared_outs[w]);
        stats[w - 1] = shared_stats[w];
      }
      merged.add(outs, stats);
    }
    merged.write(p, split.query_start, row);
  }
}

}  // extern "C"
