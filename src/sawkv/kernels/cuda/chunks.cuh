// What the schedule kernel writes once a step, and the decode and merge kernels of every layer read.
//
// Macros: HEAD_DIM.
#pragma once
#include "common.cuh"

namespace sawkv {

constexpr int TILE = HEAD_DIM <= 64 ? 128 : HEAD_DIM <= 128 ? 64 : 32;  // tokens

// A unit is one (sequence, KV head, row group): all tiles that one set of query rows needs. Long units are cut into
// chunks, which blocks take one after the other. Those of units that were cut come first: they are long.
struct alignas(16) Chunk {
  int sequence, unit;          // unit in the sequence: kv_head * row groups + row group
  int first_tile, num_tiles;   // 0 tiles: there are no more chunks
  int length;                  // tokens in the cache, query tokens included
  int query_start, query_len;  // rows of q
  int partial;  // index of its result among the partial ones; -1: the chunk is its whole unit, its result is the output
};

// A unit that was cut, for the merge kernel.
struct alignas(16) SplitUnit {
  int unit, query_start, query_len;
  int first_chunk, num_chunks;
  int padding[3];
};

struct alignas(16) ScheduleHeader {
  int num_chunks, num_split_chunks, num_split_units;
  u32 claimed;      // chunks that blocks have taken; wraps to 0 at the end of each decode launch
  int total_tiles;  // of all units
  int padding[3];
};

}  // namespace sawkv
