// A draft tree's candidates, all levels in one call. See growth.py.

#include <algorithm>
#include <vector>

#include "best.h"
#include "kernels.h"

namespace {

struct Candidates {
  float* score;
  int64_t *token, *parent;
};

template <class X>
class Grower {
 public:
  Grower(const Growth& growth, const Requests& requests, X* kv, Candidates all, int threads)
      : g(growth), r(requests), kv(kv), all(all), threads(threads), K(g.K), C(K + (r.most_steps - 1) * K * K) {
    const long rows = r.B * K;
    score.assign(r.B, 0);  // of the root alone
    candidate.assign(r.B, -1);
    seen.assign(r.B * g.W, 0);
    token.resize(rows), position.resize(rows), slot.resize(rows), child.resize(rows * K), logprob.resize(rows * K);
    hidden.resize(rows * width), fed.resize(rows * width), normed.resize(rows * width);
    logits.resize(rows * g.lm_head.E);
  }

  // last [B, D]: the head's hidden states at the rows that saw the roots
  void run(const X* last) {
    std::copy(last, last + r.B * width, hidden.data());
    for (long level = 0; level < r.most_steps; level++) {
      if (level) forward(level);
      judge(level);
      next(level);
    }
  }

 private:
  const Growth& g;
  const Requests& r;
  X* kv;
  Candidates all;
  const int threads;
  const long K, C, width = g.head.layer.out.E;
  // The nodes that are continued: P of each request, which is 1 or K.
  std::vector<float> score;
  std::vector<int64_t> candidate, token, position, slot;
  std::vector<char> seen;  // [B, P, W]
  std::vector<X> fed;      // the hidden states at their parents
  // What the head says of them, and their children.
  static thread_local inline std::vector<X> hidden, normed, logits;
  std::vector<float> logprob;
  std::vector<int64_t> child;

  void forward(long level) {
    for (long b = 0; b < r.B; b++)
      for (long k = 0; k < K; k++) {
        position[b * K + k] = r.prefix_len[b] + level - 1;
        slot[b * K + k] = r.scratch[b * g.W + (level - 1) * K + k];
      }
    Columns columns{r.prefix, r.prefix_len, r.scratch, (const bool*)seen.data(), nullptr, r.B, K, r.L, g.W};
    Kernels<X>::head(&g.head, &columns, token.data(), position.data(), slot.data(), kv, fed.data(), hidden.data(),
                     threads);
  }

  void judge(long level) {
    const long P = level ? K : 1, rows = r.B * P, V = g.lm_head.E;
    const X* x = hidden.data();
    if (g.logits_norm) {
      Kernels<X>::rms_norm(x, (const X*)g.logits_norm, normed.data(), rows, width, 1, g.head.layer.eps, threads);
      x = normed.data();
    }
    multiply(g.lm_head, x, (const X*)nullptr, logits.data(), rows, threads);
    if (r.limits.top_k) Kernels<X>::limit(logits.data(), r.temperature, &r.limits, r.B, P, V, threads);
    for (long i = 0; i < rows; i++) position[i] = r.length[i / P] + level + 1;  // of what is picked after the node
    Kernels<X>::topk_logprob(logits.data(), g.tokens, r.temperature, r.seed, position.data(), g.lowest, logprob.data(),
                             child.data(), r.B, P, V, K, V, threads);
  }

  // Writes down all children; the best K of each request, of equals the first, are the nodes of the next level.
  void next(long level) {
    const long P = level ? K : 1, first = level ? K + (level - 1) * K * K : 0;
    const bool is_last = level + 1 == r.most_steps;
    std::vector<float> value(K), next_score(r.B * K);
    std::vector<int64_t> index(K), next_candidate(r.B * K);
    std::vector<char> next_seen(r.B * K * g.W);
    for (long b = 0; b < r.B; b++) {
      const long limit = level < r.num_steps[b] ? r.topk[b] : 0;  // of this request's own tree
      const Candidates to{all.score + b * C + first, all.token + b * C + first, all.parent + b * C + first};
      Best best{value.data(), index.data(), K};
      for (long m = 0; m < P * K; m++) {
        const long above = b * P + m / K;
        to.score[m] = m % K < limit ? score[above] + logprob[above * K + m % K] : NEVER;
        to.token[m] = child[above * K + m % K];
        to.parent[m] = candidate[above];
        best.show(to.score[m], m);
      }
      for (long k = 0; k < K && !is_last; k++) {
        const long m = index[k], at = b * K + k, above = b * P + m / K;
        next_score[at] = k < limit ? value[k] : NEVER;
        token[at] = to.token[m];
        next_candidate[at] = first + m;
        std::copy_n(&hidden[above * width], width, &fed[at * width]);
        std::copy_n(&seen[above * g.W], g.W, &next_seen[at * g.W]);
        next_seen[at * g.W + level * K + k] = true;  // itself
      }
    }
    score.swap(next_score), candidate.swap(next_candidate), seen.swap(next_seen);
  }
};

}  // namespace

#define GROW(NAME, X)                                                                                             \
  void grow_##NAME(const Growth* growth, const Requests* requests, const X* last, X* kv, float* score,            \
                   int64_t* token, int64_t* parent, int threads) {                                                \
    Grower<X>(*growth, *requests, kv, Candidates{score, token, parent}, threads).run(last);                       \
  }

extern "C" {
GROW(float32, float)
GROW(bfloat16, bfloat16)
}
