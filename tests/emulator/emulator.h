// CUDA on one CPU thread: a fiber for each thread of a block, and the language. A fiber runs until it waits. Then a
// warp that can go on is drawn, or a copy. Blocks run one after the other.
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__
#define __launch_bounds__(...)
// In a section of its own, so that each block finds it poisoned. __init__.py replaces `extern __shared__`.
#define __shared__ static __attribute__((section("shared_variables")))
extern "C" __attribute__((weak)) char __start_shared_variables[], __stop_shared_variables[];

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x, y, z;
} threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

constexpr int LANES = 32, MOST_THREADS = 1024, STACK_BYTES = 128 << 10, SHARED_BYTES = 227 << 10, POISON = 0xff;
alignas(1024) unsigned char shared_memory[SHARED_BYTES];
alignas(64) char stacks[MOST_THREADS][STACK_BYTES];

// A line of the kernel; as a default argument, that of the call
struct Where {
  const char* file;
  int line;
};
#define WHERE emulator::Where where = {__builtin_FILE(), __builtin_LINE()}

struct Copy {
  void* to;
  struct Barrier* barrier;
  const void* from;
  unsigned bytes;
};
struct Fiber {
  ucontext_t start;
  jmp_buf context;
  bool has_started, is_done;
  const unsigned* wait;  // until bit 0 of this is not `parity`; null: can go on
  unsigned parity;
  const char* what;
  Where where;
  std::vector<Copy> copies;  // which no other thread waits for
} fibers[MOST_THREADS];
// Threads that meet, as at a barrier with a number; `generation` counts how often they have.
struct Meeting {
  unsigned generation, arrived, votes[2];
} named[16];
struct Warp {
  Meeting meeting;
  const char* what;
  alignas(16) char slots[2][LANES][64];
} warps[MOST_THREADS / LANES];
std::vector<Copy> copies;
unsigned random_state, block_number;
const unsigned char *pages, *pages_end;  // of the cache, if the kernel has them
char failure[4096];
jmp_buf scheduler;

unsigned draw(unsigned n) { return ((random_state = random_state * 1664525 + 1013904223) >> 8) % n; }

// setjmp, because swapcontext calls the operating system.
__attribute__((noinline)) void leave() {
  if (!_setjmp(fibers[threadIdx.x].context)) _longjmp(scheduler, 1);
}
__attribute__((noinline)) void enter(int thread) {
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  if (fibers[thread].has_started) _longjmp(fibers[thread].context, 1);
  fibers[thread].has_started = true;
  setcontext(&fibers[thread].start);
}
const char* file_name(Where where) { return strrchr(where.file, '/') + 1; }
void fail(Where where, const char* what, const char* more = "") {
  sprintf(failure, "%s:%d, block %u, thread %u: %s%s", file_name(where), where.line, blockIdx.x, threadIdx.x, what,
          more);
  leave();
}
void wait(const unsigned* generation, unsigned parity, const char* what, Where where) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.wait = generation, fiber.parity = parity & 1, fiber.what = what, fiber.where = where;
  leave();
}

// Returns the generation that this thread belongs to.
unsigned arrive(Meeting& meeting, unsigned threads, bool vote = false) {
  const unsigned now = meeting.generation;
  meeting.votes[now % 2] += vote;
  if (++meeting.arrived == threads) meeting.arrived = 0, meeting.votes[++meeting.generation % 2] = 0;
  return now;
}
unsigned meet(Meeting& meeting, unsigned threads, const char* what, Where where, bool vote = false) {
  const unsigned now = arrive(meeting, threads, vote);
  wait(&meeting.generation, now, what, where);
  return meeting.votes[now % 2];
}

// What a warp does together: each lane hands in a value, the last one calls `do_all`, and all get all values. The
// pointer to them is valid until the exchange after the next.
template <class T>
T* exchange(const T& own, const char* what, Where where, void (*do_all)(T*) = [](T*) {}) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0][0]), "a larger slot");
  Warp& warp = warps[threadIdx.x / LANES];
  T* all = (T*)warp.slots[warp.meeting.generation % 2];
  all[threadIdx.x % LANES] = own;
  if (!warp.meeting.arrived) warp.what = what;
  if (warp.what != what) fail(where, "other lanes are at ", warp.what);
  if (warp.meeting.arrived == LANES - 1) do_all(all);
  meet(warp.meeting, LANES, what, where);
  return all;
}

// An mbarrier, in its place in shared memory
struct Barrier {
  unsigned phase : 1, magic : 11, count : 10, pending : 10;
  int bytes;
  static constexpr unsigned MAGIC = 0x2ba;

  static Barrier& at(void* place, Where where) {
    if (((Barrier*)place)->magic != MAGIC) fail(where, "a barrier that was not initialized");
    return *(Barrier*)place;
  }
  void settle() {
    if (!pending && !bytes) phase ^= 1, pending = count;
  }
};

void do_copy(const Copy& copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  if (!copy.barrier) return;
  copy.barrier->bytes -= copy.bytes;
  copy.barrier->settle();
}
bool run_copy() {
  if (copies.empty()) return false;
  std::swap(copies[draw(copies.size())], copies.back());
  do_copy(copies.back());
  copies.pop_back();
  return true;
}
// Lets lanes of a warp go on in a drawn order, until none can or a drawn number have.
bool run_warp(int warp) {
  bool has_run = false;
  const unsigned step = 2 * draw(LANES / 2) + 1;
  for (unsigned lane = draw(LANES), left = draw(1 << draw(10)) + 1, idle = 0; left && idle < LANES && !*failure;
       lane += step) {
    const int thread = warp * LANES + lane % LANES;
    Fiber& fiber = fibers[thread];
    idle++;
    if (fiber.is_done || (fiber.wait && *fiber.wait % 2 == fiber.parity)) continue;
    fiber.wait = nullptr;
    enter(thread);
    idle = 0, left--;
    has_run = true;
  }
  return has_run;
}

// Says what each warp waits for, and its lanes apart if they wait for different things.
void report_deadlock(int threads) {
  int length = snprintf(failure, sizeof(failure), "deadlock of block %u", blockIdx.x);
  for (int i = 0, next; i < threads && length < (int)sizeof(failure) - 300; i = next) {
    const Fiber& fiber = fibers[i];
    for (next = i + 1; next % LANES && fibers[next].wait == fiber.wait;) next++;
    if (fiber.is_done) continue;
    length += sprintf(failure + length, "\nwarp %d, lanes %d to %d: %s, %s:%d", i / LANES, i % LANES,
                      (next - 1) % LANES, fiber.what, file_name(fiber.where), fiber.where.line);
    const Barrier& barrier = *(const Barrier*)fiber.wait;
    if (!strcmp(fiber.what, "mbarrier"))
      length += sprintf(failure + length, ", lacks %u arrivals and %d bytes", barrier.pending, barrier.bytes);
  }
}

// Begins with the kernel's own. A structure of more than 16 bytes is passed in memory (x86-64) or by its address
// (AArch64), so that a larger one does.
struct alignas(16) Parameters {
  char bytes[1024];
} parameters;
void (*kernel)(Parameters);
void run_thread() {
  kernel(parameters);
  fibers[threadIdx.x].is_done = true;
  leave();
}

void run_block(int threads) {
  block_number++;
  memset(shared_memory, POISON, SHARED_BYTES);
  memset(__start_shared_variables, POISON, __stop_shared_variables - __start_shared_variables);
  memset(warps, 0, sizeof(warps));
  memset(named, 0, sizeof(named));
  copies.clear();
  for (int i = 0; i < threads; i++) {
    fibers[i] = {};
    getcontext(&fibers[i].start);
    fibers[i].start.uc_stack = {stacks[i], 0, STACK_BYTES};
    makecontext(&fibers[i].start, run_thread, 0);
  }
  // Copies take turns like a warp. One of all is late for a while: it runs only if no other can.
  const int copier = threads / LANES, num_all = copier + 1;
  const auto run = [&](int i) { return i == copier ? run_copy() : run_warp(i); };
  int late = 0, late_turns = 0;
  for (bool goes_on = true; goes_on && !*failure;) {
    if (!late_turns--) late = draw(num_all), late_turns = draw(1 << draw(14));
    goes_on = false;
    const int first = draw(num_all);
    for (int i = first; i < first + num_all && !goes_on; i++) goes_on = i % num_all != late && run(i % num_all);
    goes_on = goes_on || run(late);
  }
  for (int i = 0; i < threads && !*failure; i++)
    if (!fibers[i].is_done) report_deadlock(threads);
}

}  // namespace emulator

// Returns what went wrong, or nothing.
extern "C" const char* emulator_launch(void (*kernel)(emulator::Parameters), const void* parameters, int bytes,
                                       const unsigned* grid, unsigned threads, unsigned seed,
                                       const unsigned char* pages, size_t pages_bytes) {
  using namespace emulator;
  emulator::kernel = kernel;
  memcpy(&emulator::parameters, parameters, bytes);
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {threads, 1, 1};
  random_state = seed;
  emulator::pages = pages, pages_end = pages + pages_bytes;
  *failure = 0;
  for (unsigned i = 0; i < grid[0] * grid[1] * grid[2] && !*failure; i++) {
    blockIdx = {i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]};
    run_block(threads);
  }
  return failure;
}

template <class To, class From>
To same_bits(From x) {
  To y;
  static_assert(sizeof(x) == sizeof(y));
  memcpy(&y, &x, sizeof(y));
  return y;
}
unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
int __float_as_int(float x) { return same_bits<int>(x); }
float __uint_as_float(unsigned x) { return same_bits<float>(x); }
float __int_as_float(int x) { return same_bits<float>(x); }
float __fmul_rn(float a, float b) { return a * b; }
float __fadd_rn(float a, float b) { return a + b; }
float __fsub_rn(float a, float b) { return a - b; }
float __frcp_rn(float a) { return 1 / a; }
int __popc(unsigned x) { return __builtin_popcount(x); }
int __ffs(int x) { return __builtin_ffs(x); }
unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
using std::max, std::min;
#define ATOMIC(NAME, NEXT)         \
  template <class T>               \
  T NAME(T* at, decltype(T()) x) { \
    const T old = *at;             \
    *at = NEXT;                    \
    return old;                    \
  }
ATOMIC(atomicAdd, old + x)
ATOMIC(atomicMin, min(old, x))
ATOMIC(atomicMax, max(old, x))
ATOMIC(atomicInc, old >= x ? 0 : old + 1)

unsigned own_lane() { return threadIdx.x % emulator::LANES; }
template <class T>
T __shfl_sync(unsigned, T x, int lane, WHERE) {
  return emulator::exchange(x, "shfl", where)[lane];
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T x, int bits, WHERE) {
  return __shfl_sync(lanes, x, own_lane() ^ bits, where);
}
template <class T>
T __shfl_up_sync(unsigned lanes, T x, unsigned by, WHERE) {
  return __shfl_sync(lanes, x, own_lane() - (own_lane() < by ? 0 : by), where);
}
unsigned __ballot_sync(unsigned, bool vote, WHERE) {
  const bool* votes = emulator::exchange(vote, "vote", where);
  unsigned bits = 0;
  for (int i = 0; i < emulator::LANES; i++) bits |= (unsigned)votes[i] << i;
  return bits;
}
bool __any_sync(unsigned lanes, bool vote, WHERE) { return __ballot_sync(lanes, vote, where); }
bool __all_sync(unsigned lanes, bool vote, WHERE) { return !__ballot_sync(lanes, !vote, where); }
unsigned __reduce_max_sync(unsigned, unsigned x, WHERE) {
  const unsigned* all = emulator::exchange(x, "redux", where);
  for (int i = 0; i < emulator::LANES; i++) x = max(x, all[i]);
  return x;
}
void __syncwarp(WHERE) { emulator::exchange(0, "syncwarp", where); }
int __syncthreads_count(bool vote, WHERE) {
  return emulator::meet(emulator::named[0], blockDim.x, "bar.sync", where, vote);
}
void __syncthreads(WHERE) { __syncthreads_count(false, where); }
