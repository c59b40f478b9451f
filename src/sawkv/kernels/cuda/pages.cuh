// Addresses of rows of codes in a page, as docs/format.md specifies.
//
// Macros: HEAD_DIM, PARTS (stored rows per head, each with its own scale and zero point), PAGE_SIZE, K_BITS and V_BITS
// (of a code: 4, 3 or 2; V has at most the bits of K).
#pragma once
#include "codes.cuh"
#include "format_constants.h"

namespace sawkv {

using format::BUCKET_SIZE;
using format::SEGMENT_BYTES;
constexpr int D = HEAD_DIM / PARTS;  // channels of a stored row
constexpr int K_ROW_BYTES = D * K_BITS / 8, V_ROW_BYTES = D * V_BITS / 8, META_BYTES = 4;
constexpr int TOKEN_BYTES = K_ROW_BYTES + V_ROW_BYTES + 2 * META_BYTES,
              HEAD_BYTES = PAGE_SIZE * TOKEN_BYTES;  // per page and part of a KV head
constexpr int V_PLANE = PAGE_SIZE * (K_ROW_BYTES + META_BYTES);
constexpr int SEGMENTS = V_ROW_BYTES / SEGMENT_BYTES;  // of V rows; see PageLayout.swizzle_factors
constexpr int ODD_SEGMENTS = SEGMENTS / largest_power_of_two_in(SEGMENTS);
constexpr int SWIZZLE_PERIOD = largest_power_of_two_in(SEGMENTS) < 8 ? largest_power_of_two_in(SEGMENTS) : 8;
static_assert(D % (4 * Group<K_BITS>::CODES) == 0, "a quarter of a row of K is whole groups");
static_assert(V_ROW_BYTES % SEGMENT_BYTES == 0, "rows of V are whole segments");

// The bucket of a position. The last one holds all later positions.
__device__ inline int bucket_of(i64 position, int num_buckets) {
  const i64 bucket = position / BUCKET_SIZE;
  return bucket < 0 ? 0 : bucket < num_buckets ? (int)bucket : num_buckets - 1;
}

// One row's codes and meta. BITS: those of K or of V, as `is_v` says.
template <int BITS>
struct StoredRow {
  static constexpr int ROW_BYTES = D * BITS / 8;
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
  // The row's byte `b`. The caller accesses no more than b's segment.
  __device__ u8* at(int b) const { return codes + (b ^ (swizzle * SEGMENT_BYTES)); }
};

}  // namespace sawkv
