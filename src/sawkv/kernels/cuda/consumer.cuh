// The decode kernel's consumer warps: attend to tiles.
//
// Fragment layouts of mma.m16n8k16 give lane l the row l / 4 of A and the columns 2 (l % 4) and + 1 of the result.
// Scores are S^T = K Q^T (tokens by queries), the output is O^T = V^T P^T (channels by queries).
#pragma once
#include "decode_shared.cuh"

namespace sawkv {

constexpr int V_SHIFT = 60;  // weights are stored in bf16 times 2^60, which keeps them in range for every fp16 scale

// What a warp attends to: one part of the heads, and a row block. The two warps of a pair have the parts of the same
// tokens and rows, and so one result.
struct Share {
  int group, head_part, pair, first_row;
  __device__ explicit Share(int warp)
      : group(warp / ROW_BLOCKS),
        head_part(group % PARTS),
        pair(PARTS == 1 ? warp : group / PARTS * ROW_BLOCKS + warp % ROW_BLOCKS),
        first_row(warp % ROW_BLOCKS * BLOCK_ROWS) {}
};

struct Consumer {
  static constexpr int WORDS = K_ROW_BYTES / 16;                                       // of K codes per lane and token
  static constexpr int GROUPS_OF_KEYS = WORDS / Keys::WORDS, FOURS = Keys::CODES / 8;  // four pairs each, of a group
  static constexpr int PLANES = Unit<V_BITS>::PLANES, ROW_TILES = SEGMENTS * PLANES / 2;  // 16 planes of V each
  static constexpr int PART = TILE / COLUMN_TILES;  // tokens attended at once; registers limit the scores
  static constexpr int BLOCKS = PART / 16;
  // Whether tiles with hidden tokens have code of their own. At 4 bits and 8 rows memory takes longer than what others
  // then save. At head_dim 64 registers do not suffice for it.
  static constexpr bool MASKS_APART = K_BITS + V_BITS < 8 || (COLUMN_TILES == 2 && D > 64);

  float maximum[COLUMN_TILES][2], sum[COLUMN_TILES][2];
  float zero[COLUMN_TILES][2];  // sum of weight * v_scale * v_zero
  float out[COLUMN_TILES][ROW_TILES][4];

  __device__ void start() {
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        maximum[t][e] = -1e30f;
        sum[t][e] = zero[t][e] = 0;
      }
#pragma unroll
      for (int i = 0; i < ROW_TILES; i++) out[t][i][0] = out[t][i][1] = out[t][i][2] = out[t][i][3] = 0;
    }
  }

  // The span that holds the 16 tokens from `token` on
  static __device__ const u8* span_of(const u8* tile, int token) { return tile + token / SPAN * SPAN_BYTES; }

  // `queries`: this lane's fragments of the warp's query rows
  static __device__ void multiply_keys(const u8* tile, int part, const uint4* queries,
                                       float (&scores)[COLUMN_TILES][BLOCKS][4]) {
    constexpr int LOAD = largest_power_of_two_in(WORDS) < 4 ? largest_power_of_two_in(WORDS) : 4;
    u32 upper[BLOCKS][WORDS], lower[BLOCKS][WORDS];  // tokens l / 4 and l / 4 + 8
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int token = part + 16 * b;
      const u8* row =
          span_of(tile, token) + (token % SPAN + lane_index() / 4) * K_ROW_BYTES + lane_index() % 4 * (K_ROW_BYTES / 4);
#pragma unroll
      for (int w = 0; w < WORDS; w += LOAD) {
        const auto u = *(const Vector<u32, LOAD>*)(row + 4 * w),
                   l = *(const Vector<u32, LOAD>*)(row + 8 * K_ROW_BYTES + 4 * w);
#pragma unroll
        for (int e = 0; e < LOAD; e++) upper[b][w + e] = u.x[e], lower[b][w + e] = l.x[e];
      }
#pragma unroll
      for (int t = 0; t < COLUMN_TILES; t++) scores[t][b][0] = scores[t][b][1] = scores[t][b][2] = scores[t][b][3] = 0;
    }
#pragma unroll
    for (int i = 0; i < GROUPS_OF_KEYS * FOURS; i++) {
      const int first_word = i / FOURS * Keys::WORDS, first_pair = i % FOURS * 4;
      u32 query[COLUMN_TILES][2][2];
#pragma unroll
      for (int t = 0; t < COLUMN_TILES; t++) {
        const uint4 q = queries[(t * (D / 32) + i) * ROWS_OF_EIGHT * 4];
        query[t][0][0] = q.x, query[t][0][1] = q.y, query[t][1][0] = q.z, query[t][1][1] = q.w;
      }
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        const Keys u(&upper[b][first_word]), l(&lower[b][first_word]);
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const int pair = first_pair + 2 * k;
          const u32 a0 = u.pair(pair), a1 = l.pair(pair), a2 = u.pair(pair + 1), a3 = l.pair(pair + 1);
#pragma unroll
          for (int t = 0; t < COLUMN_TILES; t++) ptx::mma_half(scores[t][b], a0, a1, a2, a3, query[t][k]);
        }
      }
    }
  }

  static __device__ float capped(float score, float softcap_log2) {
    return softcap_log2 * (1 - 2 / (1 + ptx::exp2(score)));  // cap * tanh(x / cap); the score is 2 x / cap in log2
  }

  // `stats` and `offsets`: those of the lane's first query column; offsets with BY_BUCKET
  static __device__ void scale_scores(const u8* tile, int part, const QueryStats* stats, const float* offsets,
                                      float softcap_log2, float (&scores)[COLUMN_TILES][BLOCKS][4]) {
    QueryStats query[COLUMN_TILES][2];
#if BY_BUCKET
    float offset[COLUMN_TILES][2];
#endif
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        query[t][e] = stats[8 * t + e];
#if BY_BUCKET
        offset[t][e] = offsets[8 * t + e];
#endif
      }
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int token = part + 16 * b;
      const u32* meta = (const u32*)(span_of(tile, token) + K_META) + token % SPAN + lane_index() / 4;
#pragma unroll
      for (int h = 0; h < 2; h++) {  // the lane's two tokens
        const float scale = ptx::low_half_to_float(meta[8 * h]), zero_point = ptx::high_half_to_float(meta[8 * h]);
#pragma unroll
        for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float& score = scores[t][b][2 * h + e];
            score = (score - zero_point * query[t][e].sum) * (scale * query[t][e].factor);
#if BY_BUCKET
            score += offset[t][e];
#elif SOFTCAP && OFFSET
            score += query[t][e].offset;
#endif
            if (SOFTCAP && PARTS == 1) score = capped(score, softcap_log2);
          }
      }
    }
  }

#if PARTS > 1
  // Adds the scores over the head's other part, which the pair's other warp has computed meanwhile. Both get the same
  // sums to the last bit, so both raise their maxima alike.
  static __device__ void add_other_part(Shared& s, const Share& share, float softcap_log2,
                                        float (&scores)[COLUMN_TILES][BLOCKS][4]) {
    float4* own = &s.exchanged[share.pair][share.head_part][lane_index()];
    const float4* other = &s.exchanged[share.pair][1 - share.head_part][lane_index()];
#pragma unroll
    for (int i = 0; i < COLUMN_TILES * BLOCKS; i++) {
      const float (&score)[4] = scores[i / BLOCKS][i % BLOCKS];
      own[i * WARP] = {score[0], score[1], score[2], score[3]};
    }
    ptx::sync_threads(1 + share.pair, PARTS * WARP);
#pragma unroll
    for (int i = 0; i < COLUMN_TILES * BLOCKS; i++) {
      float (&score)[4] = scores[i / BLOCKS][i % BLOCKS];
      const float4 x = other[i * WARP];
      // never contracted to an fma, which would round one of the two alone
      score[0] = __fadd_rn(score[0], x.x), score[1] = __fadd_rn(score[1], x.y);
      score[2] = __fadd_rn(score[2], x.z), score[3] = __fadd_rn(score[3], x.w);
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (SOFTCAP) score[e] = capped(score[e], softcap_log2);
    }
    ptx::sync_threads(1 + share.pair, PARTS * WARP);  // the other has read before this warp writes again
  }
#endif

  // Set scores to minus infinity for tokens that a query does not see or that do not exist.
  __device__ void mask_scores(const Chunk& chunk, int window, int unit, int first_row, int first_token,
                              float (&scores)[COLUMN_TILES][BLOCKS][4]) const {
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const QueryRow row(chunk.unit + unit, chunk.query_len, first_row + 8 * t + 2 * (lane_index() % 4) + e);
        const int last = min(chunk.length - chunk.query_len + row.token, chunk.length - 1);
        const int first = window ? last - window + 1 : 0;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int token = first_token + 16 * b + 8 * h + lane_index() / 4;
            if (token > last || token < first) scores[t][b][2 * h + e] = -infinity();
          }
      }
  }

  // Rescale lazily: only when a maximum grows by more than 4 in log2, so weights stay below 2^4.
  __device__ void raise_maximum(const float (&scores)[COLUMN_TILES][BLOCKS][4]) {
    float largest[COLUMN_TILES][2];
    bool grows = false;
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        largest[t][e] = maximum[t][e];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
          largest[t][e] = fmaxf(largest[t][e], fmaxf(scores[t][b][e], scores[t][b][2 + e]));
        grows |= largest[t][e] > maximum[t][e] + 4;
      }
    if (!__any_sync(ALL_LANES, grows)) return;
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
#pragma unroll
        for (int d = 4; d < WARP; d *= 2)
          largest[t][e] = fmaxf(largest[t][e], __shfl_xor_sync(ALL_LANES, largest[t][e], d));
        const float factor = ptx::exp2(maximum[t][e] - largest[t][e]);
        maximum[t][e] = largest[t][e];
        sum[t][e] *= factor;
        zero[t][e] *= factor;
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) out[t][i][e] *= factor, out[t][i][2 + e] *= factor;
      }
  }

  // `is_masked`: some tokens are hidden. Their weights are 0, but their scales and zero points may be NaN.
  __device__ __forceinline__ void multiply_values(const u8* tile, int part, bool is_masked,
                                                  const float (&scores)[COLUMN_TILES][BLOCKS][4]) {
    const int lane = lane_index();
    const int swizzle = lane % 8 * ODD_SEGMENTS * SWIZZLE_PERIOD / 8 % SWIZZLE_PERIOD;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int token = part + 16 * b;
      const u8* span = span_of(tile, token);
      const u32* meta = (const u32*)(span + V_META) + token % SPAN + lane / 4;
      u32 weights[COLUMN_TILES][2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float scale = ptx::low_half_to_float(meta[8 * h]) * power_of_two(V_SHIFT),
                    zero_point = ptx::high_half_to_float(meta[8 * h]);
#pragma unroll
        for (int t = 0; t < COLUMN_TILES; t++) {
          float scaled[2];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const float weight = ptx::exp2(scores[t][b][2 * h + e] - maximum[t][e]);
            sum[t][e] += weight;
            scaled[e] = is_masked && weight == 0 ? 0 : weight * scale;
          }
          const u32 rounded = ptx::pack_bfloats(scaled[0], scaled[1]);
          // From the rounded weights: their error then multiplies n - zero, not n and zero separately.
          zero[t][0] += is_masked && scaled[0] == 0 ? 0 : ptx::low_bfloat_to_float(rounded) * zero_point;
          zero[t][1] += is_masked && scaled[1] == 0 ? 0 : ptx::high_bfloat_to_float(rounded) * zero_point;
          weights[t][h] = ptx::transpose_matrix(rounded);
        }
      }
      const u32 rows = ptx::shared_address(span + V_CODES + (token % SPAN + lane % 16) * V_ROW_BYTES);
#pragma unroll
      for (int segment = 0; segment < SEGMENTS; segment += 2) {
        u32 r[4];  // tokens 0-7 and 8-15 of segment, then of segment + 1
        if (segment + 1 < SEGMENTS) {
          ptx::load_4_matrices_transposed(r, rows + ((segment + lane / 16) ^ swizzle) * 16);
        } else {
          ptx::load_2_matrices_transposed(r[0], r[1], rows + (segment ^ swizzle) * 16);
        }
#pragma unroll
        for (int i = 0; i < 2 && segment + i < SEGMENTS; i++) {
          const Unit<V_BITS> x(r[2 * i]), y(r[2 * i + 1]);
#pragma unroll
          for (int k = 0; k < PLANES / 2; k++) {
            const u32 a0 = x.plane(2 * k), a1 = x.plane(2 * k + 1), a2 = y.plane(2 * k), a3 = y.plane(2 * k + 1);
#pragma unroll
            for (int t = 0; t < COLUMN_TILES; t++)
              ptx::mma_bfloat(out[t][PLANES / 2 * (segment + i) + k], a0, a1, a2, a3, weights[t]);
          }
        }
      }
    }
  }

  // Attend to PART tokens of `tile`, whose first one is at `first_token`, from `part` on; for the chunk's unit `unit`.
  __device__ void attend(const u8* tile, int part, Shared& s, int slot, const Chunk& chunk, int unit,
                         const DecodeParams& p, const Share& share, int first_token) {
    float scores[COLUMN_TILES][BLOCKS][4];
    const int first_row = (unit + share.head_part) * CHUNK_ROWS + share.first_row;
    const int lane = lane_index() / 4 % ROWS_OF_EIGHT * 4 + lane_index() % 4;
    multiply_keys(tile, part, (const uint4*)&s.queries[slot][first_row / 8 * ROWS_OF_EIGHT * D] + lane, scores);
    const int column = first_row + 2 * (lane_index() % 4);
    const float* offsets = offsets_at(s, slot, chunk_bucket(chunk, first_token), column);
    scale_scores(tile, part, &s.query_stats[slot][column], offsets, p.softcap_log2, scores);
#if PARTS > 1
    add_other_part(s, share, p.softcap_log2, scores);
#endif
    const int begin = first_token + part;
    const bool is_masked =
        begin + PART > chunk.length - chunk.query_len + 1 || (p.window && begin < chunk.length - p.window);
    if (is_masked) mask_scores(chunk, p.window, unit, share.first_row, begin, scores);
    raise_maximum(scores);
    if (MASKS_APART && is_masked)
      multiply_values(tile, part, true, scores);
    else
      multiply_values(tile, part, MASKS_APART ? false : is_masked, scores);
  }

  // Plane i of the lane's unit in a segment, for column e of tile t, in the unit of values
  __device__ float value(int t, int segment, int i, int e) const {
    constexpr int V_EXPONENT = 133 - V_SHIFT;  // bf16 codes are n * 2^-133
    return out[t][(segment * PLANES + i) / 2][i % 2 * 2 + e] * power_of_two(V_EXPONENT - Unit<V_BITS>::exponent(i));
  }

  // Pass the result of a chunk to the merge warps. `index`: among those of a slot
  __device__ void store(Shared& s, int slot, int index, const Share& share) {
    int lane = lane_index();
    if constexpr (V_BITS == 3)
      ptx::forget(lane);  // else all that follows from it takes registers in the loop over tiles
#pragma unroll
    for (int t = 0; t < COLUMN_TILES; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
#pragma unroll
        for (int d = 4; d < WARP; d *= 2) {
          sum[t][e] += __shfl_xor_sync(ALL_LANES, sum[t][e], d);
          zero[t][e] += __shfl_xor_sync(ALL_LANES, zero[t][e], d);
        }
        float sixteenth[V_BITS == 3 ? D / 128 : 1];
        if constexpr (V_BITS == 3)
#pragma unroll
          for (int i = 0; i < D / 128; i++) sixteenth[i] = add_top_bits(t, 3 * i, e, lane);
        const int row = 8 * t + 2 * (lane % 4) + e;
        if (row >= ROWS) continue;
        const float offset = zero[t][e] * power_of_two(-V_SHIFT);
        float* channels = s.results[slot][index][row] + share.head_part * D;
        if constexpr (V_BITS == 3)
#pragma unroll
          for (int i = 0; i < D / 128; i++) channels[128 * i + lane / 4 * 16 + 15] = sixteenth[i] - offset;
#pragma unroll
        for (int i = 0; i < SEGMENTS; i++) {
          if constexpr (V_BITS == 3) {
#pragma unroll
            for (int k = 0; k < 5; k++) channels[first_channel(8 * i + lane / 4) + k] = value(t, i, k, e) - offset;
          } else {
#pragma unroll
            for (int k = 0; k < PLANES; k += 4)
              ((Vector<float, 4>*)channels)[(8 * i + lane / 4) * (PLANES / 4) + k / 4] = {
                  value(t, i, k, e) - offset, value(t, i, k + 1, e) - offset, value(t, i, k + 2, e) - offset,
                  value(t, i, k + 3, e) - offset};
          }
        }
        if (lane / 4 == 0 && share.head_part == 0) s.result_stats[slot][index][row] = {maximum[t][e], sum[t][e]};
      }
  }

  // At 3 bits: every 32 channels are six units, low and high half of three words. A half's five codes per word belong
  // to neighbouring channels.
  static __device__ int first_channel(int unit) { return unit / 6 * 32 + unit % 2 * 16 + unit % 6 / 2 * 5; }

  // The top bits of three words are the code of one more channel, the last of 16. Of three segments, which are 128
  // channels, lanes 4 i to 4 i + 3 get those of the i-th 16.
  __device__ float add_top_bits(int t, int first_segment, int e, int lane) const {
    const int unit = lane / 4;  // a lane's three units, eight apart, are of three different words
    const float own[3] = {value(t, first_segment, 5, e), value(t, first_segment + 1, 5, e),
                          value(t, first_segment + 2, 5, e)};
    float sum = 0;
#pragma unroll
    for (int word = 0; word < 3; word++) {
      const int segment = (word + unit / 2 * 2) % 3, source = (unit / 2 * 6 + word * 2 + unit % 2) % 8;
      const float of_word = segment == 0 ? own[0] : segment == 1 ? own[1] : own[2];
      sum += __shfl_sync(ALL_LANES, of_word, source * 4 + lane % 4) * power_of_two(word);
    }
    return sum;
  }
};

__device__ void run_consumer(Shared& s, const DecodeParams& p, int warp) {
  const Share share(warp);
  int tiles_before = 0;
  bool continues = false;  // whether rows and sums of the last entry go on
  Consumer consumer;
  for (int n = 0;; n++) {
    const Turn<CHUNK_SLOTS> turn{n};
    ptx::wait(&s.queries_full[turn.slot()], turn.phase());
    const Chunk chunk = s.chunks[turn.slot()];
    if (!chunk.num_tiles) return;
    if (!continues) consumer.start();
    const int first = (share.group + GROUPS - tiles_before % GROUPS) % GROUPS;
    const int unit = first & (1 << log2_units(chunk)) - 1;  // of all tiles of the group in this chunk
    for (int tile = first; tile < num_tiles(chunk); tile += GROUPS) {
      const Turn<STAGES> stage{tiles_before + tile};
      ptx::wait(&s.tile_full[stage.slot()], stage.phase());
#pragma unroll 1
      for (int part = 0; part < TILE; part += Consumer::PART)
        consumer.attend(s.tiles[stage.slot()], part, s, turn.slot(), chunk, unit, p, share, first_token(chunk, tile));
      __syncwarp();
      if (arrives()) ptx::arrive(&s.tile_empty[stage.slot()]);
    }
    tiles_before += num_tiles(chunk);
    const Turn<RESULT_SLOTS> result{n};
    ptx::wait(&s.results_empty[result.slot()], result.phase() ^ 1);
    continues = is_continued(chunk);
    // Of several units, the merge warps know each by the group's first tile.
    if (!continues) consumer.store(s, result.slot(), UNITS == 1 ? share.pair : first, share);
    __syncwarp();
    if (arrives()) ptx::arrive(&s.results_full[result.slot()]);
  }
}

}  // namespace sawkv
