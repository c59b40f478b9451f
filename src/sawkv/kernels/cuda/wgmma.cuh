// Warpgroup matrix products (wgmma), which only sm_90a has. A is in registers, B in shared memory, both fp16. Sums are
// fp32.
#pragma once
#include "common.cuh"

namespace sawkv::ptx {

#define SAWKV_4_FLOATS(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SAWKV_16_FLOATS(d, i) \
  SAWKV_4_FLOATS(d, i), SAWKV_4_FLOATS(d, i + 4), SAWKV_4_FLOATS(d, i + 8), SAWKV_4_FLOATS(d, i + 12)
#define SAWKV_32_FLOATS(d, i) SAWKV_16_FLOATS(d, i), SAWKV_16_FLOATS(d, i + 16)
#define SAWKV_64_FLOATS(d, i) SAWKV_32_FLOATS(d, i), SAWKV_32_FLOATS(d, i + 32)

// Descriptor of a matrix in shared memory. It consists of panels of 64 columns, with rows of 128 bytes, whose 16-byte
// segment s lies at s ^ row % 8. PANEL_BYTES is the distance of panels, for products that take several. `start` is the
// address divided by 16, so that one addition gives each instruction's operand.
template <int PANEL_BYTES>
__device__ inline u64 matrix_of_panels(u32 start) {
  constexpr u32 SWIZZLE_128 = 1u << 30, EIGHT_ROWS = 1024 >> 4;
  u64 descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(start | PANEL_BYTES >> 4 << 16), "r"(SWIZZLE_128 | EIGHT_ROWS));
  return descriptor;
}

// d[64 x 64] = a[64 x 16] b[16 x 64], plus d where `adds`
template <int TRANSPOSED>
__device__ inline void mma_warpgroup(float (&d)[32], const u32 (&a)[4], u64 b, bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred adds;\n"
      "setp.ne.b32 adds, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, adds, 1, 1, %38;\n"
      "}"
      : SAWKV_32_FLOATS(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)adds), "n"(TRANSPOSED));
}

// d[64 x 128] = a[64 x 16] b[16 x 128], plus d where `adds`
template <int TRANSPOSED>
__device__ inline void mma_warpgroup(float (&d)[64], const u32 (&a)[4], u64 b, bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred adds;\n"
      "setp.ne.b32 adds, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, adds, 1, 1, %70;\n"
      "}"
      : SAWKV_64_FLOATS(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)adds), "n"(TRANSPOSED));
}

#undef SAWKV_4_FLOATS
#undef SAWKV_16_FLOATS
#undef SAWKV_32_FLOATS
#undef SAWKV_64_FLOATS

// Required before a product that reads registers written since the last one, sums included
__device__ inline void fence_warpgroup() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_warpgroup() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N committed groups are in flight.
template <int N>
__device__ inline void wait_warpgroup() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving reads and writes of sums past this point.
template <int N>
__device__ inline void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int M, int N>
__device__ inline void pin(u32 (&a)[M][N]) {
#pragma unroll
  for (int i = 0; i < M * N; i++) asm volatile("" : "+r"(a[i / N][i % N])::"memory");
}

// Set the registers per thread of this warpgroup.
template <int N>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace sawkv::ptx
