// A speculative decode step with a draft head in one call. See tree_step.py.

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace {

constexpr int64_t DUMMY_SLOT = 0;  // as in cache/slots.py

struct TreeStep {
  Growth growth;
  Network target;
  Linear lm_head, fusion;  // the weight of the second may be null
};

// Tensors that outlast a step, by request row and by slot.
template <class X>
struct State {
  int64_t* table;
  X *target_kv, *draft_kv;
  X* hidden;               // where the last feed left the head
  const int64_t* scratch;  // slots of drafted rows
  long table_stride, kv_stride;
};

struct Batch {
  const int64_t *row, *length, *root, *topk, *num_steps, *num_nodes, *seed;
  const float* temperature;
  Limits limits;
  long B, L, most_steps, most_nodes, longest_path;
};

template <class X>
class Stepper {
 public:
  Stepper(const TreeStep& step, const State<X>& state, const Batch& batch, int threads)
      : step(step), state(state), b(batch), threads(threads), prefix(b.B * b.L) {
    for (long i = 0; i < b.B; i++)
      std::copy_n(state.table + b.row[i] * state.table_stride, b.length[i], &prefix[i * b.L]);
  }

  void run(int64_t* tokens, int64_t* counts) {
    draft();
    verify();
    std::vector<int64_t> order(b.B * N);
    accept_path(token.data(), parent.data(), (const bool*)drafted.data(), pick.data(), order.data(), counts, b.B, N);
    permute_windows(state.table, b.row, b.length, slot.data(), order.data(), state.table_stride, b.B, N);
    feed(order.data(), counts, tokens);
  }

 private:
  using K = Kernels<X>;
  const TreeStep& step;
  const State<X>& state;
  const Batch& b;
  const int threads;
  const long width = step.growth.head.layer.out.E, W = step.growth.W;
  const long target_width = step.target.layers->out.E;
  const long feature_width = std::max(1l, step.target.num_captured) * target_width;
  std::vector<int64_t> prefix;  // [B, L]
  long N = 0;
  std::vector<int64_t> token, parent, depth, pick, slot, position;  // [B, N]
  std::vector<char> mask, drafted;                                   // [B, N, N], [B, N]
  static thread_local inline std::vector<X> hidden, features, logits;

  void draft() {
    const long topk = step.growth.K, C = topk + (b.most_steps - 1) * topk * topk;
    std::vector<X> last(b.B * width);
    std::vector<int64_t> scratch(b.B * W), tokens(b.B * C), parents(b.B * C);
    std::vector<float> scores(b.B * C);
    for (long i = 0; i < b.B; i++) {
      std::copy_n(state.hidden + b.row[i] * width, width, &last[i * width]);
      std::copy_n(state.scratch + b.row[i] * W, W, scratch.data() + i * W);
    }
    const Requests requests{prefix.data(), b.length, scratch.data(), b.length, b.topk, b.num_steps,
                            b.seed,        b.temperature, b.limits,  b.B,      b.L,    b.most_steps};
    K::grow(&step.growth, &requests, last.data(), state.draft_kv, scores.data(), tokens.data(), parents.data(),
            threads);
    N = std::min(b.most_nodes, C + 1);
    for (auto* each : {&token, &parent, &depth, &pick, &slot, &position}) each->resize(b.B * N);
    mask.assign(b.B * N * N, 0), drafted.resize(b.B * N);
    build_tree(b.root, scores.data(), tokens.data(), parents.data(), b.num_nodes, token.data(), parent.data(),
               (bool*)mask.data(), depth.data(), (bool*)drafted.data(), b.B, C, N);
  }

  void verify() {
    for (long i = 0; i < b.B; i++)
      for (long n = 0; n < N; n++) {
        position[i * N + n] = b.length[i] + depth[i * N + n];
        slot[i * N + n] = state.table[b.row[i] * state.table_stride + b.length[i] + n];
      }
    const Columns columns{prefix.data(), b.length, slot.data(), (const bool*)mask.data(), nullptr, b.B, N, b.L, N};
    hidden.resize(b.B * N * target_width), features.resize(b.B * N * feature_width);
    logits.resize(b.B * N * step.lm_head.E);
    K::network(&step.target, &columns, token.data(), position.data(), slot.data(), state.target_kv, features.data(),
               hidden.data(), state.kv_stride, threads);
    multiply(step.lm_head, hidden.data(), (const X*)nullptr, logits.data(), b.B * N, threads);
    K::limit(logits.data(), b.temperature, &b.limits, b.B, N, step.lm_head.E, threads);
    K::pick(logits.data(), b.temperature, b.seed, position.data(), 1, pick.data(), b.B, N, step.lm_head.E, threads);
  }

  // The head reads the path: row p pairs the feature of its node with the token after it. The width is fixed.
  void feed(const int64_t* order, const int64_t* counts, int64_t* tokens) {
    const long P = std::min(b.longest_path, N), rows = b.B * P;
    const X* known = step.target.num_captured ? features.data() : hidden.data();
    std::vector<int64_t> positions(rows), slots(rows);
    std::vector<char> causal(rows * P);
    std::vector<X> of_path(rows * feature_width), fused(step.fusion.weight ? rows * width : 0), y(rows * width);
    for (long i = 0; i < b.B; i++)
      for (long p = 0; p < P; p++) {
        const long at = i * P + p, node = i * N + order[i * N + p];
        tokens[at] = pick[node];
        positions[at] = b.length[i] + p;
        slots[at] = p < counts[i] ? slot[node] : DUMMY_SLOT;
        std::fill_n(&causal[at * P], p + 1, true);
        std::copy_n(known + node * feature_width, feature_width, &of_path[at * feature_width]);
      }
    const Columns columns{prefix.data(), b.length, slots.data(), (const bool*)causal.data(), nullptr, b.B, P, b.L, P};
    if (step.fusion.weight) multiply(step.fusion, of_path.data(), (const X*)nullptr, fused.data(), rows, threads);
    K::head(&step.growth.head, &columns, tokens, positions.data(), slots.data(), state.draft_kv,
            step.fusion.weight ? fused.data() : of_path.data(), y.data(), threads);
    for (long i = 0; i < b.B; i++)
      std::copy_n(&y[(i * P + counts[i] - 1) * width], width, state.hidden + b.row[i] * width);
  }
};

}  // namespace

#define TREE_STEP(NAME, X)                                                                                  \
  void tree_step_##NAME(const TreeStep* step, const State<X>* state, const Batch* batch, int64_t* tokens,   \
                        int64_t* counts, int threads) {                                                     \
    Stepper<X>(*step, *state, *batch, threads).run(tokens, counts);                                         \
  }

extern "C" {
TREE_STEP(float32, float)
TREE_STEP(bfloat16, bfloat16)
}
