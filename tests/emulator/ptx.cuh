// The functions of the kernels' ptx.cuh. The PTX manual has the layouts of fragments.
#pragma once
#include "emulator.h"
#include "integers.cuh"

namespace sawkv::ptx {

using namespace emulator;

// 32 bits, relative to dynamic memory, which static memory is not far from
u32 shared_address(const void* p) { return (const u8*)p - shared_memory; }
u8* at_shared(u32 address) { return shared_memory + (int)address; }

float exp2(float x) { return exp2f(x); }
float log2(float x) { return log2f(x); }
float min_or_nan(float a, float b) { return a < b || a != a ? a : b; }
float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

float half_to_float(u16 bits) {
  const float x = same_bits<float>((bits & 0x7fffu) << 13) * 0x1p112f;
  return copysignf(x < 65536 ? x : x > 65536 ? NAN : INFINITY, (short)bits);
}
u16 float_to_half(float x) {
  const u32 bits = same_bits<u32>(fabsf(x)), sign = same_bits<u32>(x) >> 16 & 0x8000;
  if (!(fabsf(x) < 65520)) return sign | (x != x ? 0x7fff : 0x7c00);
  if (fabsf(x) < 0x1p-14f) return sign | same_bits<u32>(fabsf(x) + 0.5f) - same_bits<u32>(0.5f);  // units of 2^-24
  return sign | bits + 0xfff + (bits >> 13 & 1) - (112 << 23) >> 13;
}
float bfloat_to_float(u16 bits) { return same_bits<float>((u32)bits << 16); }
u16 float_to_bfloat(float x) {
  const u32 bits = same_bits<u32>(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
float low_half_to_float(u32 pair) { return half_to_float(pair); }
float high_half_to_float(u32 pair) { return half_to_float(pair >> 16); }
float low_bfloat_to_float(u32 pair) { return bfloat_to_float(pair); }
float high_bfloat_to_float(u32 pair) { return bfloat_to_float(pair >> 16); }
u32 pack_bfloats(float low, float high) { return float_to_bfloat(low) | (u32)float_to_bfloat(high) << 16; }
u32 pack_halfs(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
u32 fma_halfs(u32 a, u32 b, u32 c) {
  const auto fma = [](u16 a, u16 b, u16 c) { return half_to_float(a) * (double)half_to_float(b) + half_to_float(c); };
  return pack_halfs(fma(a, b, c), fma(a >> 16, b >> 16, c >> 16));
}
u32 negate_halfs(u32 a) { return a ^ 0x80008000u; }

void store_shared(u32 address, u32 a, u32 b, u32 c, u32 d) { *(uint4*)at_shared(address) = {a, b, c, d}; }
template <int N>
void load_in_order(const void* from, u32* to) {
  memcpy(to, from, 4 * N);
}
void load_constants(const float* from, float* to) { memcpy(to, from, 16); }
void store_global(uint4* to, uint4 x) { *to = x; }

// Lane l of a matrix of 8 x 8 has row l / 4 and columns 2 (l % 4) and + 1.
template <class Element>
u32 fragment(Element element) {
  const int row = own_lane() / 4, column = own_lane() % 4 * 2;
  return element(row, column) | (u32)element(row, column + 1) << 16;
}
u32 transpose_matrix(u32 a, WHERE) {
  const u16* all = (const u16*)exchange(a, "movmatrix", where);
  return fragment([&](int row, int column) { return all[column * 8 + row]; });
}
template <int N>
void load_matrices(u32* to, u32 row_address, Where where) {
  const u32* rows = exchange(row_address, "ldmatrix", where);
  for (int i = 0; i < N; i++)
    to[i] = fragment([&](int row, int column) { return ((const u16*)at_shared(rows[8 * i + column]))[row]; });
}
void load_4_matrices_transposed(u32 (&r)[4], u32 row_address, WHERE) { load_matrices<4>(r, row_address, where); }
void load_2_matrices_transposed(u32& a, u32& b, u32 row_address, WHERE) {
  u32 r[2];
  load_matrices<2>(r, row_address, where);
  a = r[0], b = r[1];
}

using Convert = float (*)(u16);
// A lane's part of c[16 x N] += a[16 x 16] b[16 x N]
struct Operands {
  float* c;
  u32 a[4], b[2];
};
// b(k, n): an element of b
template <Convert CONVERT, int N, class Lane, class B>
void multiply(const Lane* lanes, B b) {
  double a[16][16], columns[16][N];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++) a[i][k] = CONVERT(lanes[i % 8 * 4 + k % 8 / 2].a[i / 8 + k / 8 * 2] >> k % 2 * 16);
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < N; n++) columns[k][n] = CONVERT(b(k, n));
  for (int i = 0; i < 16; i++) {
    double sums[N] = {};
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < N; n++) sums[n] += a[i][k] * columns[k][n];
    for (int n = 0; n < N; n++) lanes[i % 8 * 4 + n % 8 / 2].c[n / 8 * 4 + i / 8 * 2 + n % 2] += sums[n];
  }
}
template <Convert CONVERT>
void mma(const Operands& own, Where where) {
  exchange<Operands>(own, "mma", where, [](Operands* lanes) {
    multiply<CONVERT, 8>(lanes, [&](int k, int n) -> u16 { return lanes[n * 4 + k % 8 / 2].b[k / 8] >> k % 2 * 16; });
  });
}
void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, const u32 (&b)[2], WHERE) {
  mma<half_to_float>({c, {a0, a1, a2, a3}, {b[0], b[1]}}, where);
}
void mma_bfloat(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, const u32 (&b)[2], WHERE) {
  mma<bfloat_to_float>({c, {a0, a1, a2, a3}, {b[0], b[1]}}, where);
}
void mma_int8(int (&d)[4], const int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, WHERE) {
  const Operands* all = exchange(Operands{nullptr, {a0, a1, a2, a3}, {b0, b1}}, "mma", where);
  const int row = own_lane() / 4, column = own_lane() % 4 * 2;
  for (int i = 0; i < 4; i++) {
    d[i] = c[i];
    for (int k = 0; k < 32; k++)
      d[i] += (signed char)(all[row * 4 + k / 4 % 4].a[i / 2 + k / 16 * 2] >> k % 4 * 8) *
              (signed char)(all[(column + i % 2) * 4 + k / 4 % 4].b[k / 16] >> k % 4 * 8);
  }
}
void mma_int8(int (&d)[4], const int (&c)[4], u32 a0, u32 a1, u32 b, WHERE) {
  mma_int8(d, c, a0, a1, 0, 0, b, 0, where);
}
void mma_int8(int (&d)[2], const int (&c)[2], u32 a, u32 b, WHERE) {
  int wide[4] = {c[0], c[1]};
  mma_int8(wide, wide, a, 0, 0, 0, b, 0, where);
  d[0] = wide[0], d[1] = wide[1];
}
int clamp_sum(int a, int b, int top) { return max(min(a + b, top), 0); }

void init_barrier(u64* barrier, u32 arrivals) { *(Barrier*)barrier = {0, Barrier::MAGIC, arrivals, arrivals, 0}; }
void publish_to_copies() {}
void arrive_expecting(u64* barrier, u32 bytes, WHERE) {
  auto& b = Barrier::at(barrier, where);
  if (!b.pending) fail(where, "more arrivals than expected");
  b.pending--;
  b.bytes += bytes;
  b.settle();
}
void arrive(u64* barrier, WHERE) { arrive_expecting(barrier, 0, where); }
bool has_ended(u64* barrier, u32 parity, WHERE) { return Barrier::at(barrier, where).phase != parity; }
void wait(u64* barrier, u32 parity, WHERE) {
  Barrier::at(barrier, where);
  emulator::wait((u32*)barrier, parity, "mbarrier", where);
}
void sync_threads(int barrier, int threads, WHERE) { meet(named[barrier], threads, "bar.sync", where); }
void arrive_threads(int barrier, int threads) { emulator::arrive(named[barrier], threads); }

u64 evict_first_policy() { return 0; }
u64 evict_normal_policy() { return 0; }
void copy_to_shared(void* to, const void* from, u32 bytes, u64* barrier, u64, WHERE) {
  if (((size_t)to | (size_t)from | bytes) % 16) fail(where, "a copy that is not aligned");
  copies.push_back({to, &Barrier::at(barrier, where), from, bytes});
}
void prefetch(const void* from, u32 bytes, WHERE) {
  if (((size_t)from | bytes) % 16) fail(where, "a prefetch that is not aligned");
  if ((const u8*)from < pages || (const u8*)from + bytes > pages_end) fail(where, "a prefetch of other memory");
}
// What a kernel before may not have written yet
int load_past_l1(const int* from) {
  return draw(2) ? *from : draw(2) ? *from + (int)draw(9) - 4 : (int)(draw(1u << 16) << 16 | draw(1u << 16));
}
void forget(int&) {}
void copy_8_bytes(u32 to, const void* from) { fibers[threadIdx.x].copies.push_back({at_shared(to), nullptr, from, 8}); }
void wait_for_copies() {
  auto& copies = fibers[threadIdx.x].copies;
  for (const auto& copy : copies) do_copy(copy);
  copies.clear();
}
void let_dependents_launch() {}
void wait_for_prerequisites() {}

}  // namespace sawkv::ptx
