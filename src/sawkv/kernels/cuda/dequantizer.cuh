// The extend kernel's scaler and dequantizer warps: convert tiles of codes to operands of the tensor cores, once for
// all query rows.
//
// A code n, masked in place, is the fp16 number n * 2^-24 (odd ones 2^bits times as large). One fma computes
// (n - zero_point) * scale for two of them. The row's scale is first divided by a power of two near the tile's largest
// scale, so that products stay in fp16's range for all scales. Consumers multiply scores and weights by that power.
#pragma once
#include "extend_shared.cuh"

namespace sawkv {

// Signals that something is written. Bulk copies and tensor cores access shared memory through another proxy, so a
// fence comes first.
__device__ inline void publish(u64* full) {
  ptx::publish_to_copies();
  hand_on(full);
}

// The scales and zero points of K or V of a tile. Rows outside of `first` and `end` have 0, because no query sees them:
// their memory may hold NaN, and their weights of 0 would not hide it.
struct Scales {
  static constexpr int COUNT = TILE / WARP;
  u32 *meta[COUNT], bits[COUNT];

  __device__ Scales(u8* tile, int meta_offset, int first, int end) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const int token = i * WARP + lane_index();
      meta[i] = (u32*)(tile + token / SPAN * SPAN_BYTES + meta_offset + token % SPAN * 4);
      bits[i] = token >= first && token < end ? *meta[i] : 0;
    }
  }
  // Of the power of two at or below the largest scale
  __device__ int exponent() const {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const u32 scale = bits[i] & 0xffff;
      if (scale < 0x7c00) largest = max(largest, scale);  // neither NaN nor infinite
    }
    return max((int)(__reduce_max_sync(ALL_LANES, largest) >> 10), 1) - 15;
  }
  // Writes, in place, the factor and the summand of the dequantizers' fma, as fp16, of rows divided by 2^exponent.
  __device__ void replace(int exponent) const {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const float factor = ptx::low_half_to_float(bits[i]) * power_of_two(15 - exponent);
      *meta[i] = ptx::pack_halfs(factor, -ptx::high_half_to_float(bits[i]) * (factor * power_of_two(-24)));
    }
  }
};

// One warp does for each tile what would be the same in all dequantizers, and long for each of them.
__device__ void run_scaler(Shared& s, const DecodeParams& p) {
  int stage = 0, phase = 0, tiles_before = 0;
  for (int n = 0;; n++) {
    const Turn<CHUNK_SLOTS> turn{n};
    ptx::wait(&s.chunk_full[turn.slot()], turn.phase());
    const Chunk chunk = s.chunks[turn.slot()];
    if (!chunk.num_tiles) return;
    // Tokens from the first one that the first query sees, relative to the tile's first token
    int end = chunk.length - chunk.first_tile * TILE, first = p.window ? end - chunk.query_len - p.window + 1 : 0;
#pragma unroll 1
    for (int tile = 0; tile < chunk.num_tiles; tile++, first -= TILE, end -= TILE) {
      ptx::wait(&s.tile_full[stage], phase);
      const Scales keys(s.tiles[stage], K_META, first, end), values(s.tiles[stage], V_META, first, end);
      const int key_exponent = keys.exponent(), value_exponent = values.exponent();
      keys.replace(key_exponent);
      values.replace(value_exponent);
      if (lane_index() == 0)
        s.powers[(tiles_before + tile) % POWERS] = {power_of_two(key_exponent), (float)value_exponent,
                                                    power_of_two(-value_exponent), 0};
      publish(&s.scales_full[stage]);
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    tiles_before += chunk.num_tiles;
  }
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
  u32 scales;  // the scaler's factor and summand
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
    scales = *(const u32*)(span + META + token % SPAN * 4);
  }

  __device__ void dequantize(u16* operand) const {
    constexpr u32 LESS = (15 - BITS) << 10;  // 2^-BITS in fp16
    const u32 even = __byte_perm(scales, 0, 0x1010), add = __byte_perm(scales, 0, 0x3232),
              odd = ptx::fma_halfs(even, LESS << 16 | LESS, 0);
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

__device__ void run_dequantizer(Shared& s, int thread) {
  int stage = 0, stage_phase = 0, slot = 0, slot_phase = 0;  // positions in the two rings
  const auto read_keys = [&] {
    ptx::wait(&s.scales_full[stage], stage_phase);  // the scaler has waited for the tile
    return PartOfRow<false>(s.tiles[stage], thread);
  };
  const auto read_values = [&] {
    const PartOfRow<true> values(s.tiles[stage], thread);
    hand_on(&s.tile_empty[stage]);
    if (++stage == STAGES) stage = 0, stage_phase ^= 1;
    return values;
  };
  const auto write_keys = [&](const PartOfRow<false>& keys) {
    ptx::wait(&s.keys_empty[slot], slot_phase ^ 1);
    keys.dequantize(s.keys[slot]);
  };
  const auto write_values = [&](const PartOfRow<true>& values) {
    ptx::wait(&s.values_empty[slot], slot_phase ^ 1);
    values.dequantize(s.values[slot]);
    u64* full = &s.values_full[slot];
    if (++slot == OPERAND_STAGES) slot = 0, slot_phase ^= 1;
    return full;
  };
  for (int n = 0;; n++) {
    const Turn<CHUNK_SLOTS> turn{n};
    ptx::wait(&s.chunk_full[turn.slot()], turn.phase());
    const int num_tiles = uniform(s.chunks[turn.slot()].num_tiles);
    if (!num_tiles) return;
    hand_on(&s.chunk_empty[turn.slot()]);
    write_keys(read_keys());
    publish(&s.keys_full[slot]);
    // Consumers multiply the values of a tile and the keys of a later one together, so both are published at once.
#pragma unroll 1
    for (int tile = 1; tile < num_tiles; tile++) {
      const PartOfRow<true> values = read_values();
      const PartOfRow<false> keys = read_keys();
      u64* values_full = write_values(values);
      write_keys(keys);
      publish(values_full);
      if (arrives()) ptx::arrive(&s.keys_full[slot]);
    }
    publish(write_values(read_values()));
  }
}

}  // namespace sawkv
