// The decode kernel's merge warps: add the consumer groups' results of a chunk, and write the sum.
#pragma once
#include "decode_shared.cuh"

namespace sawkv {

// Add the groups' results of rows first, first + step, ... of the n-th chunk. The caller has waited for them.
__device__ void merge_rows(const Shared& s, const DecodeParams& p, int n, int first, int step) {
  const Chunk chunk = s.chunks[Turn<CHUNK_SLOTS>{n}.slot()];
  if (is_continued(chunk)) return;  // consumers keep its sums
  const int slot = Turn<RESULT_SLOTS>{n}.slot();
  for (int r = first; r < CHUNK_ROWS; r += step) {
    const QueryRow row(chunk.unit, chunk.query_len, r);
    if (is_padding(r) || row.token >= chunk.query_len) continue;
    Row<HEAD_DIM> outs[RESULT_GROUPS];
    float2 stats[RESULT_GROUPS];
#pragma unroll
    for (int group = 0; group < RESULT_GROUPS; group++) {
      const int from = group * ROW_BLOCKS + r / BLOCK_ROWS;
      outs[group] = Row<HEAD_DIM>::load(s.results[slot][from][r % BLOCK_ROWS]);
      stats[group] = s.result_stats[slot][from][r % BLOCK_ROWS];
    }
    Result merged = Result::none();
    merged.add(outs, stats);
    merged.put(p, chunk, row, r);
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
