// The scheduler warp: takes chunks from the schedule; loads, rotates and normalizes their queries.
//
// Included after the kernel defines Shared, CHUNK_SLOTS, SCHEDULERS, ROWS, is_padding, fragment_index, offsets_at,
// QUERIES_AT_ONCE, QUERY_LANES, CODE_EXPONENT and query_factor.
#pragma once
#include "attention.cuh"
#include "tiles.cuh"

namespace sawkv {

constexpr int QUERIES_ABREAST = WARP / QUERY_LANES, QUERY_SETS = QUERIES_AT_ONCE / QUERIES_ABREAST;
using Query = Row<D, QUERY_LANES>;
// The lane's row of a set of queries
__device__ inline int query_of(int set) { return set * QUERIES_ABREAST + lane_index() / QUERY_LANES; }

// `is_there`: whether the lane's row r is stored
__device__ void store_query(Shared& s, const DecodeParams& p, int slot, int r, Query q, int head,
                            const Query& gain_inverse, bool is_there) {
  QueryStats stats;
#if SOFTCAP && OFFSET && !BY_BUCKET
  stats.offset = center_score(p, q, Query::load(p.k_center + head * D));
#endif
  if (GAIN) q.multiply(gain_inverse);
  rotate<K_ORDER>(q);
  float largest = 0;
#pragma unroll
  for (int i = 0; i < Query::PER_LANE; i++) largest = fmaxf(largest, fabsf(q.x[i]));
  // Scale by a power of two to the top of fp16's range. NaN and infinities are unchanged.
  const int exponent = min(max((int)(__float_as_uint(max_over_lanes<QUERY_LANES>(largest)) >> 23) - 127, -100), 100);
  q.scale(power_of_two(13 - exponent));
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Query::PER_LANE; i++) sum += ptx::half_to_float(ptx::float_to_half(q.x[i]));
  sum = sum_over_lanes<QUERY_LANES>(sum);
  if (!is_there) return;
#pragma unroll
  for (int i = 0; i < Query::PER_LANE; i++) {
    const int c = Query::channel(i);
    s.queries[slot][fragment_index(r, c)] = ptx::float_to_half(q.x[i] * query_factor(c));
  }
  stats.sum = sum * power_of_two(-CODE_EXPONENT);
  stats.factor = p.scale_log2 * power_of_two(CODE_EXPONENT + exponent - 13);
  if (Query::lane() == 0) s.query_stats[slot][r] = stats;
}

#if BY_BUCKET
// Writes q . center of these queries for each bucket of the chunk. `offsets`: of the first query and bucket.
__device__ void store_offsets(float* offsets, const DecodeParams& p, const Chunk& chunk, int head,
                              const Query (&queries)[QUERY_SETS]) {
  const int first = chunk.first_tile * TILE / BUCKET_SIZE;
  const int count = chunk_bucket(chunk, (chunk.first_tile + chunk.num_tiles) * TILE - 1) + 1;
  const auto center_of = [&](int bucket) {
    return Query::load(p.k_center + ((i64)min(bucket, p.num_buckets - 1) * p.num_kv_heads * PARTS + head) * D);
  };
  Query next = center_of(first);  // loaded one ahead, while sums go from lane to lane
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    const Query center = next;
    next = center_of(first + i + 1);
#pragma unroll
    for (int set = 0; set < QUERY_SETS; set++) {
      const float score = center_score(p, queries[set], center);
      if (Query::lane() == 0) offsets[i * QUERY_PARTS + query_of(set)] = score;
    }
  }
}

// Cuts the next entry of the ring off the front of a chunk: at most CHUNK_BUCKETS buckets.
__device__ Chunk take_entry(Chunk& chunk) {
  constexpr int BUCKET_TILES = BUCKET_SIZE / TILE;
  const int end = (chunk.first_tile / BUCKET_TILES + CHUNK_BUCKETS) * BUCKET_TILES;
  Chunk entry = chunk;
  entry.num_tiles = min(chunk.num_tiles, end - chunk.first_tile);
  chunk.first_tile += entry.num_tiles;
  chunk.num_tiles -= entry.num_tiles;
  if (chunk.num_tiles) entry.partial = CONTINUED;
  return entry;
}
#endif

// SCHEDULERS warps share the rows. `n`: the entry's number in the ring.
__device__ void prepare_queries(Shared& s, const DecodeParams& p, const Chunk& chunk, int n, int share) {
  // Rows of padding are the last ones of a unit.
  constexpr int STEP = SCHEDULERS * QUERIES_AT_ONCE, STEPS = divide_up(ROWS < BLOCK_ROWS ? ROWS : CHUNK_ROWS, STEP);
  const int slot = Turn<CHUNK_SLOTS>{n}.slot();
#pragma unroll 1
  for (int i = 0; i < STEPS * PARTS << log2_units(chunk); i++) {
    const int number = i / STEPS, unit = chunk.unit + number / PARTS, part = number % PARTS;
    const int head = kv_head_of(chunk, unit) * PARTS + part, first = i % STEPS * STEP + share * QUERIES_AT_ONCE;
    const int first_row = number * CHUNK_ROWS + first;
    Query queries[QUERY_SETS];
#pragma unroll
    for (int set = 0; set < QUERY_SETS; set++) {
      const QueryRow row(unit, chunk.query_len, first + query_of(set));
      queries[set] = Query::filled(0);
      if (!is_padding(first + query_of(set)) && row.token < chunk.query_len)
        queries[set] = Query::load(p.q + (i64)(chunk.query_start + row.token) * p.q_token_stride +
                                   row.head * p.q_head_stride + part * D);
    }
    const auto gain_inverse = GAIN && p.k_gain_inverse ? Query::load(p.k_gain_inverse + head * D) : Query::filled(1);
#if BY_BUCKET
    store_offsets(offsets_at(s, n, 0, first_row), p, chunk, head, queries);
#endif
#pragma unroll
    for (int set = 0; set < QUERY_SETS; set++)
      store_query(s, p, slot, first_row + query_of(set), queries[set], head, gain_inverse,
                  !is_padding(first + query_of(set)));
  }
}

// Tiles of a chunk that leave time to claim the next one and prepare its queries while they are copied. A block that
// claimed it earlier would keep a chunk waiting that another block, done with its own, could begin.
constexpr int LONG_CHUNK = 16;

// run_scheduler and run_producer return the number of entries of the ring that the block took: its chunks, and with
// BY_BUCKET the entries into which long ones were cut.
__device__ int run_scheduler(Shared& s, const DecodeParams& p) {
  const int num_chunks = p.header->num_chunks;
  int next = blockIdx.x;  // the first chunk is fixed, the others are claimed
#if BY_BUCKET
  Chunk rest{};  // of a chunk that is cut into entries
#endif
  for (int n = 0;; n++) {
    const Turn<CHUNK_SLOTS> turn{n};
    const int slot = turn.slot();
#if BY_BUCKET
    if (!rest.num_tiles) {
      rest = p.chunks[next];
      if (next >= num_chunks) rest.num_tiles = 0;
    }
    const Chunk chunk = take_entry(rest);
#else
    Chunk chunk = p.chunks[next];  // there is room for one claim per block beyond the last chunk
    if (next >= num_chunks) chunk.num_tiles = 0;
#endif
    ptx::wait(&s.chunk_empty[slot], turn.phase() ^ 1);
    if (arrives()) {
      if (lane_index() == 0) s.chunks[slot] = chunk;
      ptx::arrive(&s.chunk_full[slot]);
    }
    // Each chunk is followed by one claim. There are thus as many claims as chunks, and the counter wraps to 0 for the
    // next launch.
    const auto claim = [&] {
      if (lane_index() == 0 && chunk.num_tiles && !is_continued(chunk))
        next = gridDim.x + atomicInc(&p.header->claimed, num_chunks - 1);
    };
    const bool is_long = num_tiles(chunk) >= LONG_CHUNK && !is_continued(chunk);
    if (!is_long) claim();
    if (chunk.num_tiles) prepare_queries(s, p, chunk, n, 0);
    __syncwarp();
    if (arrives()) ptx::arrive(&s.queries_full[slot]);
    if (!chunk.num_tiles) return n;
    if (is_long) {
      ptx::wait(&s.chunk_begun[slot], turn.phase());
      claim();
    }
    next = __shfl_sync(ALL_LANES, next, 0);
  }
}

// A warp that only prepares queries. Consumers free a chunk's slot when they have its queries, so it has read it by
// then.
__device__ inline void share_scheduling(Shared& s, const DecodeParams& p, int share) {
  for (int n = 0;; n++) {
    const Turn<CHUNK_SLOTS> turn{n};
    ptx::wait(&s.chunk_full[turn.slot()], turn.phase());
    const Chunk chunk = s.chunks[turn.slot()];
    if (chunk.num_tiles) prepare_queries(s, p, chunk, n, share);
    __syncwarp();
    if (arrives()) ptx::arrive(&s.queries_full[turn.slot()]);
    if (!chunk.num_tiles) return;
  }
}

}  // namespace sawkv
