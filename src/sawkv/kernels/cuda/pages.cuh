// Addresses of rows of INT4 codes in a page, as docs/format.md specifies.
//
// Macros: HEAD_DIM, PAGE_SIZE.
#pragma once
#include "common.cuh"
#include "format_constants.h"

namespace sawkv {

using format::BUCKET_SIZE;
using format::SEGMENT_BYTES;
constexpr int D = HEAD_DIM;
constexpr int ROW_BYTES = D / 2, META_BYTES = 4;
constexpr int TOKEN_BYTES = 2 * (ROW_BYTES + META_BYTES),
              HEAD_BYTES = PAGE_SIZE * TOKEN_BYTES;  // per page and KV head
constexpr int V_PLANE = HEAD_BYTES / 2;
constexpr int SEGMENTS = ROW_BYTES / SEGMENT_BYTES;  // of V rows; see PageLayout.swizzle_factors
constexpr int ODD_SEGMENTS = SEGMENTS / largest_power_of_two_in(SEGMENTS);
constexpr int SWIZZLE_PERIOD = largest_power_of_two_in(SEGMENTS) < 8 ? largest_power_of_two_in(SEGMENTS) : 8;
static_assert(D % 32 == 0, "rows are whole segments");

// Nibbles s and s + 4 of a word of codes as two 16-bit floats, odd nibbles 16 times as large. `high` is the word
// shifted right by 8.
__device__ inline u32 nibbles(u32 word, u32 high, int s) {
  return (s < 2 ? word : high) & (s % 2 ? 0x00f000f0u : 0x000f000fu);
}

// The bucket of a position. The last one holds all later positions.
__device__ inline int bucket_of(i64 position, int num_buckets) {
  const i64 bucket = position / BUCKET_SIZE;
  return bucket < 0 ? 0 : bucket < num_buckets ? (int)bucket : num_buckets - 1;
}

// One row's codes and meta.
struct StoredRow {
  u8* codes;
  u32* meta;  // scale in the low half, zero point in the high half
  int swizzle;

  // `head`: start of the page's span of one KV head
  __device__ StoredRow(u8* head, int offset, bool is_v) {
    u8* plane = head + (is_v ? V_PLANE : 0);
    codes = plane + offset * ROW_BYTES;
    meta = (u32*)(plane + PAGE_SIZE * ROW_BYTES) + offset;
    swizzle = is_v ? offset * ODD_SEGMENTS * SWIZZLE_PERIOD / 8 % SWIZZLE_PERIOD : 0;
  }
  // The codes from channel c on. c is even. The caller accesses no more than c's segment.
  __device__ u8* at(int c) const { return codes + ((c / 2) ^ (swizzle * SEGMENT_BYTES)); }
};

}  // namespace sawkv
