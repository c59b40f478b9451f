// The schedule kernel writes these structs once per step. The attention and merge kernels of every layer read them.
//
// Macros: HEAD_DIM.
#pragma once
#include "common.cuh"

namespace sawkv {

constexpr int TILE = HEAD_DIM <= 64 ? 128 : HEAD_DIM <= 128 ? 64 : 32;  // tokens

// A unit is one (sequence, KV head, row group): all tiles that one set of query rows needs. Long units are split into
// chunks, which blocks take one after the other. Chunks of split units are first in the schedule, because they are
// long. A chunk may also be several short units of a sequence.
struct alignas(16) Chunk {
  int sequence, unit;          // unit, within the sequence: kv_head * row groups + row group; of several, the first
  int first_tile, num_tiles;   // 0 tiles: the schedule has ended
  int length;                  // tokens in the cache, query tokens included
  int query_start, query_len;  // rows of q
  int partial;  // index among the partial results; negative: 2^~partial whole units, whose results are the output
};

// A unit of several chunks, for the merge kernel.
struct alignas(16) SplitUnit {
  int unit, query_start, query_len;
  int first_chunk, num_chunks;
  int padding[3];
};

struct alignas(16) ScheduleHeader {
  int num_chunks, num_split_chunks, num_split_units;
  u32 claimed;      // chunks that blocks have taken; wraps to 0 at the end of each decode launch
  int total_tiles;  // in all units
  int padding[3];
};

}  // namespace sawkv
