// The producer warps: copy tiles of pages into a ring in shared memory, with one bulk copy per page and KV head.
//
// Included after the kernel defines Shared, STAGES, CHUNK_SLOTS, PRODUCERS and MOST_UNDER_WAY.
#pragma once
#include "attention.cuh"
#include "tiles.cuh"

namespace sawkv {

static_assert(STAGES <= WARP, "a lane for each stage");
static_assert(MOST_UNDER_WAY <= STAGES && MOST_UNDER_WAY % PRODUCERS == 0 && STAGES % PRODUCERS == 0,
              "each tile's earlier ones are its producer's");

// Ids of the pages that hold a tile's spans
struct TilePages {
  int ids[SPANS];
  TilePages() = default;
  __device__ TilePages(const DecodeParams& p, const Chunk& chunk, int tile) {
#pragma unroll
    for (int i = 0; i < SPANS; i++) {
      const int token = first_token(chunk, tile) + i * SPAN;
      const bool is_needed = tile < num_tiles(chunk) && token < chunk.length;
      ids[i] = is_needed ? p.block_table[chunk.sequence * p.table_stride + token / PAGE_SIZE] : 0;
    }
  }
};

// A tile may be copied when its stage is empty, and the tile MOST_UNDER_WAY before it has arrived.
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

// The first tile of a chunk that is this producer's: they take turns, over all chunks.
__device__ int first_of(int producer, int tiles_before) {
  return (producer + PRODUCERS - tiles_before % PRODUCERS) % PRODUCERS;
}

// Calls `each` with the offset in a tile, the address and the bytes of what the tile consists of in pages: spans, or,
// of a part of a page, one run of each plane. `heads`: the KV head in each of the tile's pages.
template <class Each>
__device__ inline void for_each_copy(const u8* const (&heads)[SPANS], int spans, int token, const Each& each) {
  if constexpr (PAGE_SIZE == SPAN) {
#pragma unroll
    for (int i = 0; i < SPANS; i++)
      if (i < spans) each(i * SPAN_BYTES, heads[i], SPAN_BYTES);
  } else if (spans) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int plane = i / 2 * (K_ROW_BYTES + META_BYTES) + i % 2 * (i < 2 ? K_ROW_BYTES : V_ROW_BYTES),
                bytes = i % 2   ? META_BYTES
                        : i < 2 ? K_ROW_BYTES
                                : V_ROW_BYTES;
      each(SPAN * plane, heads[0] + PAGE_SIZE * plane + token % PAGE_SIZE * bytes, SPAN * bytes);
    }
  }
}

// Asks L2 for the first tiles of the block's first chunk, before the kernels before this one have ended and while
// memory has less to do. They may still change all that is read here. So it only says what to ask for, and memory that
// is not of the cache is not asked for.
__device__ void prefetch_tiles(const DecodeParams& p) {
  if ((int)blockIdx.x >= ptx::load_past_l1(&p.header->num_chunks)) return;
  const Chunk* from = &p.chunks[blockIdx.x];
  Chunk chunk{};
  chunk.sequence = ptx::load_past_l1(&from->sequence), chunk.unit = ptx::load_past_l1(&from->unit);
  chunk.first_tile = ptx::load_past_l1(&from->first_tile), chunk.num_tiles = ptx::load_past_l1(&from->num_tiles);
  chunk.length = ptx::load_past_l1(&from->length), chunk.query_len = ptx::load_past_l1(&from->query_len);
  chunk.partial = UNITS == 1 ? -1 : max(ptx::load_past_l1(&from->partial), -UNITS);
  if ((u32)chunk.first_tile >> 23) return;  // before it is multiplied: behind an overflow checks mean nothing
  const int tile = lane_index(), token = first_token(chunk, tile);
  if (tile >= min(num_tiles(chunk), MOST_UNDER_WAY) || chunk.query_len < 1) return;
  const int head = kv_head_of(chunk, unit_of(chunk, tile));
  if ((u32)chunk.sequence >= p.num_seqs || (u32)head >= p.num_kv_heads) return;
#pragma unroll
  for (int i = 0; i < (PAGE_SIZE == SPAN ? SPANS : 1); i++) {
    const int column = (token + i * SPAN) / PAGE_SIZE;
    if (token + i * SPAN >= chunk.length || column >= p.table_columns) break;
    const int page = ptx::load_past_l1(&p.block_table[chunk.sequence * p.table_stride + column]);
    if ((u32)page >= p.num_pages) break;
    const u8* heads[SPANS] = {p.pages + page * p.page_stride + ((i64)head * PARTS + tile % PARTS) * HEAD_BYTES};
    for_each_copy(heads, 1, token, [](int, const u8* piece, int bytes) { ptx::prefetch(piece, bytes); });
  }
}

__device__ int run_producer(Shared& s, const DecodeParams& p, int producer) {
  // Pages are read once per step. If they are few, L2 evicts them first and keeps the data of other kernels. If they
  // are many, L2 keeps nothing anyway, and normal eviction was measured 2% faster.
  constexpr i64 MANY_BYTES = 400ll << 20;
  const bool is_many = p.header->total_tiles > MANY_BYTES / (PARTS * TILE_BYTES);
  const u64 policy = is_many ? ptx::evict_normal_policy() : ptx::evict_first_policy();
  int tiles_before = 0;
  bool is_known = false;  // whether next_pages are those of the next chunk's first round
  TilePages next_pages;
  for (int n = 0;; n++) {
    const Turn<CHUNK_SLOTS> turn{n}, next_turn{n + 1};
    ptx::wait(&s.chunk_full[turn.slot()], turn.phase());
    const Chunk chunk = s.chunks[turn.slot()];
    if (!chunk.num_tiles) return n;
    int first = first_of(producer, tiles_before);
    if (!is_known) next_pages = TilePages(p, chunk, first + lane_index() * PRODUCERS);
    is_known = false;
    if (arrives()) ptx::arrive(&s.chunk_begun[turn.slot()]);
    if constexpr (freeing_producers(PRODUCERS)) {
      __syncwarp();
      if (arrives()) ptx::arrive(&s.chunk_empty[turn.slot()]);
    }
    // One round of the ring, with a lane per tile: all lanes prepare their copies at once, before a stage is free.
#pragma unroll 1
    for (; first < num_tiles(chunk); first += STAGES) {
      const TilePages pages = next_pages;
      const int tile = first + lane_index() * PRODUCERS, token = first_token(chunk, tile);
      // Before the last round, look up the next chunk's pages: else no copy begins for the time of a read from memory.
      is_known = !ONLY_WAITS && first + STAGES >= num_tiles(chunk) &&
                 __all_sync(ALL_LANES, ptx::has_ended(&s.chunk_full[next_turn.slot()], next_turn.phase()));
      next_pages = is_known ? TilePages(p, s.chunks[next_turn.slot()],
                                        first_of(producer, tiles_before + num_tiles(chunk)) + lane_index() * PRODUCERS)
                            : TilePages(p, chunk, tile + STAGES);
      const Turn<STAGES> stage{tiles_before + tile};
      const int spans = max(0, min(SPANS, divide_up(chunk.length - token, SPAN)));
      const u8* head = p.pages + (i64)kv_head_of(chunk, unit_of(chunk, tile)) * (PARTS * HEAD_BYTES);
      const u8* from[SPANS];
#pragma unroll
      for (int i = 0; i < SPANS; i++) from[i] = head + tile % PARTS * HEAD_BYTES + pages.ids[i] * p.page_stride;
      u8* to = s.tiles[stage.slot()];
      u64* full = &s.tile_full[stage.slot()];

      u32 due = __ballot_sync(ALL_LANES, lane_index() < STAGES / PRODUCERS && tile < num_tiles(chunk));
#pragma unroll 1
      while (due) {
        wait_for_room(s, {tiles_before + first + (__ffs(due) - 1) * PRODUCERS});
        // Copy in order: a tile must not refill a stage while an earlier tile still waits for that stage to be full.
        const u32 blocked = due & ~__ballot_sync(ALL_LANES, has_room(s, stage));
        u32 ready = due & ((blocked & -blocked) - 1);
        if constexpr (ONLY_WAITS) ready &= -ready;
        if (ready >> lane_index() & 1) {
          ptx::arrive_expecting(full, spans * SPAN_BYTES);
          for_each_copy(from, spans, token, [&](int offset, const u8* piece, int bytes) {
            ptx::copy_to_shared(to + offset, piece, bytes, full, policy);
          });
        }
        due &= ~ready;
      }
    }
    tiles_before += num_tiles(chunk);
  }
}

}  // namespace sawkv
