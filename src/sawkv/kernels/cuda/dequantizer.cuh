// The extend kernel's dequantizer warps: convert tiles of codes to operands of the tensor cores, once for all query
// rows.
//
// A code n, masked in place, is the fp16 number n * 2^-24 (odd ones 2^bits times as large). One fma computes
// (n - zero_point) * scale for two of them. The row's scale is first divided by a power of two near the tile's largest
// scale, so that products stay in fp16's range for all scales. Consumers multiply scores and weights by that power.
#pragma once
#include "extend_shared.cuh"

namespace sawkv {

// The tokens of a tile that some query sees. The others become 0: their memory may hold NaN, and their weights of 0
// would not hide it.
struct TokenRange {
  int first, end;
  __device__ bool has(int token) const { return token >= first && token < end; }
};

// Bits of the largest scale among a lane's tokens, NaN ignored.
__device__ inline u32 largest_scale(const u8* tile, int meta_offset, TokenRange range) {
  u32 largest = 0;
#pragma unroll
  for (int i = 0; i < TILE; i += WARP) {
    const int token = i + lane_index();
    const u32 scale = *(const u32*)(tile + token / SPAN * SPAN_BYTES + meta_offset + token % SPAN * 4) & 0xffff;
    if (range.has(token) && scale < 0x7c00) largest = max(largest, scale);
  }
  return largest;
}
// Exponent of the power of two at or below the largest scale of all lanes.
__device__ inline int exponent_of(u32 largest_scale) {
  return max((int)(__reduce_max_sync(ALL_LANES, largest_scale) >> 10), 1) - 15;
}

// A thread's part of K or V of a tile: a token's row, or every other block of 32 channels of it. Eight neighbouring
// lanes always write to eight different 16-byte banks, and at 4 bits mostly read from eight. Of K they hold either
// eight tokens, or four tokens with two blocks each (two of the tokens take other blocks than the other two). Of V they
// hold one block of eight tokens.
template <bool IS_V>
struct PartOfRow {
  static constexpr int CODES = IS_V ? V_CODES : 0, META = IS_V ? V_META : K_META, BITS = IS_V ? V_BITS : K_BITS;
  static constexpr int ROW_BYTES = D * BITS / 8, BLOCKS = D / 32;                   // of BITS words each
  static constexpr int SHARE = DEQUANTIZERS * WARP / TILE, COUNT = BLOCKS / SHARE;  // threads per token; blocks
  static_assert(SHARE * TILE == DEQUANTIZERS * WARP && SHARE <= 2 && COUNT == 2, "head_dim 64 or 128");
  static constexpr int LOAD = largest_power_of_two_in(BITS);
  alignas(16) u32 codes[COUNT][BITS];
  u32 meta;
  int token, first;

  static __device__ int block(int first, int i) { return (first + SHARE * i) % BLOCKS; }
  __device__ PartOfRow(const u8* tile, int thread) {
    token = IS_V ? thread % TILE : thread / SHARE;
    first = IS_V ? thread / TILE : SHARE == 2 ? thread % 2 + thread / 4 % 2 * 2 : 0;
    const int swizzle = IS_V ? token % 8 * ODD_SEGMENTS * SWIZZLE_PERIOD / 8 % SWIZZLE_PERIOD : 0;
    const u8* span = tile + token / SPAN * SPAN_BYTES;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
#pragma unroll
      for (int w = 0; w < BITS; w += LOAD) {
        const int n = block(first, i) * BITS + w;
        const u8* row = span + CODES + token % SPAN * ROW_BYTES;
        *(Vector<u32, LOAD>*)&codes[i][w] =
            *(const Vector<u32, LOAD>*)(row + (n / 4 ^ swizzle) * SEGMENT_BYTES + n % 4 * 4);
      }
    meta = *(const u32*)(span + META + token % SPAN * 4);
  }

  __device__ void dequantize(TokenRange range, int exponent, u16* operand) const {
    const bool is_there = range.has(token);
    const float multiplier = is_there ? ptx::low_half_to_float(meta) * power_of_two(15 - exponent) : 0;
    const float offset = is_there ? -ptx::high_half_to_float(meta) * (multiplier * power_of_two(-24)) : 0;
    const u32 even = ptx::pack_halfs(multiplier, multiplier),
              odd = ptx::pack_halfs(multiplier * power_of_two(-BITS), multiplier * power_of_two(-BITS)),
              add = ptx::pack_halfs(offset, offset);
    const u32 row = ptx::shared_address(operand) + token * 128;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const int b = block(first, i);
      const u32 to = row + b / 2 * (TILE * 128) + (b % 2 * 4 ^ token % 8) * 16;
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const auto eight = Eight<BITS>::of(&codes[i][Eight<BITS>::source(w)], w);
        ptx::store_shared(to ^ w << 4, ptx::fma_halfs(eight.pair(0), even, add),
                          ptx::fma_halfs(eight.pair(1), odd, add), ptx::fma_halfs(eight.pair(2), even, add),
                          ptx::fma_halfs(eight.pair(3), odd, add));
      }
    }
  }
};

// Signals that an operand is written. Tensor cores read shared memory through another proxy, so a fence comes first.
__device__ inline void publish(u64* full) {
  ptx::publish_to_copies();
  hand_on(full);
}

__device__ void run_dequantizer(Shared& s, const DecodeParams& p, int thread) {
  int stage = 0, stage_phase = 0, slot = 0, slot_phase = 0;  // positions in the two rings
  for (int n = 0;; n++) {
    const Turn<CHUNK_SLOTS> turn{n};
    ptx::wait(&s.chunk_full[turn.slot()], turn.phase());
    const Chunk& chunk = s.chunks[turn.slot()];
    const int num_tiles = uniform(chunk.num_tiles);
    // Tokens from the first one that the first query sees, relative to the tile's first token
    const int length = uniform(chunk.length - chunk.first_tile * TILE), query_len = uniform(chunk.query_len);
    TokenRange range{p.window ? length - query_len - p.window + 1 : 0, length};
    if (!num_tiles) return;
    hand_on(&s.chunk_empty[turn.slot()]);
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; tile++, range.first -= TILE, range.end -= TILE) {
      const u8* from = s.tiles[stage];
      ptx::wait(&s.tile_full[stage], stage_phase);
      const u32 key_scale = largest_scale(from, K_META, range), value_scale = largest_scale(from, V_META, range);
      const PartOfRow<false> keys(from, thread);
      const PartOfRow<true> values(from, thread);
      const int key_exponent = exponent_of(key_scale), value_exponent = exponent_of(value_scale);
      hand_on(&s.tile_empty[stage]);
      ptx::wait(&s.keys_empty[slot], slot_phase ^ 1);
      if (thread == 0)  // published with the keys, before values are complete, since weights need them
        s.powers[slot] = {power_of_two(key_exponent), (float)value_exponent, power_of_two(-value_exponent), 0};
      keys.dequantize(range, key_exponent, s.keys[slot]);
      publish(&s.keys_full[slot]);
      ptx::wait(&s.values_empty[slot], slot_phase ^ 1);
      values.dequantize(range, value_exponent, s.values[slot]);
      publish(&s.values_full[slot]);
      if (++stage == STAGES) stage = 0, stage_phase ^= 1;
      if (++slot == OPERAND_STAGES) slot = 0, slot_phase ^= 1;
    }
  }
}

}  // namespace sawkv
