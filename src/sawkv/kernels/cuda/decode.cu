// Decode attention over INT4 pages for Hopper: one persistent block per SM. docs/kernels.md draws it.
//
//   scheduler warp    scheduler.cuh: takes chunks from the schedule, prepares their queries
//   producer warps    producer.cuh: copy tiles of pages into a ring in shared memory; two if a tile is four copies
//   consumer warps    consumer.cuh: eight, or twelve at fewer bits; tile i goes to group i % GROUPS
//   merge warps       merger.cuh: one or two; add the groups' results of a finished chunk while consumers continue
//
// All warps but the consumers merge the rows of a block's last chunk: by then they have nothing else to do. merge.cuh
// has the kernel that adds the chunks of split units.
//
// The codes are never converted. A nibble n, masked in place, *is* the 16-bit float n * 2^-24 (fp16) or n * 2^-133
// (bf16), and is the operand of the tensor cores. Scale and zero point are applied to scores and weights:
//   score = k_scale * (q . n - k_zero * sum(q));    out = sum(p * v_scale * n) - sum(p * v_scale * v_zero).
// Odd nibbles are not shifted and read as 16 n. The factor 16 is divided out of q, or out of the output.
//
// Macros: those of attention.cuh, PAGE_SIZE, K_ORDER, ROWS (query rows of a row block, at most 8 * COLUMN_TILES),
// COLUMN_TILES (of 8 rows), ROW_BLOCKS (each has its own consumer warps).
#include "decode_shared.cuh"
#include "scheduler.cuh"
#include "producer.cuh"
#include "consumer.cuh"
#include "merger.cuh"
#include "merge.cuh"

using namespace sawkv;

extern "C" {

__device__ int sawkv_threads = THREADS;
__device__ int sawkv_shared_bytes = sizeof(Shared);

__global__ void __launch_bounds__(THREADS, 1) sawkv_decode(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) u8 dynamic[];
  Shared& s = *(Shared*)dynamic;
  if (threadIdx.x == 0) s.init_barriers();
  if constexpr (ROWS < BLOCK_ROWS) {  // rows of padding stay zero
#pragma unroll 1                      // shorter code: instructions come from memory too
    for (int i = threadIdx.x; i < (int)sizeof(s.queries) / 16; i += THREADS) ((uint4*)s.queries)[i] = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = threadIdx.x; i < (int)sizeof(s.query_stats) / 8; i += THREADS) ((float2*)s.query_stats)[i] = {0, 0};
#if BY_BUCKET
#pragma unroll 1
    for (int i = threadIdx.x; i < (int)sizeof(s.query_offsets) / 4; i += THREADS) ((float*)s.query_offsets)[i] = 0;
#endif
  }
  __syncthreads();
  const int warp = warp_index(), helper = warp - CONSUMERS;
  if (helper == FIRST_MERGER) prefetch_tiles(p);  // it has nothing else to do at first
  ptx::wait_for_prerequisites();
  ptx::let_dependents_launch();  // after the wait, so that the merge kernel may read the schedule at once
  if (warp < CONSUMERS) {
    run_consumer(s, p, warp);
    return;
  }
  int chunk = 0;
  if (helper < PRODUCERS)
    chunk = run_producer(s, p, helper) - 1;
  else if (helper == SCHEDULER)
    chunk = run_scheduler(s, p) - 1;
  else if (is_end(s, 0))
    return;
  if (chunk >= 0) run_merger(s, p, helper, chunk);
}

}  // extern "C"
