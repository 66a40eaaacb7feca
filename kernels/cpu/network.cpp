// All of a target from its tokens to its final norm in one call, and of a draft head. See network.py.

#include <vector>

#include "kernels.h"

namespace {

// The rows of a table that `index` names, `stride` apart.
template <class X>
void copy_rows(const X* table, const int64_t* index, X* to, long T, long width, long stride) {
  for (long t = 0; t < T; t++) memcpy(to + t * stride, table + (index ? index[t] : t) * width, width * sizeof(X));
}

template <class X>
void network(const Network& net, const Columns& columns, const int64_t* tokens, const int64_t* positions,
             const int64_t* slots, X* kv, long kv_stride, X* features, X* hidden, int threads) {
  using K = Kernels<X>;
  const Layer& any = net.layers[0];
  const long T = columns.first_row(columns.B), width = any.out.E;
  const int64_t *captured = net.captured, *end = captured + net.num_captured;
  static thread_local std::vector<float> rope;
  rope.resize(T * any.D);
  copy_rows(net.rope, positions, rope.data(), T, any.D, any.D);
  copy_rows((const X*)net.embedding, tokens, hidden, T, width, width);
  for (long i = 0; i < net.num_layers; i++) {
    if (captured < end && *captured == i) {
      copy_rows(hidden, nullptr, features + (captured - net.captured) * width, T, width, net.num_captured * width);
      captured++;
    }
    K::decoder_layer(net.layers + i, &columns, hidden, rope.data(), slots, kv + i * kv_stride, hidden, threads);
  }
  K::rms_norm(hidden, (const X*)net.norm, hidden, T, width, 1, any.eps, threads);
}

// y becomes the head's hidden states; fed are those before its rows.
template <class X>
void head(const Head& head, const Columns& columns, const int64_t* tokens, const int64_t* positions,
          const int64_t* slots, X* kv, const X* fed, X* y, int threads) {
  using K = Kernels<X>;
  const Layer& layer = head.layer;
  const long T = columns.first_row(columns.B), width = layer.out.E;
  static thread_local std::vector<float> rope;
  static thread_local std::vector<X> pairs;  // [T, 2, width]: a token's embedding and what is fed, side by side
  rope.resize(T * layer.D);
  pairs.resize(T * 2 * width);
  copy_rows(head.rope, positions, rope.data(), T, layer.D, layer.D);
  X* const token_side = pairs.data() + (head.hidden_first ? width : 0);
  X* const fed_side = pairs.data() + (head.hidden_first ? 0 : width);
  copy_rows((const X*)head.embedding, tokens, token_side, T, width, 2 * width);
  copy_rows(fed, nullptr, fed_side, T, width, 2 * width);
  auto norm = [&](const void* weight, X* row) {
    if (weight) K::rms_norm(row, (const X*)weight, row, 1, width, 1, layer.eps, 1);
  };
  for (long t = 0; t < T; t++) {
    if (head.first_is_blank && positions[t] == 0) memset(token_side + t * 2 * width, 0, width * sizeof(X));
    norm(head.token_norm, token_side + t * 2 * width);
    norm(head.hidden_norm, fed_side + t * 2 * width);
  }
  if (head.projection.weight) {
    multiply(head.projection, pairs.data(), (const X*)nullptr, y, T, threads);
    K::decoder_layer(&layer, &columns, y, rope.data(), slots, kv, y, threads);
  } else {
    for (long t = 0; t < T; t++)
      memcpy(y + t * width, head.normed_residual ? fed_side + t * 2 * width : fed + t * width, width * sizeof(X));
    K::decoder_layer(&layer, &columns, pairs.data(), rope.data(), slots, kv, y, threads);
  }
  if (head.output_norm) K::rms_norm(y, (const X*)head.output_norm, y, T, width, 1, layer.eps, threads);
}

}  // namespace

#define NETWORKS(NAME, X)                                                                                          \
  void network_##NAME(const Network* net, const Columns* columns, const int64_t* tokens, const int64_t* positions, \
                      const int64_t* slots, X* kv, X* features, X* hidden, long kv_stride, int threads) {          \
    network(*net, *columns, tokens, positions, slots, kv, kv_stride, features, hidden, threads);                   \
  }                                                                                                                \
  void head_##NAME(const Head* net, const Columns* columns, const int64_t* tokens, const int64_t* positions,       \
                   const int64_t* slots, X* kv, const X* fed, X* y, int threads) {                                 \
    head(*net, *columns, tokens, positions, slots, kv, fed, y, threads);                                           \
  }

extern "C" {
NETWORKS(float32, float)
NETWORKS(bfloat16, bfloat16)
}
