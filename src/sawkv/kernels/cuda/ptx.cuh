// PTX instructions. Compiled by NVRTC with no CUDA headers. tests/emulator has the same functions for a CPU, so PTX
// stands only here and in wgmma.cuh.
#pragma once
#include "integers.cuh"

namespace sawkv::ptx {

__device__ inline u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ inline float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Unlike fminf and fmaxf, these pass NaN on.
__device__ inline float min_or_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ inline float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// fp16 and bf16 as raw bits
__device__ inline float half_to_float(u16 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}
__device__ inline u16 float_to_half(float x) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ inline u16 float_to_bfloat(float x) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ inline float low_half_to_float(u32 pair) { return half_to_float((u16)pair); }
__device__ inline float high_half_to_float(u32 pair) { return half_to_float((u16)(pair >> 16)); }
__device__ inline float low_bfloat_to_float(u32 pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_bfloat_to_float(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ inline u32 pack_bfloats(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline u32 pack_halfs(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// a * b + c of pairs, rounded once; subnormals are exact
__device__ inline u32 fma_halfs(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ inline u32 negate_halfs(u32 a) {
  u32 b;
  asm("neg.f16x2 %0, %1;" : "=r"(b) : "r"(a));
  return b;
}
__device__ inline void store_shared(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// Loads N words. The compiler keeps the order of these loads, so that all are under way before the first is waited for.
template <int N>
__device__ inline void load_in_order(const void* from, u32* to) {
  static_assert(N == 1 || N == 2 || N == 4, "one instruction");
  if constexpr (N == 1)
    asm volatile("ld.relaxed.cta.global.b32 %0, [%1];" : "=r"(to[0]) : "l"(from) : "memory");
  else if constexpr (N == 2)
    asm volatile("ld.relaxed.cta.global.v2.b32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from) : "memory");
  else
    asm volatile("ld.relaxed.cta.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from)
                 : "memory");
}

// Loads four floats that nothing writes while the kernel runs. Unlike others, such loads may overtake stores.
__device__ inline void load_constants(const float* from, float* to) {
  asm("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "l"(from));
}

// One store of 16 bytes: compilers take some of several such stores apart, into stores of 2 or 4 bytes
__device__ inline void store_global(uint4* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w));
}

// Matrices of 8 x 8 16-bit elements
__device__ inline u32 transpose_matrix(u32 a) {
  u32 d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
__device__ inline void load_4_matrices_transposed(u32 (&r)[4], u32 row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}
__device__ inline void load_2_matrices_transposed(u32& a, u32& b, u32 row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(a), "=r"(b)
               : "r"(row_address)
               : "memory");
}
// c[16 x 8] += a[16 x 16] b[16 x 8]
__device__ inline void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_bfloat(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]));
}
// d[rows x 8] = a[rows x channels] b[channels x 8] + c in 8-bit integers: 16 rows and 32 channels, 16 and 16, 8 and 16
__device__ inline void mma_int8(int (&d)[4], const int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, "
      "%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
__device__ inline void mma_int8(int (&d)[4], const int (&c)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
__device__ inline void mma_int8(int (&d)[2], const int (&c)[2], u32 a, u32 b) {
  asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
      : "=r"(d[0]), "=r"(d[1])
      : "r"(a), "r"(b), "r"(c[0]), "r"(c[1]));
}
// a + b, but at least 0 and at most `top`; one instruction
__device__ inline int clamp_sum(int a, int b, int top) {
  int d;
  asm("min.relu.s32 %0, %1, %2;" : "=r"(d) : "r"(a + b), "r"(top));
  return d;
}

// Barriers in shared memory
__device__ inline void init_barrier(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes this thread's writes to shared memory, barriers included, visible to bulk copies and warpgroup products.
__device__ inline void publish_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void arrive_expecting(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Whether the phase of this parity has ended. A fresh barrier is in phase 0, and phase -1 (parity 1) has ended.
__device__ inline bool has_ended(u64* barrier, u32 parity) {
  u32 has;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(has)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return has;
}
// Waits until that phase has ended.
__device__ inline void wait(u64* barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Named barriers of `threads` threads. Number 0 is that of __syncthreads.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Bulk copy, 16-byte aligned; its bytes count on `barrier`.
__device__ inline u64 evict_first_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline u64 evict_normal_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline void copy_to_shared(void* to, const void* from, u32 bytes, u64* barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// Asks L2 for memory that a copy will read. Address and bytes are multiples of 16.
__device__ inline void prefetch(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// Loads what other kernels may be writing, and leaves nothing of it in L1, where later loads would find it.
__device__ inline int load_past_l1(const int* from) {
  int x;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

// Hides from the compiler what x is, so that nothing that follows from it is computed ahead.
__device__ inline void forget(int& x) { asm volatile("" : "+r"(x)); }

// Copies to shared memory of which each thread waits for its own
__device__ inline void copy_8_bytes(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Programmatic dependent launch. The first has an effect only if the next kernel was launched with it, the second only
// if this one was.
__device__ inline void let_dependents_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace sawkv::ptx
