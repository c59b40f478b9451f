// Decode attention over INT4 pages for Hopper: one persistent block per SM. docs/kernels.md draws it.
//
//   scheduler warp    scheduler.cuh: takes chunks from the plan, prepares their queries
//   producer warps    producer.cuh: bring tiles of pages into a ring in shared memory; two where pages are small
//   consumer warps    consumer.cuh: eight; tile i goes to consumer group i % GROUPS
//   merge warps       merger.cuh: one or two; add the groups' results of a finished chunk while the consumers go on
//   with
//                     the next. The rows of a block's last chunk are shared by all warps that are not consumers, which
//                     have nothing else to do by then.
//
// The codes are never converted. A nibble n, masked in place, *is* the 16-bit float n * 2^-24 (fp16) or n * 2^-133
// (bf16), so it goes to the tensor cores as it is; scale and zero point act on scores and on weights:
//   score = k_scale * (q . n - k_zero * sum(q));    out = sum(p * v_scale * n) - sum(p * v_scale * v_zero).
// Odd nibbles stay in place as 16 n, and the 16 is divided out of q, or out of the output.
//
// Macros: those of attention.cuh, PAGE_SIZE, K_ORDER, ROWS (query rows of a row block, at most 8 * COLUMN_TILES),
// COLUMN_TILES (of 8 rows), ROW_BLOCKS (dealt to consumer warps).
#include "scheduler.cuh"
#include "producer.cuh"
#include "consumer.cuh"
#include "merger.cuh"

using namespace sawkv;

extern "C" {

__device__ int sawkv_threads = THREADS;
__device__ int sawkv_shared_bytes = sizeof(Shared);

__global__ void __launch_bounds__(THREADS, 1) sawkv_decode(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) u8 dynamic[];
  Shared& s = *(Shared*)dynamic;
  if (threadIdx.x == 0) s.init_barriers();
  if constexpr (ROWS < BLOCK_ROWS) {  // rows of padding stay zero
#pragma unroll 1                      // code is read from memory too, and nothing runs beside this
    for (int i = threadIdx.x; i < (int)sizeof(s.queries) / 16; i += THREADS) ((uint4*)s.queries)[i] = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = threadIdx.x; i < (int)sizeof(s.query_stats) / 8; i += THREADS) ((float2*)s.query_stats)[i] = {0, 0};
  }
  __syncthreads();
  ptx::wait_for_prerequisites();
  ptx::let_dependents_launch();  // after the wait: the merge kernel may read the plan at once
  const int warp = warp_index();
  if (warp < CONSUMERS) {
    run_consumer(s, p, warp);
    return;
  }
  const int helper = warp - CONSUMERS;
  int chunk = 0;
  if (helper < PRODUCERS)
    chunk = run_producer(s, p, helper) - 1;
  else if (helper == SCHEDULER)
    chunk = run_scheduler(s, p) - 1;
  else if (is_end(s, 0))
    return;
  if (chunk >= 0) run_merger(s, p, helper, chunk);
}

// Add the chunks of each split unit. A warp takes a row where there are few chunks; all warps of a block share one
// where there are many.
constexpr int MERGE_WARPS = 8;

__global__ void __launch_bounds__(MERGE_WARPS* WARP) sawkv_merge(const __grid_constant__ DecodeParams p) {
  constexpr int MANY = 8, AT_ONCE = 4, ROWS_PER_UNIT = ROW_BLOCKS * ROWS;
  __shared__ float shared_outs[MERGE_WARPS][D];
  __shared__ float2 shared_stats[MERGE_WARPS];
  const PlanHeader header = *p.header;  // the decode kernel started after the plan was there
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
    const QueryRow row(split.unit, r);
    if (row.token >= split.query_len) continue;  // the same for all warps that share it
    Result merged = Result::none();
    const int begin = share ? warp : 0, stride = share ? MERGE_WARPS : 1;
    for (int c = begin; c < split.num_chunks; c += AT_ONCE * stride) {
      Row<D> outs[AT_ONCE];
      float2 stats[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        const bool is_there = c + k * stride < split.num_chunks;
        const i64 index = (i64)(split.first_chunk + c + k * stride) * CHUNK_ROWS + r;
        outs[k] = is_there ? Row<D>::load(p.partials + index * D) : Row<D>::filled(0);
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
      Row<D> outs[MERGE_WARPS - 1];
      float2 stats[MERGE_WARPS - 1];
#pragma unroll
      for (int w = 1; w < MERGE_WARPS; w++) {
        outs[w - 1] = Row<D>::load(shared_outs[w]);
        stats[w - 1] = shared_stats[w];
      }
      merged.add(outs, stats);
    }
    merged.write(p, split.query_start, row);
  }
}

}  // extern "C"
