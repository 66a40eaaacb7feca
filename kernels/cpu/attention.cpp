// Attention from up to Q rows of each of B sequences to paged prefixes and a window of new rows. See attention.py.
//
// A task is one sequence and one key-value head: all rows of all its query heads read the same keys and values. A thread
// takes all heads of a sequence, which lie side by side in a slot, unless there are fewer sequences than threads.
// What a row gets does not depend on the others, nor on columns that it is not shown: a node of a tree gets to the bit
// what its token gets at the end of a sequence.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace {

struct Shape : Columns {
  long H, G, D;
  long q_stride;  // from row to row
};

// Rows at once, and accumulators of each: where values are summed, and, a Vec of each, where columns are scored.
constexpr int MOST_ROWS = 6, MOST_SCORED = LANES == WIDTH ? 8 : LANES == 8 ? 6 : 4;
constexpr int parts_of(int rows) { return LANES == WIDTH || rows <= 3 ? 4 : 2; }

template <class X>
class Task {
 public:
  Task(const Shape& shape) : s(shape), q(shape.Q * heads() * shape.D), out(q.size()) {}

  // q [T, H, D], kv [S, 2, G, D]; y [T, H, D]
  void run(long b, long g, const X* all_q, const X* kv, X* y) {
    rows = (s.first_row(b + 1) - s.first_row(b)) * heads();
    take_queries(b, g, all_q);
    const int64_t *prefix = s.prefix + b * s.L, *window = s.window + b * s.W;
    const long prefix_len = s.prefix_len[b];
    columns.assign(prefix, prefix + prefix_len);
    columns.insert(columns.end(), window, window + s.W);
    stride = (columns.size() + WIDTH - 1) / WIDTH * WIDTH;
    weight.resize(rows * stride);
    keys.resize(s.D * WIDTH);
    const X* head = kv + g * s.D;
    ends.resize(rows);
    for (long r = 0; r < rows; r++) ends[r] = prefix_len + end_of_shown(shown(b, r));
    for (long c = 0; c < num_columns(); c += WIDTH) score(head, c);
    for (long r = 0; r < rows; r++) softmax(&weight[r * stride], prefix_len, shown(b, r), ends[r]);
    sum_values(head + s.G * s.D);
    give(b, g, y);
  }

 private:
  const Shape& s;
  long rows, stride;  // row r is query r / (H / G), head r % (H / G) of the group
  std::vector<float> q, out;
  std::vector<float> weight;     // [rows, stride]: scores, then what a row takes of each column
  std::vector<float> keys;       // [D, 16], of the columns at hand
  std::vector<float> side_by_side;  // what a row takes of the columns behind the prefix's whole 16s
  std::vector<int64_t> columns;     // slots
  std::vector<long> ends;           // columns from there on no row r is shown: they are not looked at

  long heads() const { return s.H / s.G; }
  long num_columns() const { return columns.size(); }
  const bool* shown(long b, long r) const { return s.mask + (b * s.Q + r / heads()) * s.W; }
  long end_of_shown(const bool* shown) const {
    long w = s.W;
    while (w && !shown[w - 1]) w--;
    return w;
  }
  long end_of(long r, long count) const { return *std::max_element(&ends[r], &ends[r] + count); }
  const X* at(const X* base, long column) const { return base + columns[column] * 2 * s.G * s.D; }

  void take_queries(long b, long g, const X* all_q) {
    const float scale = 1 / std::sqrt((float)s.D);
    for (long r = 0; r < rows; r++) {
      const X* from = all_q + (s.first_row(b) + r / heads()) * s.q_stride + (g * heads() + r % heads()) * s.D;
      for (long d = 0; d < s.D; d += WIDTH) store(&q[r * s.D + d], load(from + d) * scale);
    }
  }

  // Keys and values of some columns, for later: slots are too small for a CPU to see where reading will go on.
  void fetch(const X* head, long begin, long end) const {
    const long bytes = s.D * sizeof(X);
    for (long c = begin; c < std::min(end, num_columns()); c++) {
      const char* key = (const char*)at(head, c);
      for (long i = 0; i < bytes; i += 64) {
        __builtin_prefetch(key + i, 0, 2);
        __builtin_prefetch(key + s.G * bytes + i, 0, 2);
      }
    }
  }

  // Of all rows with the 16 columns from c on, or what there is of them.
  void score(const X* head, long c) {
    fetch(head, c + WIDTH, c + 2 * WIDTH);
    const long there = std::min<long>(WIDTH, num_columns() - c);
    for (long d = 0; d < s.D; d += WIDTH) {
      Vec square[WIDTH];
      for (long i = 0; i < WIDTH; i++) square[i] = load(at(head, c + std::min(i, there - 1)) + d);
      transpose(square);
      for (long i = 0; i < WIDTH; i++) store(&keys[(d + i) * WIDTH], square[i]);
    }
    for (long r = 0; r < rows; r += MOST_SCORED) {
      const long count = std::min<long>(MOST_SCORED, rows - r);
      if (end_of(r, count) > c) count > 4 ? score_rows<MOST_SCORED>(r, count, c) : score_rows<4>(r, count, c);
    }
  }

  template <int R>
  void score_rows(long r, long count, long c) {
    const float* of[R];
    for (long i = 0; i < R; i++) of[i] = &q[(r + std::min(i, count - 1)) * s.D];
    Part acc[R][PARTS] = {};
    for (long d = 0; d < s.D; d++)
      for (int p = 0; p < PARTS; p++) {
        Part key = load_part(&keys[d * WIDTH + p * LANES]);
        for (int i = 0; i < R; i++) acc[i][p] += of[i][d] * key;
      }
    for (long i = 0; i < count; i++)
      for (int p = 0; p < PARTS; p++) write(&weight[(r + i) * stride + c + p * LANES], acc[i][p]);
  }

  void softmax(float* row, long prefix_len, const bool* shown, long end) {
    const long padded = (end + WIDTH - 1) / WIDTH * WIDTH;
    for (long c = prefix_len; c < end; c++)
      if (!shown[c - prefix_len]) row[c] = -INFINITY;
    std::fill(row + end, row + padded, -INFINITY);
    std::fill(row + padded, row + stride, 0);
    Part largest = load_part(row);
    for (long c = LANES; c < padded; c += LANES) {
      Part v = load_part(row + c);
      largest = v > largest ? v : largest;
    }
    float most = largest[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, largest[i]);
    for (long c = 0; c < padded; c += LANES) write(row + c, exponential(load_part(row + c) - most));
    const float inverse = 1 / total(row, prefix_len, shown, end);
    for (long c = 0; c < padded; c += LANES) write(row + c, load_part(row + c) * inverse);
  }

  // Of what a row is shown, as if it lay side by side: each lane adds up the same, wherever hidden columns are.
  float total(const float* row, long prefix_len, const bool* shown, long end) {
    const long whole = prefix_len / WIDTH * WIDTH;
    Vec lanes = {};
    for (long c = 0; c < whole; c += WIDTH) lanes += load(row + c);
    side_by_side.assign((end - whole + WIDTH - 1) / WIDTH * WIDTH, 0);
    float* to = std::copy(row + whole, row + prefix_len, side_by_side.data());
    for (long c = prefix_len; c < end; c++)
      if (shown[c - prefix_len]) *to++ = row[c];
    for (size_t i = 0; i < side_by_side.size(); i += WIDTH) lanes += load(&side_by_side[i]);
    return sum(lanes);
  }

  void sum_values(const X* head) {
    for (long r = 0; r < rows; r += MOST_ROWS) sum_rows(head, r, rows - r);
  }

  void sum_rows(const X* head, long r, long count) {
    switch (count) {
      case 1: return sum_rows<1>(head, r);
      case 2: return sum_rows<2>(head, r);
      case 3: return sum_rows<3>(head, r);
      case 4: return sum_rows<4>(head, r);
      case 5: return sum_rows<5>(head, r);
      default: return sum_rows<MOST_ROWS>(head, r);
    }
  }

  template <int R>
  void sum_rows(const X* head, long r) {
    constexpr int most = parts_of(R);
    for (long d = 0, parts; d < s.D; d += parts * LANES) {
      const long left = (s.D - d) / LANES;
      parts = left >= most ? most : left >= 2 ? 2 : 1;
      parts == most ? sum_block<most, R>(head, r, d) : parts == 2 ? sum_block<2, R>(head, r, d)
                                                                  : sum_block<1, R>(head, r, d);
    }
  }

  template <int P, int R>
  void sum_block(const X* head, long r, long d) {
    Part acc[R][P] = {};
    for (long c = 0, end = end_of(r, R); c < end; c++) {
      const X* value = at(head, c) + d;
      for (int p = 0; p < P; p++) {
        Part part = load_part(value + p * LANES);
        for (int i = 0; i < R; i++) acc[i][p] += weight[(r + i) * stride + c] * part;
      }
    }
    for (int i = 0; i < R; i++)
      for (int p = 0; p < P; p++) write(&out[(r + i) * s.D + d + p * LANES], acc[i][p]);
  }

  void give(long b, long g, X* y) const {
    for (long r = 0; r < rows; r++) {
      X* to = y + ((s.first_row(b) + r / heads()) * s.H + g * heads() + r % heads()) * s.D;
      for (long d = 0; d < s.D; d += WIDTH) store(to + d, load(&out[r * s.D + d]));
    }
  }
};

template <class X>
void attend(const X* q, const X* kv, X* y, const Shape& shape, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Task<X> task(shape);
#pragma omp for schedule(dynamic, shape.B >= threads ? shape.G : 1)
    for (long i = 0; i < shape.B * shape.G; i++) task.run(i / shape.G, i % shape.G, q, kv, y);
  }
}

}  // namespace

#define ATTENTION(NAME, X)                                                                               \
  void attention_##NAME(const X* q, const X* kv, const Columns* columns, X* y, long H, long G, long D,   \
                        long q_stride, int threads) {                                                    \
    attend(q, kv, y, Shape{*columns, H, G, D, q_stride}, threads);                                       \
  }

extern "C" {
ATTENTION(float32, float)
ATTENTION(bfloat16, bfloat16)
}
