// Error feedback: docs/format.md, step 5. A warp codes the rows of its quads, ROWS for each quad of lanes.
//
// The sums of weights * errors are products of 8-bit integer matrices, with the warp's rows as rows and four blocks of
// channels as 16 columns. A lane holds one channel of each block, and its errors are its own part of the next operand,
// so no value moves between lanes. One product adds the errors of all earlier columns. The errors within the four
// blocks are added as soon as each block is coded.
//
// Macros: those of pages.cuh.
#pragma once
#include "format_constants.h"
#include "pages.cuh"
#include "quantizer.cuh"

namespace sawkv {

// Weights of one head, in shared memory as lanes read them: for each four blocks and each 32 channels whose errors they
// take, a lane's operand of the even and of the odd half of the columns. Half of all weights are zero and not here.
struct Weights {
  static constexpr int WARPS = 4;
  uint4 operands[D / 32 * (D / 32 + 1)][WARP];

  // Where the operands of `four` begin
  static __host__ __device__ constexpr int first(int four) { return (four / 2 + four % 2) * (four / 2 + 1); }

  // Starts to copy from [D][D] bytes. Each of four warps copies an eighth of every 32 x 32 weights: half the columns of
  // every other four blocks.
  __device__ void copy(const u8* weights) {
    const int column = lane_index() / 4, quad = lane_index() % 4, is_odd = warp_index() / 2, half = warp_index() % 2;
    const u8* from = weights + (column / 2 * 8 + is_odd * 4 + half * 2 + column % 2) * D + quad * 8;
    const u32 to = ptx::shared_address(&operands[0][lane_index()]) + half * 8;
#pragma unroll
    for (int group = 0; group < D / 32; group++)
#pragma unroll
      for (int k = 0; k <= group; k++)
        ptx::copy_8_bytes(to + ((group + is_odd) * (group + 1) + k) * (int)sizeof(operands[0]),
                          from + group * 32 * D + k * 32);
  }
  __device__ uint4 of(int four, int k) const { return operands[first(four) + k][lane_index()]; }
};

// d = a b + c, with ROWS * 8 rows, 16 (or 32) channels that errors come from, and 8 columns. A lane has two columns of
// its rows.
__device__ inline void multiply(int (&d)[2], const int (&c)[2], const u32 (&a)[1], u32 b) {
  ptx::mma_int8(d, c, a[0], b);
}
__device__ inline void multiply(int (&d)[4], const int (&c)[4], const u32 (&a)[2], u32 b) {
  ptx::mma_int8(d, c, a[0], a[1], b);
}
__device__ inline void multiply(int (&d)[2], const int (&c)[2], const u32 (&a)[2][1], u32 b0, u32 b1) {
  ptx::mma_int8(d, c, a[0][0], b0);
  ptx::mma_int8(d, d, a[1][0], b1);
}
__device__ inline void multiply(int (&d)[4], const int (&c)[4], const u32 (&a)[2][2], u32 b0, u32 b1) {
  ptx::mma_int8(d, c, a[0][0], a[0][1], a[1][0], a[1][1], b0, b1);
}

// The codes of rows, eight to a word. The errors of each block of channels are passed on to later blocks.
template <int BITS, int ROWS>
__device__ inline void feed_back(const Row<D, LANES> (&y)[ROWS], const Quantizer<BITS> (&quantizers)[ROWS],
                                 const Weights& weights, float head_step, u32 (&codes)[ROWS][D / 32]) {
  static_assert(LANES == 4 && Row<D, LANES>::VECTOR == 8, "a lane holds a channel of each block");
  constexpr int ROUNDER_BITS = 0x4b400000;  // adding an integer below 2^22 to these bits converts it to float
  constexpr float MAX_ERROR = (float)MAX_WEIGHT / ERROR_STEPS;  // in codes
  constexpr float MAX_CODE = Quantizer<BITS>::MAX_CODE;
  u32 errors[D / 32][2][ROWS] = {};  // of eight blocks, four per word
#pragma unroll
  for (int row = 0; row < ROWS; row++)
#pragma unroll
    for (int i = 0; i < D / 32; i++) codes[row][i] = 0;
#pragma unroll
  for (int four = 0; four < D / 16; four++) {  // groups of four blocks
    const int group = four / 2;
    const bool is_odd = four % 2;
    int taken[2][2 * ROWS];  // by the even and the odd half of the columns, from all earlier fours
#pragma unroll
    for (int i = 0; i < 2 * ROWS; i++) taken[0][i] = taken[1][i] = ROUNDER_BITS;
#pragma unroll
    for (int k = 0; k < group; k++) {
      const uint4 w = weights.of(four, k);
      multiply(taken[0], taken[0], errors[k], w.x, w.y);
      multiply(taken[1], taken[1], errors[k], w.z, w.w);
    }
    const uint4 w = weights.of(four, group);
    if (is_odd) {
      multiply(taken[0], taken[0], errors[group][0], w.x);
      multiply(taken[1], taken[1], errors[group][0], w.z);
    }
    u32(&own)[ROWS] = errors[group][is_odd];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int half = i / 2;
      int here[2 * ROWS];
      if (i == 0) {
#pragma unroll
        for (int j = 0; j < 2 * ROWS; j++) here[j] = taken[0][j];
      } else {
        multiply(here, taken[half], own, half ? (is_odd ? w.w : w.z) : (is_odd ? w.y : w.x));
      }
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        const Quantizer<BITS>& q = quantizers[row];
        const float x = y[row].x[4 * four + i], step = q.is_bounded ? head_step : 0;
        const float sum = __int_as_float(here[2 * row + i % 2]) - ROUNDER;
        const float wanted = fmaf(x, q.inverse, q.zero_point), moved = fmaf(sum, step, wanted);
        // Beyond these ends codes and errors stay as they are.
        const float within = fminf(fmaxf(moved, -MAX_ERROR), MAX_CODE + MAX_ERROR);
        const int code = ptx::clamp_sum(__float_as_int(within + ROUNDER), -ROUNDER_BITS, (int)MAX_CODE);
        // Rounding before the subtraction gives the same error, because a code is an even number of steps.
        const int error = __float_as_int(fmaf(within, ERROR_STEPS, ROUNDER)) - code * ERROR_STEPS;
        own[row] = i ? __byte_perm(own[row], error, 0x3210 ^ (4 ^ i) << 4 * i) : __byte_perm(error, 0, 0x4440);
        codes[row][group] += code << BITS * (4 * is_odd + i);
      }
    }
  }
}

}  // namespace sawkv
