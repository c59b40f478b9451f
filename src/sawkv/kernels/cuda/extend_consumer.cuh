// The extend kernel's consumer groups: each attends to dequantized tiles with 64 query rows, by warpgroup products.
//
// A warp has 16 of the rows. Lane l has rows l / 4 and l / 4 + 8 of these, and columns 2 (l % 4) and 2 (l % 4) + 1 of
// every 8 columns of a product. Scores therefore have the fragment layout that weights need as an operand.
#pragma once
#include "extend_shared.cuh"

namespace sawkv {

// A tile whose scores are ready.
struct Scored {
  int begin;  // first token
  bool is_masked;
  const float* offsets;  // of the lane's first row, with BY_BUCKET
  float key_power, value_exponent, value_power;
};

struct ExtendConsumer {
  static constexpr int PANEL_BYTES = TILE * 128;
  static constexpr float MOST_WEIGHT = 1 << 10;  // of a lane's sum of a tile's weights; fp16 ends at 2^16

  u32 query[D / 16][4];
  u32 weights[TILE / 16][4];
  float scores[TILE / 2];  // per 8 tokens: two of row l / 4, two of row l / 4 + 8
  float out[D / 2];        // likewise, per 8 channels
  // Per row of the lane. Weights are 2^(score + exponent of the tile's values - maximum).
  float maximum[2], sum[2];
  float factor[2];
#if SOFTCAP && OFFSET && !BY_BUCKET
  float offset[2];
#endif
  int last[2];  // tokens that the rows see

  __device__ void start(const Shared& s, const DecodeParams& p, int slot, const Chunk& chunk, int first_row) {
    const int lane = lane_index();
    const auto* fragments = (const uint4*)&s.queries[slot][first_row * D] + lane;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      const uint4 q = fragments[k * WARP];
      const u32 sign = p.scale_log2 < 0 ? 0x80008000u : 0;
      query[k][0] = q.x ^ sign, query[k][1] = q.y ^ sign, query[k][2] = q.z ^ sign, query[k][3] = q.w ^ sign;
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int r = first_row + lane / 4 + 8 * e;
      const QueryRow row(chunk.unit, chunk.query_len, r);
      const QueryStats& stats = s.query_stats[slot][r];
      factor[e] = fmaxf(fabsf(stats.factor), 1e-30f);  // positive, as masks and maxima need; q takes the sign
#if SOFTCAP && OFFSET && !BY_BUCKET
      offset[e] = stats.offset;
#endif
      last[e] = min(chunk.length - chunk.query_len + row.token, chunk.length - 1);
      maximum[e] = -1e30f;
      sum[e] = 0;
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) out[i] = 0;
  }

  // `keys`, `values`: the operand's address in shared memory, divided by 16
  __device__ void multiply_keys(u32 keys) {
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      ptx::mma_warpgroup<0>(scores, query[k], ptx::matrix_of_panels<0>(keys + (k / 4 * PANEL_BYTES + k % 4 * 32) / 16),
                            k > 0);
    ptx::commit_warpgroup();
  }
  __device__ void multiply_values(u32 values) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++)
      ptx::mma_warpgroup<1>(out, weights[k], ptx::matrix_of_panels<PANEL_BYTES>(values + k * 16 * 128 / 16), true);
    ptx::commit_warpgroup();
  }

  // Turns scores into weights, as pairs of halfs. Returns whether earlier sums must be multiplied by `rescale`. Nothing
  // looks for the largest score in most tiles: weights relative to an old maximum are as exact, until they approach the
  // end of fp16's range. A lane's sum of them shows that they may.
  // FOLLOWS: a product of the last weights is not awaited yet, whose values have the barrier `values_empty`.
  template <bool FOLLOWS>
  __device__ bool weigh(const Scored& tile, const DecodeParams& p, float (&rescale)[2], u64* values_empty) {
    float scale[2];
#pragma unroll
    for (int e = 0; e < 2; e++) scale[e] = factor[e] * tile.key_power;
    // A weight is 2^(score * scale + added - maximum).
    float added[2] = {tile.value_exponent, tile.value_exponent};
#if BY_BUCKET
    const float offset[2] = {tile.offsets[0], tile.offsets[8]};
    if (!SOFTCAP) added[0] += offset[0], added[1] += offset[1];
#endif
#if SOFTCAP
#pragma unroll
    for (int i = 0; i < TILE / 2; i++) {
      float x = scores[i] * scale[i / 2 % 2];
#if OFFSET
      x += offset[i / 2 % 2];
#endif
      scores[i] = p.softcap_log2 * (1 - 2 / (1 + ptx::exp2(x)));  // as in consumer.cuh
    }
    scale[0] = scale[1] = 1;
#endif
    if (tile.is_masked) {
#pragma unroll
      for (int i = 0; i < TILE / 2; i++) {
        const int token = tile.begin + i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
        const int last_seen = last[i / 2 % 2];
        if (token > last_seen || (p.window && token <= last_seen - p.window)) scores[i] = -infinity();
      }
    }
    if (FOLLOWS) {
      ptx::wait_warpgroup<0>();
      ptx::pin(out);
      ptx::pin(weights);
      hand_on(values_empty);
    }
    float total[2];
    make_weights(scale, added, total);
    const bool grows = __any_sync(ALL_LANES, !(fmaxf(total[0], total[1]) <= MOST_WEIGHT));
    if (grows) {
      float largest[4] = {scores[0], scores[1], scores[2], scores[3]};
#pragma unroll
      for (int i = 4; i < TILE / 2; i++) largest[i % 4] = fmaxf(largest[i % 4], scores[i]);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float x = fmaxf(maximum[e], fmaf(fmaxf(largest[2 * e], largest[2 * e + 1]), scale[e], added[e]));
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
        rescale[e] = ptx::exp2(maximum[e] - x);
        maximum[e] = x;
        sum[e] *= rescale[e];
      }
      make_weights(scale, added, total);
    }
#pragma unroll
    for (int e = 0; e < 2; e++) sum[e] = fmaf(total[e], tile.value_power, sum[e]);
    return grows;
  }
  // The weights of a tile relative to `maximum`, and the lane's sums of them per row.
  __device__ void make_weights(const float (&scale)[2], const float (&added)[2], float (&total)[2]) {
    const float shift[2] = {added[0] - maximum[0], added[1] - maximum[1]};
    total[0] = total[1] = 0;
#pragma unroll
    for (int half = 0; half < TILE / 2; half += TILE / 4) {
      float sums[4] = {};
#pragma unroll
      for (int i = half; i < half + TILE / 4; i += 2) {
        const int e = i / 2 % 2;
        const float low = ptx::exp2(fmaf(scores[i], scale[e], shift[e])),
                    high = ptx::exp2(fmaf(scores[i + 1], scale[e], shift[e]));
        sums[2 * e] += low, sums[2 * e + 1] += high;
        weights[i / 8][i / 2 % 4] = ptx::pack_halfs(low, high);
      }
      total[0] += sums[0] + sums[1], total[1] += sums[2] + sums[3];
    }
  }

  __device__ void rescale_out(const float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < D / 2; i += 4) {
      out[i] *= rescale[0], out[i + 1] *= rescale[0];
      out[i + 2] *= rescale[1], out[i + 3] *= rescale[1];
    }
  }

  // Store rows l / 4 + 8 * half of the result in shared memory, where a warp can read whole rows.
  __device__ void store(Shared& s, int warp, int half) const {
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < D / 8; i++) {  // per 8 columns, in the order of operand_column
      float* channels = &s.results[warp][lane / 4][i * 8 + lane % 4];
      channels[0] = out[4 * i + 2 * half] * power_of_two(CODE_EXPONENT);
      channels[4] = out[4 * i + 2 * half + 1] * power_of_two(CODE_EXPONENT);
    }
    if (lane % 4 == 0) s.result_stats[warp][lane / 4] = {maximum[half], sum[half]};
  }
};

// Write the rows of a finished chunk, or its partial result. `warp` counts all consumer warps.
__device__ void write_results(Shared& s, const DecodeParams& p, const Chunk& chunk, ExtendConsumer& consumer,
                              int warp) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    consumer.sum[e] += __shfl_xor_sync(ALL_LANES, consumer.sum[e], 1);
    consumer.sum[e] += __shfl_xor_sync(ALL_LANES, consumer.sum[e], 2);
  }
  constexpr int SOURCES = DEALS_TILES ? CONSUMER_GROUPS : 1;
  const int pair = warp % 4;  // warps with the same `pair` have the same rows
#pragma unroll
  for (int half = 0; half < 2; half++) {
    consumer.store(s, warp, half);
    if (DEALS_TILES)
      ptx::sync_threads(1 + pair, CONSUMER_GROUPS * WARP);
    else
      __syncwarp();
#pragma unroll 1
    for (int i = DEALS_TILES ? warp / 4 : 0; i < 8; i += SOURCES) {
      const int r = (DEALS_TILES ? pair : warp) * 16 + half * 8 + i;
      const QueryRow row(chunk.unit, chunk.query_len, r);
      if (row.token >= chunk.query_len) continue;
      Row<D> outs[SOURCES];
      float2 stats[SOURCES];
#pragma unroll
      for (int k = 0; k < SOURCES; k++) {
        const int source = DEALS_TILES ? pair + 4 * k : warp;
        outs[k] = Row<D>::load(s.results[source][i]);
        stats[k] = s.result_stats[source][i];
      }
      auto merged = Result<>::none();
      merged.add(outs, stats);
      merged.put(p, chunk, row, r);
    }
    if (DEALS_TILES)
      ptx::sync_threads(1 + pair, CONSUMER_GROUPS * WARP);
    else
      __syncwarp();
  }
}

// Groups that attend to the same tiles take turns: one computes weights while the other uses the tensor cores.
__device__ inline void begin_products(int group) {
  if (!DEALS_TILES) ptx::sync_threads(1 + group, CONSUMER_GROUPS * WARPGROUP);
}
__device__ inline void end_products(int group) {
  if (!DEALS_TILES) ptx::arrive_threads(1 + (group ^ 1), CONSUMER_GROUPS * WARPGROUP);
}

__device__ void run_extend_consumer(Shared& s, const DecodeParams& p, int warp) {
  const int group = warp / 4, first_row = (DEALS_TILES ? warp % 4 : warp) * 16;
  constexpr int STEP = DEALS_TILES ? CONSUMER_GROUPS : 1;
  constexpr u32 OPERAND = TILE * D * 2 / 16;
  const u32 keys = ptx::shared_address(s.keys) / 16, values = ptx::shared_address(s.values) / 16;
  int tiles_before = 0;
  bool continues = false;  // whether rows and sums of the last entry go on
  ExtendConsumer consumer;
  if (group) end_products(group);  // gives the first turn to the first group
  for (int n = 0;; n++) {
    const Turn<CHUNK_SLOTS> turn{n};
    ptx::wait(&s.queries_full[turn.slot()], turn.phase());
    Chunk chunk = s.chunks[turn.slot()];
    chunk.num_tiles = uniform(chunk.num_tiles), chunk.first_tile = uniform(chunk.first_tile);
    chunk.length = uniform(chunk.length), chunk.query_len = uniform(chunk.query_len), chunk.unit = uniform(chunk.unit);
    if (!chunk.num_tiles) return;
    if (!continues) consumer.start(s, p, turn.slot(), chunk, first_row);
    const int first_token = QueryRow(chunk.unit, chunk.query_len, first_row).token;
    const int unmasked_end = min(chunk.length - chunk.query_len + first_token + 1, chunk.length);
    // What weighing a tile needs besides its scores. Its keys are read by then.
    const auto scored = [&](int tile, Turn<OPERAND_STAGES> operand) -> Scored {
      const float4 powers = s.powers[operand.n % POWERS];
      hand_on(&s.keys_empty[operand.slot()]);
      const int begin = (chunk.first_tile + tile) * TILE;
      const bool is_masked = begin + TILE > unmasked_end || (p.window && begin < chunk.length - p.window);
      const float* offsets = offsets_at(s, n, chunk_bucket(chunk, begin), first_row + lane_index() / 4);
      return {begin, is_masked, offsets, powers.x, powers.y, powers.z};
    };

    int tile = DEALS_TILES ? (group + CONSUMER_GROUPS - tiles_before % CONSUMER_GROUPS) % CONSUMER_GROUPS : 0;
    if (tile < chunk.num_tiles) {
      Turn<OPERAND_STAGES> operand{tiles_before + tile};
      float rescale[2];
      ptx::wait(&s.keys_full[operand.slot()], operand.phase());
      hand_on(&s.chunk_empty[turn.slot()]);  // the producer has read it, since its first keys exist
      ptx::pin(consumer.scores);
      ptx::fence_warpgroup();
      consumer.multiply_keys(keys + operand.slot() * OPERAND);
      ptx::wait_warpgroup<0>();
      ptx::pin(consumer.scores);
      const bool is_first_rescaled = consumer.weigh<false>(scored(tile, operand), p, rescale, nullptr);
      if (continues && is_first_rescaled) consumer.rescale_out(rescale);
      // Pipelined: products of a tile's keys are issued together with those of the previous tile's weights and values.
#pragma unroll 1
      for (tile += STEP; tile < chunk.num_tiles; tile += STEP) {
        const Turn<OPERAND_STAGES> next{tiles_before + tile};
        ptx::wait(&s.keys_full[next.slot()], next.phase());
        ptx::pin(consumer.scores);
        ptx::pin(consumer.out);
        ptx::wait(&s.values_full[operand.slot()], operand.phase());
        begin_products(group);
        ptx::fence_warpgroup();
        consumer.multiply_keys(keys + next.slot() * OPERAND);
        consumer.multiply_values(values + operand.slot() * OPERAND);
        end_products(group);
        ptx::wait_warpgroup<1>();
        ptx::pin(consumer.scores);
        const bool is_rescaled = consumer.weigh<true>(scored(tile, next), p, rescale, &s.values_empty[operand.slot()]);
        if (is_rescaled) consumer.rescale_out(rescale);
        operand = next;
      }
      ptx::wait(&s.values_full[operand.slot()], operand.phase());
      ptx::pin(consumer.out);
      ptx::fence_warpgroup();
      consumer.multiply_values(values + operand.slot() * OPERAND);
      ptx::wait_warpgroup<0>();
      ptx::pin(consumer.out);
      hand_on(&s.values_empty[operand.slot()]);
    } else {
      hand_on(&s.chunk_empty[turn.slot()]);
    }
    tiles_before += chunk.num_tiles;
    continues = is_continued(chunk);
    if (!continues) write_results(s, p, chunk, consumer, warp);
  }
}

}  // namespace sawkv
