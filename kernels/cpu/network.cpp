// All of a target from its tokens to its final norm in one call. See network.py.

#include <vector>

#include "kernels.h"

namespace {

struct Network {
  const Layer* layers;
  const void *embedding, *norm;
  const float* rope;        // [positions, D]
  const int64_t* captured;  // the layers whose inputs are features, in rising order
  long num_layers, num_captured;
};

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

}  // namespace

#define NETWORK(NAME, X)                                                                                          \
  void network_##NAME(const Network* net, const Columns* columns, const int64_t* tokens, const int64_t* positions, \
                      const int64_t* slots, X* kv, X* features, X* hidden, long kv_stride, int threads) {         \
    network(*net, *columns, tokens, positions, slots, kv, kv_stride, features, hidden, threads);                  \
  }

extern "C" {
NETWORK(float32, float)
NETWORK(bfloat16, bfloat16)
}
