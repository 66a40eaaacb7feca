// What grows, builds and checks draft trees. See trees.py.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace {

constexpr long MIN_SHARED = 1 << 16;  // elements from which on threads share the rows
constexpr float NEVER = -INFINITY;

INLINE bool any(Ints v) {
  int found = 0;
  for (int i = 0; i < WIDTH; i++) found |= v[i];
  return found;
}

// The k best of what it is shown, in falling order; of equals the first.
struct Best {
  float* value;
  int64_t* index;
  long k, count = 0;

  bool takes(float v) const { return count < k || v > value[k - 1]; }
  void show(float v, int64_t i) {
    if (!takes(v)) return;
    long place = count < k ? count++ : k - 1;
    for (; place > 0 && v > value[place - 1]; place--) {
      value[place] = value[place - 1];
      index[place] = index[place - 1];
    }
    value[place] = v;
    index[place] = i;
  }
};

template <class X>
void topk_logprob(const X* logits, float scale, float* logprob, int64_t* index, long R, long W, long k, long stride,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (R * W > MIN_SHARED)
  for (long r = 0; r < R; r++) {
    const X* row = logits + r * stride;
    const long whole = W / WIDTH * WIDTH;
    Best best{logprob + r * k, index + r * k, k};
    for (long w = 0; w < whole; w += WIDTH) {
      Vec v = load(row + w);
      if (best.count == k && !any(v > best.value[k - 1])) continue;
      for (int i = 0; i < WIDTH; i++) best.show(v[i], w + i);
    }
    for (long w = whole; w < W; w++) best.show(as_float(row[w]), w);
    const float highest = best.value[0];
    Vec sums = {};
    for (long w = 0; w < whole; w += WIDTH) sums += exponential((load(row + w) - highest) * scale);
    float total = sum(sums);
    for (long w = whole; w < W; w++) total += std::exp((as_float(row[w]) - highest) * scale);
    for (long j = 0; j < k; j++) {
      float& v = best.value[j];
      v = v == NEVER ? NEVER : (v - highest) * scale - std::log(total);
    }
  }
}

}  // namespace

extern "C" {

void topk_logprob_float32(const float* logits, float scale, float* logprob, int64_t* index, long R, long W, long k,
                          long stride, int threads) {
  topk_logprob(logits, scale, logprob, index, R, W, k, stride, threads);
}

void topk_logprob_bfloat16(const bfloat16* logits, float scale, float* logprob, int64_t* index, long R, long W, long k,
                           long stride, int threads) {
  topk_logprob(logits, scale, logprob, index, R, W, k, stride, threads);
}

// N nodes of each tree; mask [B, N, N] is of zeros.
void build_tree(const int64_t* root, const float* scores, const int64_t* tokens, const int64_t* parents,
                const int64_t* num_nodes, int64_t* token, int64_t* parent, bool* mask, int64_t* depth, bool* drafted,
                long B, long C, long N) {
  std::vector<int64_t> rank(C), kept(N - 1), place(C);
  for (long b = 0; b < B; b++, scores += C, tokens += C, parents += C) {
    std::iota(rank.begin(), rank.end(), 0);
    std::partial_sort(rank.begin(), rank.begin() + (N - 1), rank.end(), [&](int64_t one, int64_t other) {
      return scores[one] > scores[other] || (scores[one] == scores[other] && one < other);
    });
    std::copy_n(rank.begin(), N - 1, kept.begin());
    std::sort(kept.begin(), kept.end());
    for (long n = 1; n < N; n++) place[kept[n - 1]] = n;
    for (long n = 0; n < N; n++) drafted[b * N + n] = n == 0;
    for (long n = 1; n < std::min<long>(N, num_nodes[b]); n++) {
      const int64_t candidate = rank[n - 1];
      drafted[b * N + place[candidate]] = scores[candidate] > NEVER;
    }
    for (long n = 0; n < N; n++) {
      const int64_t candidate = n ? kept[n - 1] : -1;
      const int64_t above = n == 0 || parents[candidate] < 0 ? 0 : place[parents[candidate]];
      const long at = b * N + n;
      token[at] = n ? tokens[candidate] : root[b];
      parent[at] = above;
      depth[at] = n ? depth[b * N + above] + 1 : 0;
      if (n) memcpy(mask + at * N, mask + (b * N + above) * N, N);
      mask[at * N + n] = true;
    }
  }
}

void accept_path(const int64_t* token, const int64_t* parent, const bool* drafted, const int64_t* pick, int64_t* order,
                 int64_t* count, long B, long N) {
  std::vector<char> accepted(N);
  for (long b = 0; b < B; b++, token += N, parent += N, drafted += N, pick += N, order += N) {
    for (long n = 0; n < N; n++)
      accepted[n] = n == 0 || (accepted[parent[n]] && drafted[n] && token[n] == pick[parent[n]]);
    long next = 0;
    for (long n = 0; n < N; n++)
      if (accepted[n]) order[next++] = n;
    count[b] = next;
    for (long n = 0; n < N; n++)
      if (!accepted[n]) order[next++] = n;
  }
}
}
