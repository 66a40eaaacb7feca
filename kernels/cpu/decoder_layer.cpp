// A decoder layer in one call: the kernels of a layer one after the other, in scratch that stays. See network.py.

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace {

constexpr long MLP_ROWS = 256;  // at once: of a prompt's, what is between its products would fill much memory

// y, which holds the residual, becomes what the layer makes of x and it. x may be y.
template <class X>
void decoder_layer(const Layer& layer, const Columns& columns, const X* x, const float* rope, const int64_t* slots,
                   X* kv, X* y, int threads) {
  using K = Kernels<X>;
  const long T = columns.first_row(columns.B), width = layer.out.E, heads = layer.H + layer.G;
  const long attended = layer.out.D, inner = layer.down.D, at_once = std::min(T, MLP_ROWS);
  static thread_local std::vector<X> scratch;
  const size_t needed = T * (layer.qkv.D + layer.qkv.E + attended) + at_once * 3 * inner;
  if (scratch.size() < needed) scratch.resize(needed);
  X* const normed = scratch.data();  // x for the attention, then for the MLP: qkv.D is `width` or more
  X* const qkv = normed + T * layer.qkv.D;
  X* const values = qkv + T * layer.qkv.E;
  X* const gate_up = values + T * attended;
  X* const gated = gate_up + at_once * 2 * inner;

  if (layer.input_norm) {
    K::rms_norm(x, (const X*)layer.input_norm, normed, T, width, 1, layer.eps, threads);
    x = normed;
  }
  multiply(layer.qkv, x, (const X*)nullptr, qkv, T, threads);
  if (layer.head_norm) {
#pragma omp parallel for num_threads(threads)
    for (long t = 0; t < T; t++) {
      X* row = qkv + t * layer.qkv.E;
      K::rms_norm(row, (const X*)layer.head_norm, row, heads, layer.D, heads, layer.eps, 1);
    }
  }
  K::rope_kv_write(qkv, rope, slots, kv, T, layer.H, layer.G, layer.D, threads);
  K::attention(qkv, kv, &columns, values, layer.H, layer.G, layer.D, layer.qkv.E, threads);
  multiply(layer.out, values, y, y, T, threads);
  for (long t = 0; t < T; t += MLP_ROWS) {
    const long rows = std::min(MLP_ROWS, T - t);
    X* const part = y + t * width;
    K::rms_norm(part, (const X*)layer.post_attention_norm, normed, rows, width, 1, layer.eps, threads);
    multiply(layer.gate_up, normed, (const X*)nullptr, gate_up, rows, threads);
    K::silu_mul(gate_up, gated, rows, inner, threads);
    multiply(layer.down, gated, part, part, rows, threads);
  }
}

}  // namespace

#define DECODER_LAYER(NAME, X)                                                                               \
  void decoder_layer_##NAME(const Layer* layer, const Columns* columns, const X* x, const float* rope,       \
                            const int64_t* slots, X* kv, X* y, int threads) {                                \
    decoder_layer(*layer, *columns, x, rope, slots, kv, y, threads);                                         \
  }

extern "C" {
DECODER_LAYER(float32, float)
DECODER_LAYER(bfloat16, bfloat16)
}
