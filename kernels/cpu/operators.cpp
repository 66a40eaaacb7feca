// What stands between the products of a layer. See operators.py.

#include <omp.h>

#include <cmath>

#include "vectors.h"

namespace {

constexpr long MIN_SHARED = 1 << 16;  // elements from which on threads share the rows

// y = x / rms(x) * weight; row t has weight row t % num_weights. As Hugging Face rounds: before the weight, and after.
template <class X>
void rms_norm(const X* all_x, const X* weight, X* all_y, long T, long D, long num_weights, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (T * D > MIN_SHARED)
  for (long t = 0; t < T; t++) {
    const X *x = all_x + t * D, *w = weight + t % num_weights * D;
    X* y = all_y + t * D;
    Vec squares = {};
    long d = 0;
    for (; d + WIDTH <= D; d += WIDTH) squares += load(x + d) * load(x + d);
    float total = sum(squares);
    for (long i = d; i < D; i++) total += as_float(x[i]) * as_float(x[i]);
    const float inverse = 1 / std::sqrt(total / D + eps);
    for (d = 0; d < D; d += WIDTH) {
      const long there = D - d < WIDTH ? D - d : WIDTH;
      X in[WIDTH], normed[WIDTH], out[WIDTH], by[WIDTH];
      memcpy(in, x + d, there * sizeof(X));
      memcpy(by, w + d, there * sizeof(X));
      store(normed, load(in) * inverse);
      store(out, load(normed) * load(by));
      memcpy(y + d, out, there * sizeof(X));
    }
  }
}

// Rotates the pairs (2i, 2i + 1) of a head by the complex numbers of its row.
template <class X>
INLINE void rotate(const X* head, const float* rope, X* out, long D) {
  for (long d = 0; d < D; d += 2) {
    float a = as_float(head[d]), b = as_float(head[d + 1]), c = rope[d], s = rope[d + 1];
    X pair[WIDTH];
    store(pair, Vec{a * c - b * s, a * s + b * c});
    memcpy(out + d, pair, 2 * sizeof(X));
  }
}
INLINE void rotate(const float* head, const float* rope, float* out, long D) {
  for (long d = 0; d < D; d += 2) {
    float a = head[d], b = head[d + 1], c = rope[d], s = rope[d + 1];
    out[d] = a * c - b * s;
    out[d + 1] = a * s + b * c;
  }
}

template <class X>
void rope_kv_write(X* qkv, const float* ropes, const int64_t* slots, X* kv, long T, long H, long G, long D,
                   int threads) {
#pragma omp parallel for num_threads(threads) if (T * H * D > MIN_SHARED)
  for (long t = 0; t < T; t++) {
    const float* rope = ropes + t * D;
    X* row = qkv + t * (H + 2 * G) * D;
    X* slot = kv + slots[t] * 2 * G * D;
    for (long h = 0; h < H; h++) rotate(row + h * D, rope, row + h * D, D);
    for (long g = 0; g < G; g++) rotate(row + (H + g) * D, rope, slot + g * D, D);
    memcpy(slot + G * D, row + (H + G) * D, G * D * sizeof(X));
  }
}

// silu(gate) * up, where a row is both side by side. silu is rounded, as it is where it is an operator of its own.
template <class X>
void silu_mul(const X* all_gate_up, X* all_y, long T, long I, int threads) {
#pragma omp parallel for num_threads(threads) if (T * I > MIN_SHARED)
  for (long t = 0; t < T; t++) {
    const X* gate_up = all_gate_up + t * 2 * I;
    X* y = all_y + t * I;
    for (long i = 0; i < I; i += WIDTH) {
      const long there = I - i < WIDTH ? I - i : WIDTH;
      X gate[WIDTH] = {}, up[WIDTH] = {}, out[WIDTH];
      memcpy(gate, gate_up + i, there * sizeof(X));
      memcpy(up, gate_up + I + i, there * sizeof(X));
      Vec g = load(gate);
      store(out, g / (1.0f + exponential(-g)));
      store(out, load(out) * load(up));
      memcpy(y + i, out, there * sizeof(X));
    }
  }
}

}  // namespace

#define OPERATORS(NAME, X)                                                                                     \
  void rms_norm_##NAME(const X* x, const X* weight, X* y, long T, long D, long num_weights, float eps,         \
                       int threads) {                                                                          \
    rms_norm(x, weight, y, T, D, num_weights, eps, threads);                                                   \
  }                                                                                                            \
  void rope_kv_write_##NAME(X* qkv, const float* rope, const int64_t* slots, X* kv, long T, long H, long G, long D, \
                            int threads) {                                                                     \
    rope_kv_write(qkv, rope, slots, kv, T, H, G, D, threads);                                                  \
  }                                                                                                            \
  void silu_mul_##NAME(const X* gate_up, X* y, long T, long I, int threads) { silu_mul(gate_up, y, T, I, threads); }

extern "C" {
OPERATORS(float32, float)
OPERATORS(bfloat16, bfloat16)
}
