// The scheduler warp: takes chunks from the schedule; loads, rotates and normalizes their queries.
//
// Included after the kernel defines Shared, CHUNK_SLOTS, SCHEDULERS, ROWS, is_padding, fragment_index, offsets_at,
// QUERIES_AT_ONCE, CODE_EXPONENT and query_factor.
#pragma once
#include "attention.cuh"
#include "tiles.cuh"

namespace sawkv {

__device__ void store_query(Shared& s, const DecodeParams& p, int slot, int r, Row<D> q, int head,
                            const Row<D>& gain_inverse) {
  QueryStats stats;
#if SOFTCAP && OFFSET && !BY_BUCKET
  stats.offset = center_score(p, q, Row<D>::load(p.k_center + head * D));
#endif
  if (GAIN) q.multiply(gain_inverse);
  rotate<K_ORDER>(q);
  float largest = 0;
#pragma unroll
  for (int i = 0; i < Row<D>::PER_LANE; i++) largest = fmaxf(largest, fabsf(q.x[i]));
  // Scale by a power of two to the top of fp16's range. NaN and infinities are unchanged.
  const int exponent = min(max((int)(__float_as_uint(max_over_lanes(largest)) >> 23) - 127, -100), 100);
  q.scale(power_of_two(13 - exponent));
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Row<D>::PER_LANE; i++) {
    const int c = Row<D>::channel(i);
    sum += ptx::half_to_float(ptx::float_to_half(q.x[i]));
    s.queries[slot][fragment_index(r, c)] = ptx::float_to_half(q.x[i] * query_factor(c));
  }
  sum = sum_over_lanes(sum);
  stats.sum = sum * power_of_two(-CODE_EXPONENT);
  stats.factor = p.scale_log2 * power_of_two(CODE_EXPONENT + exponent - 13);
  if (lane_index() == 0) s.query_stats[slot][r] = stats;
}

#if BY_BUCKET
// Writes q . center of these queries for each bucket of the chunk. `offsets`: of the first query and bucket.
__device__ void store_offsets(float* offsets, const DecodeParams& p, const Chunk& chunk, int head,
                              const Row<D> (&queries)[QUERIES_AT_ONCE]) {
  const int first = chunk.first_tile * TILE / BUCKET_SIZE;
  const int count = chunk_bucket(chunk, (chunk.first_tile + chunk.num_tiles) * TILE - 1) + 1;
  const auto center_of = [&](int bucket) {
    return Row<D>::load(p.k_center + ((i64)min(bucket, p.num_buckets - 1) * p.num_kv_heads * PARTS + head) * D);
  };
  Row<D> next = center_of(first);  // loaded one ahead, while sums go from lane to lane
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    const Row<D> center = next;
    next = center_of(first + i + 1);
#pragma unroll
    for (int k = 0; k < QUERIES_AT_ONCE; k++) {
      const float score = center_score(p, queries[k], center);
      if (lane_index() == 0) offsets[i * QUERY_PARTS + k] = score;
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
  const int slot = Turn<CHUNK_SLOTS>{n}.slot();
#pragma unroll 1
  for (int part = 0; part < PARTS; part++) {
    const int head = kv_head_of(chunk) * PARTS + part, first_row = part * CHUNK_ROWS;
    const auto gain_inverse = GAIN && p.k_gain_inverse ? Row<D>::load(p.k_gain_inverse + head * D) : Row<D>::filled(1);
    for (int first = share * QUERIES_AT_ONCE; first < CHUNK_ROWS; first += SCHEDULERS * QUERIES_AT_ONCE) {
      if (is_padding(first)) continue;
      Row<D> rows[QUERIES_AT_ONCE];
#pragma unroll
      for (int i = 0; i < QUERIES_AT_ONCE; i++) {
        const QueryRow row(chunk.unit, chunk.query_len, first + i);
        rows[i] = Row<D>::filled(0);
        if (!is_padding(first + i) && row.token < chunk.query_len)
          rows[i] = Row<D>::load(p.q + (i64)(chunk.query_start + row.token) * p.q_token_stride +
                                 row.head * p.q_head_stride + part * D);
      }
#if BY_BUCKET
      store_offsets(offsets_at(s, n, 0, first_row + first), p, chunk, head, rows);
#endif
#pragma unroll
      for (int i = 0; i < QUERIES_AT_ONCE; i++)
        store_query(s, p, slot, first_row + first + i, rows[i], head, gain_inverse);
    }
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
