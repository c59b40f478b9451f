// Attention of many query rows over INT4 pages for Hopper (sm_90a), as short turns need. It dequantizes a tile once for
// all rows, where decode.cu would do so for every 16. One persistent block per SM. docs/kernels.md describes it.
//
//   scheduler warp      scheduler.cuh: takes chunks from the schedule, prepares their queries
//   producer warp       producer.cuh: copies tiles of pages into a ring in shared memory
//   scaler warp         dequantizer.cuh: prepares the scales of tiles
//   dequantizer warps   dequantizer.cuh: four; convert tiles to operands, once for all rows
//   consumer warps      extend_consumer.cuh: two warpgroups; one computes weights while the other uses the tensor cores
//
// Macros: those of attention.cuh, PAGE_SIZE, K_ORDER. CHUNK_ROWS is 64 or 128.
#include "extend_shared.cuh"
#include "scheduler.cuh"
#include "producer.cuh"
#include "dequantizer.cuh"
#include "extend_consumer.cuh"
#include "merge.cuh"

using namespace sawkv;

extern "C" {

__device__ int sawkv_threads = THREADS;
__device__ int sawkv_shared_bytes = sizeof(Shared);

__global__ void __launch_bounds__(THREADS, 1) sawkv_extend(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) u8 dynamic[];
  Shared& s = *(Shared*)dynamic;
  if (threadIdx.x == 0) s.init_barriers();
  __syncthreads();
  ptx::wait_for_prerequisites();
  ptx::let_dependents_launch();  // after the wait, so that the merge kernel may read the schedule at once
  const int warp = uniform(warp_index());
  if (warp < FIRST_DEQUANTIZER) {
    ptx::give_registers<HELPER_REGISTERS>();
    if (warp < PRODUCERS)
      run_producer(s, p, warp);
    else if (warp == SCHEDULER)
      run_scheduler(s, p);
    else if (warp == SCALER)
      run_scaler(s, p);
    else
      share_scheduling(s, p, warp - SCHEDULER);
  } else if (warp < FIRST_CONSUMER) {
    ptx::give_registers<HELPER_REGISTERS>();
    run_dequantizer(s, threadIdx.x - FIRST_DEQUANTIZER * WARP);
  } else {
    ptx::take_registers<CONSUMER_REGISTERS>();
    run_extend_consumer(s, p, warp - FIRST_CONSUMER);
  }
}

}  // extern "C"
