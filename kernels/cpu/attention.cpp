// Attention from Q rows of B sequences to paged prefixes and a window of new rows. See attention.py.
//
// A task is one sequence and one key-value head: all rows of all its query heads read the same keys and values.
// What a row gets does not depend on the others.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

struct Shape {
  long B, Q, H, G, D, L, W;  // L columns of prefix slots, W of window slots
  long q_stride;             // from row to row
};

constexpr int ROWS = 4, VECS = 4;  // accumulators of the weighted sum of values

template <class X>
class Task {
 public:
  Task(const Shape& shape) : s(shape), rows(shape.Q * (shape.H / shape.G)), q(rows * shape.D), out(rows * shape.D) {}

  // q [B, Q, H, D], kv [S, 2, G, D], mask [Q, W] of this sequence; y [B, Q, H, D]
  void run(long b, long g, const X* all_q, const X* kv, const int64_t* prefix, long prefix_len, const int64_t* window,
           const bool* mask, X* y) {
    take_queries(b, g, all_q);
    columns.assign(prefix, prefix + prefix_len);
    columns.insert(columns.end(), window, window + s.W);
    stride = (columns.size() + WIDTH - 1) / WIDTH * WIDTH;
    weight.assign(rows * stride, -INFINITY);
    const X* head = kv + g * s.D;
    score(head, prefix_len, mask);
    for (long r = 0; r < rows; r++) softmax(&weight[r * stride]);
    sum_values(head + s.G * s.D);
    give(b, g, y);
  }

 private:
  const Shape& s;
  const long rows;  // row r is query r / (H / G), head r % (H / G) of the group
  long stride;
  std::vector<float> q, out, weight;  // weight [rows, stride]: scores, then what a row takes of each column
  std::vector<int64_t> columns;       // slots

  long heads() const { return s.H / s.G; }

  void take_queries(long b, long g, const X* all_q) {
    const float scale = 1 / std::sqrt((float)s.D);
    for (long r = 0; r < rows; r++) {
      const X* from = all_q + (b * s.Q + r / heads()) * s.q_stride + (g * heads() + r % heads()) * s.D;
      for (long d = 0; d < s.D; d += WIDTH) store(&q[r * s.D + d], load(from + d) * scale);
    }
  }

  void score(const X* keys, long prefix_len, const bool* mask) {
    for (long c = 0; c < (long)columns.size(); c++) {
      const X* key = keys + columns[c] * 2 * s.G * s.D;
      if (c + 8 < (long)columns.size()) __builtin_prefetch(keys + columns[c + 8] * 2 * s.G * s.D);
      for (long r = 0; r < rows; r++) {
        if (c >= prefix_len && !mask[r / heads() * s.W + c - prefix_len]) continue;
        Vec products = {};
        for (long d = 0; d < s.D; d += WIDTH) products += load(&q[r * s.D + d]) * load(key + d);
        weight[r * stride + c] = sum(products);
      }
    }
  }

  void softmax(float* row) {
    float most = -INFINITY;
    for (long c = 0; c < (long)columns.size(); c++) most = row[c] > most ? row[c] : most;
    Vec total = {};
    for (long c = 0; c < stride; c += WIDTH) {
      Vec e = exponential(load(row + c) - most);
      store(row + c, e);
      total += e;
    }
    const float inverse = 1 / sum(total);
    for (long c = 0; c < stride; c += WIDTH) store(row + c, load(row + c) * inverse);
  }

  void sum_values(const X* values) {
    for (long d = 0; d < s.D; d += VECS * WIDTH) {
      const int vecs = std::min<long>(VECS, (s.D - d) / WIDTH);
      for (long r = 0; r < rows; r += ROWS) {
        const bool whole = vecs == VECS && r + ROWS <= rows;
        whole ? sum_block<VECS, ROWS>(values + d, r, d) : sum_rest(values + d, r, d, vecs);
      }
    }
  }

  template <int V, int R>
  void sum_block(const X* values, long r, long d) {
    Vec acc[R][V] = {};
    for (long c = 0; c < (long)columns.size(); c++) {
      const X* value = values + columns[c] * 2 * s.G * s.D;
      for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++) acc[i][v] += weight[(r + i) * stride + c] * load(value + v * WIDTH);
    }
    for (int i = 0; i < R; i++)
      for (int v = 0; v < V; v++) store(&out[(r + i) * s.D + d + v * WIDTH], acc[i][v]);
  }

  void sum_rest(const X* values, long r, long d, int vecs) {
    for (long i = r; i < std::min(rows, r + ROWS); i++)
      if (vecs == VECS)
        sum_block<VECS, 1>(values, i, d);
      else
        for (int v = 0; v < vecs; v++) sum_block<1, 1>(values + v * WIDTH, i, d + v * WIDTH);
  }

  void give(long b, long g, X* y) const {
    for (long r = 0; r < rows; r++) {
      X* to = y + ((b * s.Q + r / heads()) * s.H + g * heads() + r % heads()) * s.D;
      for (long d = 0; d < s.D; d += WIDTH) store(to + d, load(&out[r * s.D + d]));
    }
  }
};

template <class X>
void attend(const X* q, const X* kv, const int64_t* prefix, const int64_t* prefix_len, const int64_t* window,
            const bool* mask, X* y, const Shape& shape, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Task<X> task(shape);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < shape.B * shape.G; i++) {
      const long b = i / shape.G, g = i % shape.G;
      task.run(b, g, q, kv, prefix + b * shape.L, prefix_len[b], window + b * shape.W,
               mask + b * shape.Q * shape.W, y);
    }
  }
}

}  // namespace

#define ATTENTION(NAME, X)                                                                                          \
  void attention_##NAME(const X* q, const X* kv, const int64_t* prefix, const int64_t* prefix_len,                  \
                        const int64_t* window, const bool* mask, X* y, long B, long Q, long H, long G, long D, long L, \
                        long W, long q_stride, int threads) {                                                       \
    attend(q, kv, prefix, prefix_len, window, mask, y, Shape{B, Q, H, G, D, L, W, q_stride}, threads);              \
  }

extern "C" {
ATTENTION(float32, float)
ATTENTION(bfloat16, bfloat16)
}
