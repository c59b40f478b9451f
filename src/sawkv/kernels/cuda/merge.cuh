// The kernel that runs after an attention kernel: adds the partial results of units that were split into chunks.
//
// Included after the attention kernel defines ROW_BLOCKS, ROWS and BLOCK_ROWS.
#pragma once
#include "attention.cuh"

using namespace sawkv;

extern "C" {

// Add the chunks of each split unit. With few chunks each warp takes a row. With many, all warps of a block share a
// row.
constexpr int MERGE_WARPS = 8;

__global__ void __launch_bounds__(MERGE_WARPS* WARP) sawkv_merge(const __grid_constant__ DecodeParams p) {
  constexpr int MANY = 8, AT_ONCE = 4, ROWS_PER_UNIT = ROW_BLOCKS * ROWS;
  __shared__ float shared_outs[MERGE_WARPS][HEAD_DIM];
  __shared__ float2 shared_stats[MERGE_WARPS];
  const ScheduleHeader header = *p.header;  // already written: decode started after the schedule's end
  const bool share = header.num_split_chunks > MANY * header.num_split_units;
  const int num_rows = header.num_split_units * ROWS_PER_UNIT, warp = warp_index();
  const int first = share ? blockIdx.x : blockIdx.x * MERGE_WARPS + warp,
            step = share ? gridDim.x : gridDim.x * MERGE_WARPS;
  SplitUnit split{};
  if (first < num_rows) split = p.splits[first / ROWS_PER_UNIT];
  ptx::wait_for_prerequisites();
  ptx::let_dependents_launch();
  for (int i = first; i < num_rows; i += step) {
    if (i != first) split = p.splits[i / ROWS_PER_UNIT];
    const int r = i % ROWS_PER_UNIT / ROWS * BLOCK_ROWS + i % ROWS;
    const QueryRow row(split.unit, split.query_len, r);
    if (row.token >= split.query_len) continue;  // equal in all warps that share the row
    auto merged = Result<>::none();
    const int begin = share ? warp : 0, stride = share ? MERGE_WARPS : 1;
    for (int c = begin; c < split.num_chunks; c += AT_ONCE * stride) {
      Row<HEAD_DIM> outs[AT_ONCE];
      float2 stats[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const bool is_there = c + k * stride < split.num_chunks;
        const i64 index = (i64)(split.first_chunk + c + k * stride) * CHUNK_ROWS + r;
        outs[k] = is_there ? Row<HEAD_DIM>::load(p.partials + index * HEAD_DIM) : Row<HEAD_DIM>::filled(0);
        stats[k] = is_there ? p.partial_stats[index] : float2{-1e30f, 0};
      }
      merged.add(outs, stats);
    }
    if (share) {
      __syncthreads();
      merged.out.store(shared_outs[warp]);
      if (lane_index() == 0) shared_stats[warp] = {merged.maximum, merged.sum};
      __syncthreads();
      if (warp != 0) continue;
      Row<HEAD_DIM> outs[MERGE_WARPS - 1];
      float2 stats[MERGE_WARPS - 1];
#pragma unroll
      for (int w = 1; w < MERGE_WARPS; w++) {
        outs[w - 1] = Row<HEAD_DIM>::load(shared_outs[w]);
        stats[w - 1] = shared_stats[w];
      }
      merged.add(outs, stats);
    }
    merged.write(p, split.query_start, row);
  }
}

}  // extern "C"
