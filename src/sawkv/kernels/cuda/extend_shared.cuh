// Roles of the extend kernel's warps, and their shared memory.
//
// Macros: those of attention.cuh, PAGE_SIZE.
#pragma once
#include "attention.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"

namespace sawkv {

constexpr int WARPGROUP = 4 * WARP;
// Four warpgroups: helpers (a producer, two warps that prepare queries, a scaler); dequantizers; and two groups of
// consumers.
constexpr int PRODUCERS = 1, SCHEDULER = PRODUCERS, SCALER = 3, FIRST_DEQUANTIZER = 4, FIRST_CONSUMER = 8;
constexpr int SCHEDULERS = SCALER - SCHEDULER;
constexpr int DEQUANTIZERS = FIRST_CONSUMER - FIRST_DEQUANTIZER, CONSUMER_GROUPS = 2, CONSUMERS = 4 * CONSUMER_GROUPS;
constexpr int THREADS = (FIRST_CONSUMER + CONSUMERS) * WARP;
// The compiler spills two of 192 for head_dim 64, and none of 184.
constexpr int HELPER_REGISTERS = 64, CONSUMER_REGISTERS = D == 64 ? 184 : 192;
static_assert(2 * HELPER_REGISTERS + CONSUMER_GROUPS * CONSUMER_REGISTERS <= 512, "64k registers for an SM");

constexpr int GROUP_ROWS = 64;  // query rows of a consumer group
constexpr int ROW_BLOCKS = 1, BLOCK_ROWS = CHUNK_ROWS, ROWS = CHUNK_ROWS;
// True: both groups have the same rows, and each attends to every other tile. False: each group has its own rows.
constexpr bool DEALS_TILES = CHUNK_ROWS == GROUP_ROWS;
static_assert(DEALS_TILES || CHUNK_ROWS == CONSUMER_GROUPS * GROUP_ROWS, "one or two groups' rows");
static_assert(D == 64 || D == 128, "panels of 64 channels, and registers for sums");

constexpr int CHUNK_SLOTS = 1;
// Consumers hand a chunk's slot back when its queries are in their registers, and read offsets until its end. By then
// the next chunk's may be prepared, and the one after it only when all consumers have begun that.
constexpr int OFFSET_SLOTS = 2;
constexpr int STAGES = DEALS_TILES ? 5 : 6, MOST_UNDER_WAY = STAGES;
// Stages for dequantized tiles. Each belongs to one group, because a warp must not skip a phase of its barriers.
constexpr int OPERAND_STAGES = DEALS_TILES ? 4 : 3;
static_assert(!DEALS_TILES || OPERAND_STAGES % CONSUMER_GROUPS == 0, "a stage has one owner");
// The scaler writes a tile's powers before there is room for its operands. It is ahead of consumers by what both rings
// and the dequantizers hold.
constexpr int POWERS = 16;
static_assert(POWERS >= STAGES + OPERAND_STAGES + 2, "powers are read before they are written again");
constexpr int OPERAND_READERS = DEALS_TILES ? 4 : CONSUMERS;  // warps

// Operands are the tile's values times 2^-9, divided by a power of two that all rows of the tile share.
constexpr int CODE_EXPONENT = 9, QUERIES_AT_ONCE = 4, QUERY_LANES = WARP;
__device__ inline float query_factor(int) { return 1; }

// Column of a channel in an operand. Eight codes become 16 bytes, where codes i and i + 4 are pairs.
__host__ __device__ constexpr int operand_column(int c) { return c / 8 * 8 + c % 4 * 2 + c / 4 % 2; }

// Index of channel c of row r in a chunk's queries, which have the order of A's fragments.
__device__ inline int fragment_index(int r, int c) {
  const int column = operand_column(c), k = column % 16;
  const int lane = r % 8 * 4 + k % 8 / 2, part = r / 8 % 2 + k / 8 * 2;
  return ((r / 16 * (D / 16) + column / 16) * WARP + lane) * 8 + part * 2 + k % 2;
}

struct alignas(sizeof(float) * (SOFTCAP && OFFSET && !BY_BUCKET ? 4 : 2)) QueryStats {
  float sum, factor;  // sum is unused here; factor of the row's scores
#if SOFTCAP && OFFSET && !BY_BUCKET
  float offset;  // q . center in log2, which scores over centered keys lack
#endif
};

struct Shared {
  u16 keys[OPERAND_STAGES][TILE * D];  // laid out for `matrix_of_panels`, like the values
  u16 values[OPERAND_STAGES][TILE * D];
  u8 tiles[STAGES][TILE_BYTES];
  u16 queries[CHUNK_SLOTS][CHUNK_ROWS * D];
  QueryStats query_stats[CHUNK_SLOTS][CHUNK_ROWS];
#if BY_BUCKET
  float query_offsets[OFFSET_SLOTS][CHUNK_BUCKETS][CHUNK_ROWS];  // q . center in log2 of each row and bucket
#endif
  float results[CONSUMERS][8][D + 4];
  float2 result_stats[CONSUMERS][8];  // x: maximum, as in Result; y: sum of the weights
  float4 powers[POWERS];              // x: power of two for keys; y, z: exponent and inverse of that for values
  Chunk chunks[CHUNK_SLOTS];
  u64 tile_full[STAGES], scales_full[STAGES], tile_empty[STAGES];
  u64 keys_full[OPERAND_STAGES], keys_empty[OPERAND_STAGES], values_full[OPERAND_STAGES], values_empty[OPERAND_STAGES];
  u64 chunk_full[CHUNK_SLOTS], chunk_begun[CHUNK_SLOTS], queries_full[CHUNK_SLOTS], chunk_empty[CHUNK_SLOTS];

  __device__ void init_barriers() {
    for (int i = 0; i < STAGES; i++)
      ptx::init_barrier(&tile_full[i], 1), ptx::init_barrier(&scales_full[i], WARP_ARRIVALS),
          ptx::init_barrier(&tile_empty[i], DEQUANTIZERS * WARP_ARRIVALS);
    for (int i = 0; i < OPERAND_STAGES; i++) {
      ptx::init_barrier(&keys_full[i], DEQUANTIZERS * WARP_ARRIVALS);
      ptx::init_barrier(&values_full[i], DEQUANTIZERS * WARP_ARRIVALS);
      ptx::init_barrier(&keys_empty[i], OPERAND_READERS * WARP_ARRIVALS);
      ptx::init_barrier(&values_empty[i], OPERAND_READERS * WARP_ARRIVALS);
    }
    for (int i = 0; i < CHUNK_SLOTS; i++)
      ptx::init_barrier(&chunk_full[i], WARP_ARRIVALS), ptx::init_barrier(&chunk_begun[i], PRODUCERS * WARP_ARRIVALS),
          ptx::init_barrier(&queries_full[i], SCHEDULERS * WARP_ARRIVALS),
          ptx::init_barrier(&chunk_empty[i], (CONSUMERS + DEQUANTIZERS + freeing_producers(PRODUCERS)) * WARP_ARRIVALS);
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

// Arrive at a barrier for the whole warp, once all its lanes are here.
__device__ inline void hand_on(u64* barrier) {
  __syncwarp();
  if (arrives()) ptx::arrive(barrier);
}

// x, which is equal in all lanes, in a form that shows this to the compiler. It then uses uniform registers, which
// operand descriptors need.
__device__ inline int uniform(int x) { return __shfl_sync(ALL_LANES, x, 0); }

__device__ inline bool is_padding(int) { return false; }

}  // namespace sawkv
