// gather: decode the pages of many sequences into contiguous 16- or 32-bit rows. A block decodes one KV head of TOKENS
// output tokens, and each of its warps K or V of TILE of them.
//
// Codes are small integers, so their Hadamard transform is exact, in any order of summation. First a lane adds masked
// codes, which are fp16 numbers as in decode, in pairs. Then tensor cores compute the other four stages in fp32. Scale
// and zero point are applied at the end: a constant transforms to ORDER times itself in a block's first channel, and 0
// in the others.
//
// Macros: those of pages.cuh, K_ORDER and V_ORDER (0: rows stay rotated), ELEMENT (of the output), GAIN (1: gains of K
// or V, or both, must be undone), BY_BUCKET (1: K has a center per position bucket).
#include "pages.cuh"

namespace sawkv {

constexpr int THREADS = 128, LANES = 4, TILE = 16, TOKENS = THREADS / WARP / 2 * TILE;  // LANES per row
constexpr int LANE_ROWS = 2;  // rows that a lane holds a part of, 8 tokens apart

struct GatherParams {
  u8* pages;
  const int* block_table;
  const int* seq_lens;
  const int* cu_seq_lens;
  const float* center[2];        // of K (with BY_BUCKET [num_buckets] of them) and of V: as below; added to rows
  const float* gain_inverse[2];  // [num_kv_heads][D] or null; multiplies rows before that
  ELEMENT* k_out;
  ELEMENT* v_out;
  i64 page_stride, table_stride;
  int num_seqs, max_tokens, num_kv_heads, num_buckets;
  const int* first_positions;  // [num_seqs], of each table's first token; null: 0
};

// The page and offset that hold an output token's rows.
struct Source {
  bool is_there, is_cleared;
  int offset, bucket, page;

  // `seq`: a sequence that starts at or before the token
  __device__ Source(const GatherParams& p, int token, int seq) {
    while (seq + 1 < p.num_seqs && p.cu_seq_lens[seq + 1] <= token) seq++;
    const int position = token - p.cu_seq_lens[seq];
    is_there = token < p.max_tokens && position >= 0 && position < p.seq_lens[seq];
    const int end = p.cu_seq_lens[p.num_seqs];
    is_cleared = token < p.max_tokens && token >= end && token < end + format::CLEARED_ROWS;
    page = is_there ? p.block_table[seq * p.table_stride + position / PAGE_SIZE] : 0;
    offset = position % PAGE_SIZE;
    bucket = 0;
    if (BY_BUCKET) bucket = bucket_of(position + (p.first_positions ? p.first_positions[seq] : 0), p.num_buckets);
  }
};

// An element of the Hadamard matrix as fp16. `in` and `out` are channels.
template <int BLOCK>
__device__ inline u32 hadamard(int in, int out) {
  if ((in ^ out) & ~(BLOCK - 1)) return 0;  // different blocks
  return 0x3c00 | (__popc(in & out & (BLOCK - 1)) & 1) << 15;
}

// Codes of a lane's quarter of WIDTH channels, as pairs: channels c and c + PAIR, for each c without that bit. Products
// transform four bits of the channel index: those of the lane, PAIR and OTHER. Bits 3 and 4 are among them, so that
// results are eight neighbouring channels in each lane. E and HALF are the bits of a result's column and product.
template <int BITS>
struct Quarter {
  using Codes = Group<BITS>;
  static constexpr int WIDTH = largest_power_of_two_in(D) < 128 ? largest_power_of_two_in(D) : 128,
                       CHANNELS = WIDTH / 4, WORDS = CHANNELS * BITS / 32;
  static constexpr bool JOINS_WORDS = BITS == 4 && CHANNELS == 32;  // as pairs of one word are 4 apart, and 8 is wanted
  static constexpr int PAIR = JOINS_WORDS ? 8 : Codes::CODES / 2, OTHER = CHANNELS * 3 / 4 - PAIR;
  static constexpr int E = CHANNELS == 32 ? 32 : CHANNELS / 4, HALF = CHANNELS == 8 ? 4 : 2 * CHANNELS;

  u32 words[WORDS];

  // `block`: of WIDTH channels
  __device__ void load(const StoredRow<BITS>& row, int block, int lane) {
    constexpr int LOAD = largest_power_of_two_in(WORDS);
#pragma unroll
    for (int w = 0; w < WORDS; w += LOAD)
      ptx::load_in_order<LOAD>(row.at(((block * 4 + lane) * WORDS + w) * 4), &words[w]);
  }
  __device__ u32 pair(int c) const {
    if constexpr (JOINS_WORDS) {
      const u32 joined = __byte_perm(words[c / 16 * 2], words[c / 16 * 2 + 1], c & 4 ? 0x7632 : 0x5410);
      return Codes(&joined).pair(c % 4);
    }
    return Codes(&words[c / Codes::CODES * Codes::WORDS]).pair(c % Codes::CODES);
  }
  static __device__ constexpr int exponent(int c) { return Codes::exponent(JOINS_WORDS ? c % 4 : c % Codes::CODES); }
};

// A pair of fp16 numbers +- 2^exponent
__device__ inline u32 powers_of_two(int exponent, bool is_negative = false) {
  return (exponent + 15 << 10 | is_negative << 15) * 0x10001u;
}

// The stages of the transform that are sums within a lane. `sums`: of channels c and c + PAIR. They are less than 2^11
// in units of codes, and so exact.
template <int ORDER, int BITS, int BLOCKS>
__device__ inline void add_within_lane(const Quarter<BITS> (&codes)[BLOCKS],
                                       u32 (&sums)[BLOCKS][Quarter<BITS>::CHANNELS]) {
  using Q = Quarter<BITS>;
  constexpr bool ADDS_BLOCKS = ORDER > Q::WIDTH;
  static_assert(!ADDS_BLOCKS || (ORDER == 2 * Q::WIDTH && BLOCKS == 2), "at most two blocks are added");
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
    int exponents[Q::CHANNELS];
#pragma unroll
    for (int c = 0; c < Q::CHANNELS; c++)
      if (!(c & Q::PAIR)) sums[block][c] = codes[block].pair(c), exponents[c] = Q::exponent(c);
#pragma unroll
    for (int stride = 1; stride < Q::CHANNELS; stride *= 2)
#pragma unroll
      for (int c = 0; c < Q::CHANNELS; c++) {
        if (!ORDER || stride == Q::PAIR || stride == Q::OTHER || c & (Q::PAIR | stride)) continue;
        const u32 a = sums[block][c], b = sums[block][c + stride];
        const int difference = exponents[c + stride] - exponents[c];
        if (difference >= 0) {  // the larger exponent becomes the smaller one
          sums[block][c] = ptx::fma_halfs(b, powers_of_two(-difference), a);
          sums[block][c + stride] = ptx::fma_halfs(b, powers_of_two(-difference, true), a);
          exponents[c + stride] = exponents[c];
        } else {
          sums[block][c] = ptx::fma_halfs(a, powers_of_two(difference), b);
          sums[block][c + stride] = ptx::fma_halfs(a, powers_of_two(difference), ptx::negate_halfs(b));
          exponents[c] = exponents[c + stride];
        }
      }
#pragma unroll
    for (int c = 0; c < Q::CHANNELS; c++)
      if (!(c & Q::PAIR) && exponents[c])
        sums[block][c] = ptx::fma_halfs(sums[block][c], powers_of_two(-exponents[c]), 0);
  }
#pragma unroll
  for (int c = 0; c < Q::CHANNELS; c++) {
    if (!ADDS_BLOCKS || c & Q::PAIR) continue;
    const u32 a = sums[0][c], b = sums[BLOCKS - 1][c];
    sums[0][c] = ptx::fma_halfs(b, powers_of_two(0), a);
    sums[BLOCKS - 1][c] = ptx::fma_halfs(b, powers_of_two(0, true), a);
  }
}

using Floats = Vector<float, Row<D, LANES>::VECTOR>;

__device__ inline Floats load_constants(const float* from) {
  Floats v;
  ptx::load_constants(from, v.x);
  ptx::load_constants(from + 4, v.x + 4);
  return v;
}

// Elements `first` to `end` of a lane's rows, which share gains, and a center that is not by bucket. It is loaded once
// beside gains only: kernels without them have no registers to spare.
__device__ inline void store_restored(Row<D, LANES> (&rows)[LANE_ROWS], int first, int end,
                                      const Source (&sources)[LANE_ROWS], const float* gain_inverse,
                                      const float* center, i64 bucket_stride, ELEMENT* const (&to)[LANE_ROWS]) {
  using R = Row<D, LANES>;
  constexpr bool SHARES_CENTER = GAIN && !BY_BUCKET;
#pragma unroll
  for (int i = first; i < end; i += R::VECTOR) {
    Floats gains, centers;
    if (GAIN && gain_inverse) gains = load_constants(gain_inverse + R::channel(i));
    if (SHARES_CENTER && center) centers = load_constants(center + R::channel(i));
#pragma unroll
    for (int r = 0; r < LANE_ROWS; r++) {
      if (!sources[r].is_there && !sources[r].is_cleared) continue;
      float (&x)[R::PER_LANE] = rows[r].x;
      if (!SHARES_CENTER && center && sources[r].is_there)
        centers = load_constants(center + sources[r].bucket * bucket_stride + R::channel(i));
      constexpr int WORDS = R::VECTOR * sizeof(ELEMENT) / 16;
      union {
        Vector<ELEMENT, R::VECTOR> v;
        uint4 words[WORDS];
      };
#pragma unroll
      for (int e = 0; e < R::VECTOR; e++) {
        if (GAIN && gain_inverse) x[i + e] *= gains.x[e];
        if (center && sources[r].is_there) x[i + e] += centers.x[e];
        v.x[e] = ELEMENT(x[i + e]);
      }
#pragma unroll
      for (int k = 0; k < WORDS; k++) ptx::store_global((uint4*)(to[r] + R::channel(i)) + k, words[k]);
    }
  }
}

template <int ORDER, int BITS>
__device__ inline void decode_rows(const GatherParams& p, int head, const Source (&sources)[LANE_ROWS], bool is_v,
                                   const float* gain_inverse, const float* center, i64 bucket_stride,
                                   ELEMENT* const (&to)[LANE_ROWS]) {
  using R = Row<D, LANES>;
  using Q = Quarter<BITS>;
  static_assert(R::VECTOR == 8, "a lane has eight neighbouring channels of every 32");
  constexpr int BLOCK = ORDER ? ORDER : 1, BLOCKS = D / Q::WIDTH;
  Q codes[LANE_ROWS][BLOCKS];
  u32 meta[LANE_ROWS];
#pragma unroll
  for (int r = 0; r < LANE_ROWS; r++) {
    const StoredRow<BITS> stored(p.pages + sources[r].page * p.page_stride + head * HEAD_BYTES, sources[r].offset,
                                 is_v);
    meta[r] = 0;
    if (sources[r].is_there) ptx::load_in_order<1>(stored.meta, &meta[r]);
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      codes[r][block] = {};
      if (sources[r].is_there) codes[r][block].load(stored, block, R::lane());
    }
  }

  const int column = lane_index() / LANES;
  u32 matrix[2][2];  // operand B, for outputs without and with HALF
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int other = 0; other < 2; other++) {
      const int in = R::lane() * Q::CHANNELS | other * Q::OTHER,
                out = column >> 1 << 3 | column % 2 * Q::E | half * Q::HALF;
      matrix[half][other] = hadamard<BLOCK>(in, out) | hadamard<BLOCK>(in | Q::PAIR, out) << 16;
    }
  u32 sums[LANE_ROWS][BLOCKS][Q::CHANNELS];
#pragma unroll
  for (int r = 0; r < LANE_ROWS; r++) add_within_lane<ORDER>(codes[r], sums[r]);
  R rows[LANE_ROWS];
#pragma unroll
  for (int block = 0; block < BLOCKS; block++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int c = 0; c < Q::CHANNELS; c++) {
        if (c & (Q::PAIR | Q::OTHER)) continue;
        float products[4] = {};
        ptx::mma_half(products, sums[0][block][c], sums[1][block][c], sums[0][block][c | Q::OTHER],
                      sums[1][block][c | Q::OTHER], matrix[half]);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int channel = block * Q::WIDTH + c + e % 2 * Q::E + half * Q::HALF;
          rows[e / 2].x[channel / 32 * 8 + channel % 8] = products[e];
        }
      }
      if (Q::CHANNELS == 8 && half == 0) continue;  // whole vectors need both halves
      constexpr int ELEMENTS = Q::CHANNELS == 8 ? 8 : Q::CHANNELS / 2;
      const int first = block * Q::CHANNELS + (Q::CHANNELS == 8 ? 0 : half * ELEMENTS), end = first + ELEMENTS;
#pragma unroll
      for (int r = 0; r < LANE_ROWS; r++) {
        const float zero_point = ptx::high_half_to_float(meta[r]) * (BLOCK * power_of_two(-24)),
                    scale = ptx::low_half_to_float(meta[r]) * (inverse_root(BLOCK) * power_of_two(24));
#pragma unroll
        for (int i = first; i < end; i++) {
          if (R::channel(i) % BLOCK == 0) rows[r].x[i] -= zero_point;
          rows[r].x[i] = __fmul_rn(rows[r].x[i], scale);  // never contracted to an fma, as in Row::scale
        }
      }
      store_restored(rows, first, end, sources, gain_inverse, center, bucket_stride, to);
    }
}

}  // namespace sawkv

using namespace sawkv;

extern "C" {

__device__ int sawkv_threads = THREADS;
__device__ int sawkv_tokens_per_block = TOKENS;

// Blocks of an SM: as many as registers allow
__global__ void __launch_bounds__(THREADS, D > 128                                    ? 2
                                           : GAIN || BY_BUCKET || sizeof(ELEMENT) > 2 ? 4
                                                                                      : 5)
    sawkv_gather(const __grid_constant__ GatherParams p) {
  ptx::wait_for_prerequisites();
  const int head = blockIdx.x % p.num_kv_heads,
            first = blockIdx.x / p.num_kv_heads * TOKENS;  // so that neighbouring blocks read neighbouring heads
  if (first >= p.cu_seq_lens[p.num_seqs] + format::CLEARED_ROWS) return;
  int seq = 0;  // the last sequence that starts at or before `first`
  for (int high = p.num_seqs - 1; seq < high;) {
    const int middle = (seq + high + 1) / 2;
    if (p.cu_seq_lens[middle] <= first)
      seq = middle;
    else
      high = middle - 1;
  }
  const bool is_v = warp_index() >= TOKENS / TILE;
  const int token = first + warp_index() % (TOKENS / TILE) * TILE + lane_index() / LANES;
  const Source sources[LANE_ROWS] = {{p, token, seq}, {p, token + TILE / LANE_ROWS, seq}};
  ELEMENT* start = (is_v ? p.v_out : p.k_out) + ((i64)token * p.num_kv_heads + head) * D;
  ELEMENT* const to[LANE_ROWS] = {start, start + (i64)TILE / LANE_ROWS * p.num_kv_heads * D};
  const float *center = p.center[is_v], *gain_inverse = p.gain_inverse[is_v];
  if (center) center += head * D;
  if (gain_inverse) gain_inverse += head * D;
  const i64 bucket_stride = is_v ? 0 : (i64)p.num_kv_heads * D;
  if (!is_v || (K_ORDER == V_ORDER && K_BITS == V_BITS))
    decode_rows<K_ORDER, K_BITS>(p, head, sources, is_v, gain_inverse, center, bucket_stride, to);
  else
    decode_rows<V_ORDER, V_BITS>(p, head, sources, is_v, gain_inverse, center, bucket_stride, to);
}

}  // extern "C"
