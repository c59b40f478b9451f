// The functions of the kernels' wgmma.cuh. A product is computed when its group is waited for: sums that are read too
// early lack it, and operands in shared memory that are overwritten too early change it. The four warps of a warpgroup
// need not be together here. A product of other types takes a line like that of mma_warpgroup.
#pragma once
#include "common.cuh"

namespace sawkv::ptx {

template <int PANEL_BYTES>
u64 matrix_of_panels(u32 start) {
  return start | (u64)(PANEL_BYTES / 16) << 16;
}
// Element (k, n) of panels of 64 columns if TRANSPOSED. If not, these are columns of the transposed matrix.
template <int TRANSPOSED>
u16 panel_element(u64 matrix, int k, int n) {
  const u32 start = (matrix & 0x3fff) * 16, panel = (matrix >> 16 & 0x3fff) * 16;
  const u32 address = start + (TRANSPOSED ? n / 64 * panel + k * 128 + n % 64 * 2 : n * 128 + k * 2);
  return *(const u16*)at_shared(address ^ (address >> 7 & 7) << 4);
}

struct Product : Operands {
  u64 matrix;
  bool adds;
  void (*do_all)(Product* lanes);
};
// A thread's products that have not been waited for, in groups; the last group is not committed yet.
struct Queue {
  unsigned block;
  bool is_fenced;
  std::vector<std::vector<Product>> groups;
} queues[MOST_THREADS];
Queue& own_queue() {
  Queue& queue = queues[threadIdx.x];
  if (queue.block != block_number) queue = {block_number, false, std::vector<std::vector<Product>>(1)};
  return queue;
}

template <Convert CONVERT, int TRANSPOSED, int N>
void issue(float (&d)[N], const u32 (&a)[4], u64 b, bool adds, Where where) {
  if (!own_queue().is_fenced) fail(where, "a product without a fence");
  const auto do_all = [](Product* lanes) {
    for (int i = 0; i < LANES && !lanes->adds; i++) memset(lanes[i].c, 0, sizeof(d));
    multiply<CONVERT, 2 * N>(lanes, [&](int k, int n) { return panel_element<TRANSPOSED>(lanes->matrix, k, n); });
  };
  own_queue().groups.back().push_back({{d, {a[0], a[1], a[2], a[3]}, {}}, b, adds, do_all});
}
template <int TRANSPOSED, int N>
void mma_warpgroup(float (&d)[N], const u32 (&a)[4], u64 b, bool adds, WHERE) {
  issue<half_to_float, TRANSPOSED>(d, a, b, adds, where);
}
void fence_warpgroup() { own_queue().is_fenced = true; }
void commit_warpgroup() { own_queue().groups.push_back({}); }
template <int N>
void wait_warpgroup(WHERE) {
  auto& groups = own_queue().groups;
  own_queue().is_fenced = false;
  for (; groups.size() > N + 1; groups.erase(groups.begin()))
    for (const Product& product : groups.front()) exchange(product, "wgmma.wait_group", where, product.do_all);
}

template <int N>
void pin(float (&)[N]) {}
template <int M, int N>
void pin(u32 (&)[M][N]) {}
template <int N>
void take_registers() {}
template <int N>
void give_registers() {}

}  // namespace sawkv::ptx
