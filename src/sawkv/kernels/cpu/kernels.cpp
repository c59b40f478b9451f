// The CPU backend's entry points: append, attention and gather. Plain C++ with GCC/Clang vector extensions and OpenMP,
// called through ctypes. sawkv.kernels.structs reads the argument structs from these files.
//
// Reading order: vectors.h, then row.h (rotate, encode and decode one row), tile.h (scores, softmax and weighted values
// of one tile of tokens), then this file. After a row is decoded to fp32, all formats share the same arithmetic, so
// equal values give equal bits in every format. -ffp-contract=off is required: the only fused operations are those
// written as fma (docs/format.md).
#include <cstring>
#include <limits>
#include <vector>

#include "tile.h"

extern "C" {

struct AppendArguments {
  Cache cache;
  const void* k;
  const void* v;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;  // bytes
  const int64_t* slots;
  const int64_t* positions;  // of tokens; null with one bucket
  Counts* counters;          // of K and of V, or null
  int64_t num_slots;
  int32_t dtype, num_threads;
};

namespace {

void append_token(const AppendArguments& a, int64_t token, Counts counts[2]) {
  const Cache& cache = a.cache;
  const int64_t slot = a.slots[token];
  if (slot < 0 || slot >= cache.num_pages * cache.page_size) return;
  const int offset = int(slot % cache.page_size);
  alignas(32) float y[MAX_HEAD_DIM];
  const int64_t k_bucket = a.positions ? of_bucket(cache, bucket_at(cache, a.positions[token])) : 0;
  for (int head = 0; head < cache.num_kv_heads; ++head) {
    uint8_t* span = span_of(cache, slot / cache.page_size, head);
    for (int is_v = 0; is_v < 2; ++is_v) {
      const char* x = is_v ? static_cast<const char*>(a.v) + token * a.v_token_stride + head * a.v_head_stride
                           : static_cast<const char*>(a.k) + token * a.k_token_stride + head * a.k_head_stride;
      const Side& side = is_v ? cache.v : cache.k;
      uint8_t* meta = span + meta_offset(cache, side, offset);
      read_floats(x, DType(a.dtype), cache.head_dim, y);
      if (side.center) {
        const float* center = side.center + (is_v ? 0 : k_bucket) + head * cache.head_dim;
        for (int d = 0; d < cache.head_dim; ++d) y[d] -= center[d];
      }
      if (side.gain) multiply(y, cache.head_dim, side.gain, head);
      rotate(y, cache.head_dim, side.order);
      encode_row(cache, y, side, head, span + row_offset(side, offset), meta, is_v ? swizzle_of(cache, offset) : 0);
      if (a.counters) count_row(cache, y, meta, slot, head, is_v, counts[is_v]);
      span += v_offset(cache);
    }
  }
}

}  // namespace

void sawkv_append(const AppendArguments* a) {
#pragma omp parallel num_threads(a->num_threads) if (a -> num_slots > 4)
  {
    Counts counts[2] = {};
#pragma omp for schedule(static)
    for (int64_t token = 0; token < a->num_slots; ++token) append_token(*a, token, counts);
    if (a->counters) {
#pragma omp critical
      for (int is_v = 0; is_v < 2; ++is_v) add(a->counters[is_v], counts[is_v]);
    }
  }
}

struct AttentionArguments {
  Cache cache;
  const void* q;
  void* out;
  int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;  // bytes
  const int32_t* block_table;
  int64_t block_table_stride;  // entries
  const int32_t* seq_lens;
  const int32_t* query_start;
  float* lse;          // [tokens, num_q_heads] or null
  const float* sinks;  // [num_q_heads] or null
  int32_t num_seqs, num_q_heads, sliding_window, dtype, num_threads;
  float softmax_scale, softcap;
};

namespace {

struct Item {
  int seq, head, query, num_queries;  // query tokens `query` to `query + num_queries - 1` of the sequence
  int split, num_splits;              // which part of the keys
  int64_t partial;                    // index of its first row among the partial results
};

const char* query_row(const AttentionArguments& a, int64_t token, int head) {
  return static_cast<const char*>(a.q) + token * a.q_token_stride + head * a.q_head_stride;
}

// Whether q . center is added to each score. Otherwise `finish_row` adds it where it matters.
bool completes_scores(const AttentionArguments& a) { return a.softcap > 0 || a.cache.num_buckets > 1; }

// q . center of a query row, which its scores over centered keys of a bucket lack.
float center_score(const AttentionArguments& a, int64_t token, int head, int kv_head, int bucket) {
  const int head_dim = a.cache.head_dim;
  if (!a.cache.k.center) return 0;
  const float* center = a.cache.k.center + of_bucket(a.cache, bucket) + kv_head * head_dim;
  alignas(32) float q[MAX_HEAD_DIM];
  read_floats(query_row(a, token, head), DType(a.dtype), head_dim, q);
  vec total = splat(0.f);
  for (int d = 0; d < head_dim; d += W) total = fma(load(q + d), load(center + d), total);
  return sum(total) * a.softmax_scale;
}

// Rows of an item are ordered by query token, then by head within the group.
void load_rows(const AttentionArguments& a, const Item& item, int group, float* q, Rows& rows) {
  const Cache& cache = a.cache;
  const int length = a.seq_lens[item.seq], num_queries = a.query_start[item.seq + 1] - a.query_start[item.seq];
  rows.q = q;
  rows.count = item.num_queries * group;
  rows.add_offset = completes_scores(a);
  for (int r = 0; r < rows.count; ++r) {
    const int query = item.query + r / group, head = item.head * group + r % group;
    const int64_t token = a.query_start[item.seq] + query;
    float* y = q + r * cache.head_dim;
    read_floats(query_row(a, token, head), DType(a.dtype), cache.head_dim, y);
    if (cache.k.gain_inverse) multiply(y, cache.head_dim, cache.k.gain_inverse, item.head);
    rotate(y, cache.head_dim, cache.k.order);
    for (int d = 0; d < cache.head_dim; ++d) y[d] *= a.softmax_scale;
    rows.last[r] = std::max(length - num_queries + query + 1, 0);
    rows.first[r] = a.sliding_window ? std::max(rows.last[r] - a.sliding_window, 0) : 0;
  }
}

void load_offsets(const AttentionArguments& a, const Item& item, int group, int bucket, Rows& rows) {
  for (int r = 0; r < rows.count; ++r) {
    const int64_t token = a.query_start[item.seq] + item.query + r / group;
    rows.offset[r] = center_score(a, token, item.head * group + r % group, item.head, bucket);
  }
}

void attend_item(const AttentionArguments& a, const Item& item, int group, DecodeTokens decode, Partial out) {
  const Cache& cache = a.cache;
  const int head_dim = cache.head_dim;
  alignas(32) static thread_local float q[kMaxRows * MAX_HEAD_DIM], k[(kTile + 4) * MAX_HEAD_DIM],
      v[kTile * MAX_HEAD_DIM];
  Rows rows;
  load_rows(a, item, group, q, rows);
  std::fill_n(out.max, rows.count, -INFINITY);
  std::fill_n(out.sum, rows.count, 0.f);
  std::fill_n(out.values, rows.count * head_dim, 0.f);
  int begin = *std::min_element(rows.first, rows.first + rows.count),
      end = *std::max_element(rows.last, rows.last + rows.count);
  if (item.num_splits > 1) {
    begin = std::max(begin, item.split * kSplit);
    end = std::min(end, (item.split + 1) * kSplit);
  }
  const int32_t* pages = a.block_table + item.seq * a.block_table_stride;
  int bucket = -1;
  for (int start = begin / kTile * kTile; start < end; start += kTile) {
    const int count = std::min(kTile, end - start);
    if (rows.add_offset && bucket != bucket_at(cache, start)) {
      bucket = bucket_at(cache, start);
      load_offsets(a, item, group, bucket, rows);
    }
    decode(cache, pages, item.head, start, count, k, v);
    std::fill_n(k + count * head_dim, 4 * head_dim, 0.f);
    attend_tile(rows, k, v, start, count, head_dim, a.softcap, out);
  }
}

// Adds the partial results and the sink of one query row, rotates the sum back, and writes it.
void finish_row(const AttentionArguments& a, const Item& item, int row, int group, const Partial* parts) {
  const Cache& cache = a.cache;
  const int head_dim = cache.head_dim, head = item.head * group + row % group;
  const int64_t token = a.query_start[item.seq] + item.query + row / group;
  float m = -INFINITY;
  for (int s = 0; s < item.num_splits; ++s) m = std::max(m, parts[s].max[row]);
  const float key_max = m;
  // Unless scores are complete, all scores of the row lack the same offset. Only a sink and the log-sum-exp need it.
  const float offset = !completes_scores(a) && (a.sinks || a.lse) ? center_score(a, token, head, item.head, 0) : 0;
  const float sink = a.sinks ? a.sinks[head] - offset : -INFINITY;
  m = std::max(m, sink);
  alignas(32) float values[MAX_HEAD_DIM] = {};
  float total = 0;
  for (int s = 0; s < item.num_splits; ++s) {
    if (parts[s].max[row] == -INFINITY) continue;
    const float factor = std::exp(parts[s].max[row] - m);
    total += parts[s].sum[row] * factor;
    for (int d = 0; d < head_dim; ++d) values[d] += parts[s].values[row * head_dim + d] * factor;
  }
  const float with_sink = total + (a.sinks ? std::exp(sink - m) : 0.f);
  const bool sees_nothing = key_max == -INFINITY;
  for (int d = 0; d < head_dim; ++d) values[d] = sees_nothing ? 0.f : values[d] / with_sink;
  rotate(values, head_dim, cache.v.order);
  if (cache.v.gain_inverse) multiply(values, head_dim, cache.v.gain_inverse, item.head);
  if (cache.v.center && !sees_nothing)
    for (int d = 0; d < head_dim; ++d) values[d] += cache.v.center[item.head * head_dim + d] * (total / with_sink);
  write_floats(values, DType(a.dtype), head_dim,
               static_cast<char*>(a.out) + token * a.out_token_stride + head * a.out_head_stride);
  if (a.lse) a.lse[token * a.num_q_heads + head] = with_sink == 0 ? -INFINITY : m + std::log(with_sink) + offset;
}

}  // namespace

void sawkv_attention(const AttentionArguments* args) {
  const AttentionArguments& a = *args;
  const Cache& cache = a.cache;
  const int group = a.num_q_heads / cache.num_kv_heads, queries_at_once = std::max(1, kRows / group);
  std::vector<Item> items;
  int64_t num_rows = 0;
  for (int seq = 0; seq < a.num_seqs; ++seq) {
    const int num_queries = a.query_start[seq + 1] - a.query_start[seq], length = a.seq_lens[seq];
    const int num_splits = num_queries > kMaxSplitQueries ? 1 : std::max(1, (length + kSplit - 1) / kSplit);
    for (int query = num_queries; query > 0; query -= queries_at_once)  // the last ones first: they see most tokens
      for (int head = 0; head < cache.num_kv_heads; ++head)
        for (int split = 0; split < num_splits; ++split) {
          const int first = std::max(0, query - queries_at_once);
          items.push_back({seq, head, first, query - first, split, num_splits, num_rows});
          num_rows += (query - first) * group;
        }
  }
  std::vector<float> stats(2 * num_rows);
  std::vector<float> values(num_rows * cache.head_dim + W);
  const DecodeTokens decode = decode_tokens_of(cache);
  auto partial = [&](const Item& item) {
    return Partial{stats.data() + 2 * item.partial, stats.data() + 2 * item.partial + item.num_queries * group,
                   values.data() + item.partial * cache.head_dim};
  };
  const int64_t num_items = int64_t(items.size());
#pragma omp parallel num_threads(a.num_threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_items; ++i) attend_item(a, items[i], group, decode, partial(items[i]));
#pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < num_items; ++i) {
      if (items[i].split) continue;
      std::vector<Partial> parts;
      for (int s = 0; s < items[i].num_splits; ++s) parts.push_back(partial(items[i + s]));
      for (int row = 0; row < items[i].num_queries * group; ++row) finish_row(a, items[i], row, group, parts.data());
    }
  }
}

struct GatherArguments {
  Cache cache;
  const int32_t* block_table;
  int64_t block_table_stride;  // entries
  const int32_t* seq_lens;
  const int32_t* starts;
  const int32_t* first_positions;  // [num_seqs], of each table's first token; null: 0
  const float* k_added;            // [num_buckets, num_kv_heads, head_dim] or null; added to rows
  const float* v_added;            // [num_kv_heads, head_dim] or null
  void* k;                         // [max_tokens, num_kv_heads, head_dim]
  void* v;                         // likewise
  int64_t max_tokens;
  int32_t num_seqs, dtype, num_threads, rotated;
};

void sawkv_gather(const GatherArguments* args) {
  const GatherArguments& a = *args;
  const Cache& cache = a.cache;
  const DecodeTokens decode = decode_tokens_of(cache);
  const DType dtype = DType(a.dtype);
  std::vector<std::pair<int, int>> pages;  // (sequence, index of page)
  for (int seq = 0; seq < a.num_seqs; ++seq)
    for (int page = 0; page * cache.page_size < a.seq_lens[seq]; ++page) pages.emplace_back(seq, page);
  const int64_t num_pages = int64_t(pages.size());
#pragma omp parallel for num_threads(a.num_threads) schedule(static)
  for (int64_t i = 0; i < num_pages; ++i) {
    const auto [seq, page] = pages[i];
    alignas(32) float k[MAX_HEAD_DIM], v[MAX_HEAD_DIM];
    const int first = page * cache.page_size, last = std::min(first + cache.page_size, a.seq_lens[seq]);
    for (int t = first; t < last && a.starts[seq] + t < a.max_tokens; ++t)
      for (int head = 0; head < cache.num_kv_heads; ++head) {
        decode(cache, a.block_table + seq * a.block_table_stride, head, t, 1, k, v);
        const int64_t at = ((int64_t(a.starts[seq]) + t) * cache.num_kv_heads + head) * cache.head_dim * size_of(dtype);
        if (!a.rotated) {
          restore(k, cache.head_dim, cache.k, head);
          restore(v, cache.head_dim, cache.v, head);
        }
        const int position = t + (a.first_positions ? a.first_positions[seq] : 0);
        if (a.k_added) add(k, cache.head_dim, a.k_added + of_bucket(cache, bucket_at(cache, position)), head);
        if (a.v_added) add(v, cache.head_dim, a.v_added, head);
        write_floats(k, dtype, cache.head_dim, static_cast<char*>(a.k) + at);
        write_floats(v, dtype, cache.head_dim, static_cast<char*>(a.v) + at);
      }
  }
  if (a.num_seqs == 0) return;
  const int64_t row = int64_t(cache.num_kv_heads) * cache.head_dim * size_of(dtype), behind = a.starts[a.num_seqs];
  const int64_t cleared = std::clamp<int64_t>(a.max_tokens - behind, 0, CLEARED_ROWS);
  for (void* rows : {a.k, a.v}) std::memset(static_cast<char*>(rows) + behind * row, 0, cleared * row);
}

}  // extern "C"
