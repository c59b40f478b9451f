// Roles of the decode kernel's warps, and their shared memory.
//
// Macros: those of attention.cuh, PAGE_SIZE, ROWS, COLUMN_TILES, ROW_BLOCKS.
#pragma once
#include "attention.cuh"
#include "tiles.cuh"

namespace sawkv {

// At fewer bits memory is so fast that eight consumers, which mostly wait for what they themselves have begun, cannot
// follow. Twelve have 128 registers each, which is too few for two column tiles, and for buckets beside V of 3 bits.
constexpr bool HAS_TWELVE = K_BITS + V_BITS <= 6 && D <= 128 && COLUMN_TILES == 1 && (V_BITS == 2 || !BY_BUCKET);
constexpr int CONSUMERS = HAS_TWELVE ? 12 : 8, HELPERS = 4;  // helpers: all other warps, producers first
constexpr int COPIES = PAGE_SIZE == SPAN ? SPANS : 4;        // of a tile: of pages, or of the planes of a part of one
constexpr int PRODUCERS = COPIES < 4 ? 1 : 2, SCHEDULER = PRODUCERS, FIRST_MERGER = SCHEDULER + 1,
              MERGERS = HELPERS - FIRST_MERGER;
constexpr int GROUPS = CONSUMERS / ROW_BLOCKS;  // a group's warps share a tile, each with its own rows
constexpr int RESULT_GROUPS = GROUPS / PARTS;   // groups of neighbours, which have the parts of the same tokens
constexpr int BLOCK_ROWS = 8 * COLUMN_TILES;    // rows of a row block, with padding
constexpr int THREADS = (CONSUMERS + HELPERS) * WARP;
static_assert(CONSUMERS % (ROW_BLOCKS * PARTS) == 0 && ROWS <= BLOCK_ROWS && CHUNK_ROWS == ROW_BLOCKS * BLOCK_ROWS,
              "row blocks are dealt evenly");

// Rows stored of each eight. Lanes of others read some of these once more, and nothing follows from their results.
constexpr int ROWS_OF_EIGHT = ROWS < 8 ? ROWS : 8;
constexpr int RESULT_BYTES = CONSUMERS * ROWS * (D + 2) * 4;
constexpr int RESULT_SLOTS = RESULT_BYTES <= 36 << 10 ? 2 : 1;
// Scores that the two warps with the parts of a tile exchange
constexpr int EXCHANGE_BYTES = PARTS == 1 ? 0 : CONSUMERS * TILE * 8 * 4;
constexpr int SLOT_BYTES = QUERY_PARTS / 8 * ROWS_OF_EIGHT * 2 * D +
                           QUERY_PARTS * (BY_BUCKET ? 8 + CHUNK_BUCKETS * 4 : 8);  // of a chunk's queries
// Stages of the ring of tiles beside so many slots. Each stage always belongs to the same group and producer. If a warp
// skipped a phase of a stage's barrier, it would misread the parity of the next one.
__host__ __device__ constexpr int stages_beside(int slots) {
  const int fit =
      (SHARED_LIMIT - 4096 - RESULT_SLOTS * RESULT_BYTES - slots * SLOT_BYTES - EXCHANGE_BYTES) / TILE_BYTES;
  const int step = PARTS == 1 ? CONSUMERS : GROUPS;
  return fit >= 24 ? 24 : fit / step * step;
}
constexpr int CHUNK_SLOTS = CHUNK_ROWS <= 16 && PARTS == 1 && stages_beside(4) == stages_beside(2) ? 4 : 2,
              OFFSET_SLOTS = CHUNK_SLOTS;
constexpr int STAGES = stages_beside(CHUNK_SLOTS);
static_assert(STAGES > 0, "no room for the ring");

// Most tiles being copied at once: eight of INT4 (about 9 KB each), or as many bytes. Memory serves more of them in a
// less favourable order: without this bound, decode is 1 to 4% slower.
constexpr int WANTED_UNDER_WAY = 4 * (D + 2 * META_BYTES) / TOKEN_BYTES * 2,
              MOST_UNDER_WAY = WANTED_UNDER_WAY < STAGES ? WANTED_UNDER_WAY : STAGES;

// Queries that the scheduler loads at once. Registers limit them.
constexpr int QUERIES_AT_ONCE = (ROWS <= 4 || (D > 128 && ((SOFTCAP && OFFSET) || K_BITS == 3)) ? 4 : 8) / PARTS;
// Lanes that hold a query. With few, one instruction serves several queries.
constexpr int QUERY_LANES = QUERIES_AT_ONCE < 4 ? WARP / QUERIES_AT_ONCE : 8;
constexpr int SCHEDULERS = 1;
constexpr int CODE_EXPONENT = 24;  // codes are read as fp16 n * 2^-24, some of them 2^exponent times as large

using Keys = Group<K_BITS>;
constexpr int PAIRS = Keys::CODES / 2;

// What divides the exponent of channel c's codes out of its query.
__device__ inline float query_factor(int c) { return power_of_two(-Keys::exponent(c & PAIRS - 1)); }

// Index of channel c of row r in a chunk's queries. A consumer lane reads its B fragments of 8 rows and 32 channels as
// 16 bytes, next to its neighbour's. Their channels have the order of A's fragments, where the two codes of a pair are
// half a group apart.
__device__ inline int fragment_index(int r, int c) {
  const int quad = c / (D / 4), four = c % (D / 4) / Keys::CODES * (PAIRS / 4) + (c & PAIRS - 1) / 4;
  return (((r / 8 * (D / 32) + four) * ROWS_OF_EIGHT + r % 8) * 4 + quad) * 8 + (c >> 1 & 1) * 4 + (c & 1) * 2 +
         (c / PAIRS & 1);
}

struct alignas(sizeof(float) * (SOFTCAP && OFFSET && !BY_BUCKET ? 4 : 2)) QueryStats {
  float sum, factor;  // sum of the row, in units of codes; factor of its scores
#if SOFTCAP && OFFSET && !BY_BUCKET
  float offset;  // q . center in log2, which scores over centered keys lack
#endif
};

struct Shared {
  u8 tiles[STAGES][TILE_BYTES];
  u16 queries[CHUNK_SLOTS]
             [QUERY_PARTS / 8 * ROWS_OF_EIGHT * D];  // fp16, rotated and normalized, in the order of `fragment_index`
  QueryStats query_stats[CHUNK_SLOTS][QUERY_PARTS];
#if BY_BUCKET
  float query_offsets[OFFSET_SLOTS][CHUNK_BUCKETS][QUERY_PARTS];  // q . center in log2 of each row and bucket
#endif
#if PARTS > 1
  float4 exchanged[CONSUMERS / PARTS][PARTS][EXCHANGE_BYTES / CONSUMERS / 16];  // by pair and part
#endif
  float results[RESULT_SLOTS][CONSUMERS / PARTS][ROWS][HEAD_DIM];
  float2 result_stats[RESULT_SLOTS][CONSUMERS / PARTS]
                     [ROWS];  // x: maximum of the scores in log2; y: sum of the weights
  Chunk chunks[CHUNK_SLOTS];
  u64 tile_full[STAGES], tile_empty[STAGES];
  u64 chunk_full[CHUNK_SLOTS], chunk_begun[CHUNK_SLOTS], queries_full[CHUNK_SLOTS], chunk_empty[CHUNK_SLOTS];
  u64 results_full[RESULT_SLOTS], results_empty[RESULT_SLOTS];
  u64 last_results_full;  // results of the block's last chunk

  __device__ void init_barriers() {
    for (int i = 0; i < STAGES; i++)
      ptx::init_barrier(&tile_full[i], 1), ptx::init_barrier(&tile_empty[i], ROW_BLOCKS * WARP_ARRIVALS);
    for (int i = 0; i < CHUNK_SLOTS; i++)
      ptx::init_barrier(&chunk_full[i], WARP_ARRIVALS), ptx::init_barrier(&chunk_begun[i], PRODUCERS * WARP_ARRIVALS),
          ptx::init_barrier(&queries_full[i], WARP_ARRIVALS),
          ptx::init_barrier(&chunk_empty[i], (MERGERS + freeing_producers(PRODUCERS)) * WARP_ARRIVALS);
    for (int i = 0; i < RESULT_SLOTS; i++)
      ptx::init_barrier(&results_full[i], CONSUMERS * WARP_ARRIVALS),
          ptx::init_barrier(&results_empty[i], MERGERS * WARP_ARRIVALS);
    ptx::init_barrier(&last_results_full, WARP_ARRIVALS);
    ptx::publish_to_copies();
  }
};
static_assert(sizeof(Shared) <= SHARED_LIMIT, "no room in shared memory");

// q . center of a row, and of those after it, in a bucket of the ring's n-th entry; null without BY_BUCKET
__device__ inline float* offsets_at(Shared& s, int n, int bucket, int row) {
#if BY_BUCKET
  return &s.query_offsets[Turn<OFFSET_SLOTS>{n}.slot()][bucket][row];
#else
  return nullptr;
#endif
}

__device__ inline bool is_padding(int r) { return r % BLOCK_ROWS >= ROWS; }

}  // namespace sawkv
