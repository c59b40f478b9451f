// Layout of tiles in shared memory, and the rings and barriers with which warps pass them on.
//
// Macros: those of pages.cuh, UNITS.
#pragma once
#include "pages.cuh"
#include "chunks.cuh"

namespace sawkv {

constexpr int TILE_BYTES = TILE * TOKEN_BYTES;
static_assert(PAGE_SIZE % TILE == 0 || TILE % PAGE_SIZE == 0, "tiles are whole pages, or the reverse");

// log2 of a chunk's units
__device__ inline int log2_units(const Chunk& chunk) { return UNITS == 1 ? 0 : max(~chunk.partial, 0); }

// The ring of tiles has one part of the heads, or one unit, of TILE tokens in each. Its tile i of a chunk is part
// i % PARTS, or unit i % units, of the chunk's tile i / PARTS or i / units.
__device__ inline int num_tiles(const Chunk& chunk) { return chunk.num_tiles * PARTS << log2_units(chunk); }
__device__ inline int first_token(const Chunk& chunk, int tile) {
  return (chunk.first_tile + (tile / PARTS >> log2_units(chunk))) * TILE;
}
__device__ inline int unit_of(const Chunk& chunk, int tile) {
  return chunk.unit + (tile & (1 << log2_units(chunk)) - 1);
}

// A tile is one or more spans of tokens, each laid out like a page: K codes, K meta, V codes, V meta.
constexpr int SPAN = PAGE_SIZE < TILE ? PAGE_SIZE : TILE;
constexpr int SPAN_BYTES = SPAN * TOKEN_BYTES, SPANS = TILE / SPAN;
constexpr int K_META = SPAN * K_ROW_BYTES, V_CODES = K_META + SPAN * META_BYTES, V_META = V_CODES + SPAN * V_ROW_BYTES;

constexpr int SHARED_LIMIT = 227 << 10;

// One lane per warp arrives at barriers for the whole warp, after __syncwarp. compute-sanitizer's racecheck tracks only
// lanes that arrive themselves, and orders only what follows a wait, not a test (`has_ended`). So with FOR_RACECHECK
// every lane arrives, and the producer copies one tile after each wait.
#ifdef FOR_RACECHECK
constexpr int WARP_ARRIVALS = WARP;
constexpr bool ONLY_WAITS = true;
#else
constexpr int WARP_ARRIVALS = 1;
constexpr bool ONLY_WAITS = false;
#endif
__device__ inline bool arrives() { return lane_index() < WARP_ARRIVALS; }

// How many of a kernel's producers free the slots of chunks. A single one has read a chunk before any tile of it is
// there, so it is enough that the readers of its tiles do. But of two, one has no tile of a chunk of one tile, and the
// slot could be written again before that one has read it. racecheck does not see that the first order holds for all
// lanes, of which one arrives at a tile's barrier.
__host__ __device__ constexpr int freeing_producers(int producers) {
  return producers > 1 || ONLY_WAITS ? producers : 0;
}

// Position in a ring: slot and phase of the n-th use.
template <int SLOTS>
struct Turn {
  int n;
  __device__ int slot() const { return n % SLOTS; }
  __device__ u32 phase() const { return n / SLOTS & 1; }
};

}  // namespace sawkv
