// Attention of the query rows of one work item over one tile of tokens.
#pragma once
#include "row.h"

namespace {

constexpr int kTile = 32;  // tokens decoded at once; at head_dim 128, K and V of a tile fill a 32 KiB L1 cache
constexpr int kRows = 64;  // desired query rows (tokens x heads of a group) per work item
constexpr int kMaxRows = MAX_GROUP;  // the most it can have: the largest group of heads, which __init__.py checks
constexpr int kSplit =
    1024;  // tokens per work item if queries are few; fixed, so that results do not depend on other sequences
constexpr int kMaxSplitQueries = 8;  // with more query tokens, the queries alone give enough items
static_assert(BUCKET_SIZE % kTile == 0, "all tokens of a tile share a center of K");

// Result of attention over part of the keys: softmax maximum, sum, and weighted values of each row.
struct Partial {
  float* max;
  float* sum;
  float* values;  // [rows, head_dim]
};

// scores[r][t] = q[r] . k[t] for R rows and T tokens. The order of operations of a dot product does not depend on R and
// T.
template <int R, int T>
inline void dot_block(const float* q, const float* k, int head_dim, float* scores) {
  vec acc[R][T] = {};
  for (int d = 0; d < head_dim; d += W) {
    vec b[T];
    for (int t = 0; t < T; ++t) b[t] = load(k + t * head_dim + d);
    for (int r = 0; r < R; ++r) {
      const vec a = load(q + r * head_dim + d);
      for (int t = 0; t < T; ++t) acc[r][t] = fma(a, b[t], acc[r][t]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) scores[r * kTile + t] = sum(acc[r][t]);
}

// values[r] += sum over t of p[r][t] v[t], in the order of t.
template <int R>
inline void weigh_block(const float* p, const float* v, int first, int last, int head_dim, float* values) {
  for (int d = 0; d < head_dim; d += 2 * W) {
    vec acc[R][2];
    for (int r = 0; r < R; ++r)
      acc[r][0] = load(values + r * head_dim + d), acc[r][1] = load(values + r * head_dim + d + W);
    for (int t = first; t < last; ++t) {
      const vec v0 = load(v + t * head_dim + d), v1 = load(v + t * head_dim + d + W);
      for (int r = 0; r < R; ++r) {
        const vec w = splat(p[r * kTile + t]);
        acc[r][0] = fma(w, v0, acc[r][0]);
        acc[r][1] = fma(w, v1, acc[r][1]);
      }
    }
    for (int r = 0; r < R; ++r)
      store(values + r * head_dim + d, acc[r][0]), store(values + r * head_dim + d + W, acc[r][1]);
  }
}

struct Rows {              // the query rows of a work item
  const float* q;          // [count, head_dim], gain undone, rotated, times the softmax scale
  float offset[kMaxRows];  // q . center of each row, with the center of the tile's bucket
  bool add_offset;         // whether it is added to scores
  int count;
  int first[kMaxRows], last[kMaxRows];  // keys that each row sees: positions first to last - 1
};

// Online softmax over the tile of `count` tokens that starts at position `start`.
void attend_tile(const Rows& rows, const float* k, const float* v, int start, int count, int head_dim, float softcap,
                 Partial out) {
  alignas(32) float p[kMaxRows * kTile];
  const int padded = (count + 3) / 4 * 4;  // k has room for padding; its scores are hidden below
  int r = 0;
  for (; r + 4 <= rows.count; r += 4)
    for (int t = 0; t < padded; t += 2)
      dot_block<4, 2>(rows.q + r * head_dim, k + t * head_dim, head_dim, p + r * kTile + t);
  for (; r + 2 <= rows.count; r += 2)
    for (int t = 0; t < padded; t += 4)
      dot_block<2, 4>(rows.q + r * head_dim, k + t * head_dim, head_dim, p + r * kTile + t);
  for (; r < rows.count; ++r)
    for (int t = 0; t < padded; t += 4)
      dot_block<1, 4>(rows.q + r * head_dim, k + t * head_dim, head_dim, p + r * kTile + t);

  int first[kMaxRows], last[kMaxRows];
  bool all_see_all = true;
  for (r = 0; r < rows.count; ++r) {
    first[r] = std::min(std::max(rows.first[r] - start, 0), count);
    last[r] = std::max(std::min(rows.last[r] - start, count), first[r]);
    all_see_all &= first[r] == 0 && last[r] == count;
  }
  // Several rows are handled at once, with weight 0 for tokens that a row does not see. A weight of 0 hides all values
  // except NaN and infinity.
  const bool together = all_see_all || all_finite(v, count * head_dim);
  for (r = 0; r < rows.count; ++r) {
    float* row = p + r * kTile;
    if (rows.add_offset)
      for (int t = first[r]; t < last[r]; ++t) row[t] += rows.offset[r];
    if (softcap > 0)
      for (int t = first[r]; t < last[r]; ++t) row[t] = softcap * std::tanh(row[t] / softcap);
    for (int t = 0; t < first[r]; ++t) row[t] = -INFINITY;
    for (int t = last[r]; t < kTile; ++t) row[t] = -INFINITY;
    if (first[r] == last[r]) {
      std::memset(row, 0, sizeof(float) * kTile);
      continue;
    }
    vec high = splat(out.max[r]);
    for (int t = 0; t < kTile; t += W) high = max(load(row + t), high);  // this order of arguments ignores NaN
    float m = high[0];
    for (int j = 1; j < W; ++j) m = std::max(m, high[j]);
    if (m == -INFINITY) m = 0;  // every score is NaN or -inf
    const float shrink = std::exp(out.max[r] - m);
    vec total = splat(0.f);
    for (int t = 0; t < kTile; t += W) {
      const vec e = exp(load(row + t) - splat(m));
      store(row + t, e);
      total += e;
    }
    out.max[r] = m;
    out.sum[r] = out.sum[r] * shrink + sum(total);
    if (shrink != 1)
      for (int d = 0; d < head_dim; d += W)
        store(out.values + r * head_dim + d, load(out.values + r * head_dim + d) * splat(shrink));
  }
  for (r = 0; r < rows.count;) {
    const float* row = p + r * kTile;
    float* values = out.values + r * head_dim;
    if (together && r + 4 <= rows.count) {
      const int lo = *std::min_element(first + r, first + r + 4), hi = *std::max_element(last + r, last + r + 4);
      weigh_block<4>(row, v, lo, hi, head_dim, values);
      r += 4;
    } else if (together && r + 2 <= rows.count) {
      weigh_block<2>(row, v, std::min(first[r], first[r + 1]), std::max(last[r], last[r + 1]), head_dim, values);
      r += 2;
    } else {
      weigh_block<1>(row, v, first[r], last[r], head_dim, values);
      r += 1;
    }
  }
}

}  // namespace
