// The schedule of one engine step: cut every unit into chunks of tiles, which blocks then take dynamically. It depends
// on lengths alone, so one block computes it once per step for all layers. The host knows nothing of it, so one CUDA
// graph serves every batch.
//
// Macros: HEAD_DIM.
#include "chunks.cuh"

namespace sawkv {

constexpr int THREADS = 1024;
constexpr int MOST_SORTED = 256;  // sequences, one per thread
static_assert(MOST_SORTED <= THREADS, "");

struct ScheduleParams {
  const int* seq_lens;
  const int* query_start_loc;
  ScheduleHeader* header;
  Chunk* chunks;
  SplitUnit* splits;
  int num_seqs;
  int num_kv_heads;
  int group, chunk_rows;  // query heads per KV head; most query rows of a unit
  int max_row_groups;
  int tile_tokens;      // TILE, passed because it takes more registers as a constant
  int tiles_per_chunk;  // if blocks get few chunks
  int window;           // 0: none
  int num_blocks;       // of the decode kernel
  int max_chunks_per_block;
  int max_units;  // of a chunk
};

// Tiles that a sequence's queries can see: at least one, so that a sequence without keys still gets zeros as output. A
// sequence of negative length has none, and its output is not written.
struct TileRange {
  int first, count;  // of each unit
  int units;         // KV heads * row groups
  __device__ TileRange(const ScheduleParams& p, int seq) {
    const int length = p.seq_lens[seq], query_len = p.query_start_loc[seq + 1] - p.query_start_loc[seq];
    const int first_token = p.window ? max(0, length - query_len - p.window + 1) : 0;
    first = first_token / p.tile_tokens;
    count = query_len > 0 && length >= 0 ? max(1, divide_up(length, p.tile_tokens) - first) : 0;
    units = count ? p.num_kv_heads * min(divide_up(query_len * p.group, p.chunk_rows), p.max_row_groups) : 0;
  }
};

// Replaces values[0..n) by their exclusive prefix sums, and sets values[n] to the total.
__device__ void prefix_sums(int* values, int n) {
  __shared__ int warp_totals[WARP];
  int carry = 0;
  for (int base = 0; base < n; base += THREADS) {
    const int i = base + threadIdx.x, value = i < n ? values[i] : 0;
    int sum = value;
#pragma unroll
    for (int d = 1; d < WARP; d *= 2) {
      const int below = __shfl_up_sync(ALL_LANES, sum, d);
      if (lane_index() >= d) sum += below;
    }
    if (lane_index() == WARP - 1) warp_totals[warp_index()] = sum;
    __syncthreads();
    int before = 0, total = 0;
#pragma unroll
    for (int w = 0; w < THREADS / WARP; w++) {
      if (w < warp_index()) before += warp_totals[w];
      total += warp_totals[w];
    }
    if (i < n) values[i] = carry + before + sum - value;
    carry += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) values[n] = carry;
  __syncthreads();
}

// The last index whose value is at most x, among n + 1 ascending values.
__device__ int last_at_most(const int* values, int n, int x) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (values[middle] <= x)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// What decode takes if units of as many tiles are cut into pieces, in the time of a tile. A chunk takes some four more:
// its pages are looked up, its results merged. Blocks take turns. If few are busy in the last one, each has more of the
// memory's bandwidth, but a few cannot use all of it.
__device__ float cost_of(int pieces, int tiles, int num_units, int num_blocks) {
  const int chunks = pieces * num_units, turns = chunks / num_blocks, busy = chunks % num_blocks;
  const float last_turn = busy ? fmaxf((float)busy / num_blocks, turns ? 0.6f : 0.95f) : 0;
  return (turns + last_turn) * ((float)tiles / pieces + 4);
}

// log2 of the units in each chunk of a sequence whose units are whole. Each consumer warp hands over a result per
// chunk, which takes as long as a tile, and merge warps add what all have handed over. If a chunk is several units,
// fewer warps have the tiles of each.
constexpr int MOST_TILES = 32;  // of several units; each has fewer buckets than attention.cuh's CHUNK_BUCKETS
__device__ int log2_units(const ScheduleParams& p, const TileRange& range, int tiles_per_block) {
  int log2 = 0;
  while (2 << log2 <= p.max_units && range.units % (2 << log2) == 0 &&
         range.count <= min(tiles_per_block / 3, MOST_TILES) >> log2 + 1)
    log2++;
  return log2;
}

}  // namespace sawkv

using namespace sawkv;

extern "C" {

__device__ int sawkv_tile_tokens = TILE;

__global__ void __launch_bounds__(THREADS) sawkv_schedule(const __grid_constant__ ScheduleParams p) {
  extern __shared__ int dynamic[];
  const int n = p.num_seqs;
  int* tiles = dynamic;  // first the tiles before each sequence, later the pieces of each of its units
  int* split_chunks = tiles + n + 1;
  int* whole_chunks = split_chunks + n + 1;
  int* split_units = whole_chunks + n + 1;
  int* chunk_tiles = split_units;    // earlier: tiles of a sequence's chunks, rounded up
  int* order = split_units + n + 1;  // sequences by their chunks' lengths

  __shared__ int shortest, longest, num_units;  // tiles of a unit; units
  __shared__ unsigned long long cheapest;       // cost, and how many pieces have it
  if (threadIdx.x == 0) shortest = 0x7fffffff, longest = num_units = 0, cheapest = ~0ull;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += THREADS) {
    const TileRange range(p, i);
    tiles[i] = range.count * range.units;
    if (range.units)
      atomicMin(&shortest, range.count), atomicMax(&longest, range.count), atomicAdd(&num_units, range.units);
  }
  __syncthreads();
  prefix_sums(tiles, n);
  const i64 total_tiles = tiles[n];
  const int tiles_per_block = (int)(total_tiles / p.num_blocks);
  // Little work gets few long chunks, because merging would cost too much. Much work gets many short ones, so that all
  // blocks end at about the same time.
  const int long_chunks = max(1, tiles_per_block / p.tiles_per_chunk);
  const int chunks_per_block = long_chunks < 4 ? min(long_chunks, p.max_chunks_per_block) : p.max_chunks_per_block;
  const int min_tiles = p.tiles_per_chunk / 6;  // one or more per consumer warp
  const i64 chunks_wanted = (i64)p.num_blocks * chunks_per_block;
  // Rounding to nearest gives more even chunks. With one or two chunks per block it rounds down instead, because one
  // chunk too many would make one block take a whole chunk more than the others.
  const i64 rounding = chunks_per_block > 2 ? total_tiles / 2 : 0;
  // Units of about the same length are all cut into as many pieces: a few, which fill whole turns of the blocks. The
  // costs are those of decode.cu; extend.cu has at most two chunks per block.
  const bool are_alike = longest - shortest <= longest / 16 && p.max_chunks_per_block > 2;
  const int candidate = threadIdx.x + 1;
  if (are_alike && (candidate == 1 || (candidate <= longest / min_tiles &&
                                       (i64)candidate * num_units <= p.num_blocks * p.max_chunks_per_block))) {
    const float cost = cost_of(candidate, longest, num_units, p.num_blocks);  // positive floats are ordered as integers
    atomicMin(&cheapest, (unsigned long long)__float_as_uint(cost) << 32 | candidate);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < n; i += THREADS) {
    const int count = TileRange(p, i).count;
    const int wanted = are_alike     ? (int)cheapest
                       : total_tiles ? (int)((count * chunks_wanted + rounding) / total_tiles)
                                     : 1;
    tiles[i] = max(1, min(wanted, count / min_tiles));
    chunk_tiles[i] = divide_up(count, tiles[i]);
    order[i] = i;
  }
  __syncthreads();
  // Sequences of longer chunks come first, so that short ones fill the end. Many sequences are many chunks, which do
  // that in any order.
  if (n <= MOST_SORTED && threadIdx.x < n) {
    const int own = threadIdx.x;
    int rank = 0;
#pragma unroll 8
    for (int i = 0; i < n; i++)
      rank += chunk_tiles[i] > chunk_tiles[own] || (chunk_tiles[i] == chunk_tiles[own] && i < own);
    order[rank] = own;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += THREADS) {
    const TileRange range(p, order[i]);
    const int pieces = tiles[order[i]], units = range.units;
    split_chunks[i] = pieces > 1 ? pieces * units : 0;
    whole_chunks[i] = pieces == 1 && range.count > 0 ? units >> log2_units(p, range, tiles_per_block) : 0;
    split_units[i] = pieces > 1 ? units : 0;
  }
  __syncthreads();
  prefix_sums(split_chunks, n);
  prefix_sums(whole_chunks, n);
  prefix_sums(split_units, n);
  const int num_split = split_chunks[n], num_chunks = num_split + whole_chunks[n];
  if (threadIdx.x == 0) *p.header = {num_chunks, num_split, split_units[n], 0, (int)total_tiles, {0, 0, 0}};

  for (int c = threadIdx.x; c < num_chunks; c += THREADS) {
    const bool is_whole = c >= num_split;
    const int* starts = is_whole ? whole_chunks : split_chunks;
    const int index = is_whole ? c - num_split : c;
    const int place = last_at_most(starts, n - 1, index), seq = order[place], pieces = tiles[seq];
    const TileRange range(p, seq);
    const int log2 = is_whole ? log2_units(p, range, tiles_per_block) : 0;
    const int unit = (index - starts[place]) / pieces << log2, piece = (index - starts[place]) % pieces;
    const int begin = (int)((i64)piece * range.count / pieces), end = (int)((i64)(piece + 1) * range.count / pieces);
    const int query_start = p.query_start_loc[seq];
    p.chunks[c] = {seq,
                   unit,
                   range.first + begin,
                   end - begin,
                   p.seq_lens[seq],
                   query_start,
                   p.query_start_loc[seq + 1] - query_start,
                   is_whole ? ~log2 : c};
  }
  for (int u = threadIdx.x; u < split_units[n]; u += THREADS) {
    const int place = last_at_most(split_units, n - 1, u), seq = order[place], pieces = tiles[seq];
    const int unit = u - split_units[place], query_start = p.query_start_loc[seq];
    p.splits[u] = {unit,   query_start, p.query_start_loc[seq + 1] - query_start, split_chunks[place] + unit * pieces,
                   pieces, {0, 0, 0}};
  }
}

}  // extern "C"
