// The decode kernel's merge warps: add the consumer groups' results of a chunk, and write the sum.
#pragma once
#include "decode_shared.cuh"

namespace sawkv {

constexpr int ROW_LANES = HEAD_DIM <= 128 ? 16 : WARP;  // two rows at once, whose latencies overlap
using Merged = Result<ROW_LANES>;

// Adds N results of row r, of every step-th group from `group` on.
template <int N>
__device__ void add_results(Merged& sum, const Shared& s, int slot, int group, int step, int r) {
  Merged::R outs[N];
  float2 stats[N];
#pragma unroll
  for (int k = 0; k < N; k++) {
    const int from = (group + k * step) * ROW_BLOCKS + r / BLOCK_ROWS;
    outs[k] = Merged::R::load(s.results[slot][from][r % BLOCK_ROWS]);
    stats[k] = s.result_stats[slot][from][r % BLOCK_ROWS];
  }
  sum.add(outs, stats);
}

// Merge warp `share` of `shares` adds the groups' results of its rows of the n-th chunk, and puts the sums. The caller
// has waited for them.
__device__ void merge_rows(const Shared& s, const DecodeParams& p, int n, int share, int shares) {
  const Chunk chunk = s.chunks[Turn<CHUNK_SLOTS>{n}.slot()];
  if (is_continued(chunk)) return;  // consumers keep its sums
  constexpr int AT_ONCE = WARP / ROW_LANES, HALF = divide_up(RESULT_GROUPS, 2);
  const int slot = Turn<RESULT_SLOTS>{n}.slot(), units = 1 << log2_units(chunk);
  for (int first = share * AT_ONCE; first < CHUNK_ROWS * units; first += shares * AT_ONCE) {
    const int i = first + lane_index() / ROW_LANES, unit = UNITS == 1 ? 0 : i / CHUNK_ROWS;
    int r = i - unit * CHUNK_ROWS;
    const bool is_there = !is_padding(r) && QueryRow(chunk.unit + unit, chunk.query_len, r).token < chunk.query_len;
    if (!__any_sync(ALL_LANES, is_there)) continue;
    if (!is_there) r = 0;  // always there
    Merged merged = Merged::none();
    if (units == 1)
      for (int group = 0; group < RESULT_GROUPS; group += HALF) add_results<HALF>(merged, s, slot, group, 1, r);
    else
      for (int group = unit; group < RESULT_GROUPS; group += RESULT_GROUPS / UNITS * units)
        add_results<RESULT_GROUPS / UNITS>(merged, s, slot, group, units, r);
    merged.put(p, chunk, QueryRow(chunk.unit + unit, chunk.query_len, r), r, is_there);
  }
}

// Waits for the n-th chunk, and returns whether the schedule ended before it.
__device__ bool is_end(Shared& s, int n) {
  const Turn<CHUNK_SLOTS> turn{n};
  ptx::wait(&s.chunk_full[turn.slot()], turn.phase());
  return s.chunks[turn.slot()].num_tiles == 0;
}

// The last role of all helpers. Merge warps share the rows of each chunk, from the first one. The other helpers join
// for the last chunk, n, whose rows all helpers share.
__device__ void run_merger(Shared& s, const DecodeParams& p, int helper, int n) {
  for (;; n++) {
    const bool is_last = helper < FIRST_MERGER || is_end(s, n + 1);
    const Turn<RESULT_SLOTS> result{n};
    if (helper >= FIRST_MERGER) {
      ptx::wait(&s.results_full[result.slot()], result.phase());
      if (is_last && helper == FIRST_MERGER && arrives()) ptx::arrive(&s.last_results_full);
    } else {
      ptx::wait(&s.last_results_full, 0);
    }
    merge_rows(s, p, n, is_last ? helper : helper - FIRST_MERGER, is_last ? HELPERS : MERGERS);
    if (is_last) return;
    __syncwarp();
    if (arrives()) {
      ptx::arrive(&s.results_empty[result.slot()]);
      ptx::arrive(&s.chunk_empty[Turn<CHUNK_SLOTS>{n}.slot()]);
    }
  }
}

}  // namespace sawkv
