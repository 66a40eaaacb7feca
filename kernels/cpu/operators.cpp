// What stands between the products of a layer. See operators.py.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels.h"

namespace {

constexpr long MIN_SHARED = 1 << 16;  // elements from which on threads share the rows

// A register's elements, or the `there` that are left.
template <class X>
INLINE Part load_some(const X* p, long there) {
  if (there >= LANES) return load_part(p);
  X part[LANES] = {};
  memcpy(part, p, std::max(there, 0l) * sizeof(X));
  return load_part(part);
}
template <class X>
INLINE void store_some(X* p, Part v, long there) {
  if (there >= LANES) return store_part(p, v);
  X part[LANES];
  store_part(part, v);
  memcpy(p, part, there * sizeof(X));
}

template <class X>
INLINE Part rounded(Part v) {
  if constexpr (std::is_same_v<X, float>) return v;
  X stored[LANES];
  store_part(stored, v);
  return load_part(stored);
}

// y = x / rms(x) * weight; row t has weight row t % num_weights. As Hugging Face rounds: before the weight, and after.
template <class X>
void rms_norm(const X* all_x, const X* weight, X* all_y, long T, long D, long num_weights, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (T * D > MIN_SHARED)
  for (long t = 0; t < T; t++) {
    const X *x = all_x + t * D, *w = weight + t % num_weights * D;
    X* y = all_y + t * D;
    Part squares[PARTS] = {};
    for (long d = 0; d < D; d += WIDTH)
      for (int p = 0; p < PARTS; p++) {
        Part v = load_some(x + d + p * LANES, D - d - p * LANES);
        squares[p] += v * v;
      }
    const float inverse = 1 / std::sqrt(sum(read<Vec>(squares)) / D + eps);
    for (long d = 0; d < D; d += LANES)
      store_some(y + d, rounded<X>(load_some(x + d, D - d) * inverse) * load_some(w + d, D - d), D - d);
  }
}

// Rotates the pairs (2i, 2i + 1) of a head by the complex numbers of its row.
template <class X>
INLINE void rotate(const X* head, const float* rope, X* out, long D) {
  PartInts even, odd, swapped;
  Part sign;
  for (int i = 0; i < LANES; i++) even[i] = i & ~1, odd[i] = i | 1, swapped[i] = i ^ 1, sign[i] = i & 1 ? 1 : -1;
  for (long d = 0; d < D; d += LANES) {
    Part v = load_some(head + d, D - d), turn = load_some(rope + d, D - d);
    Part real = __builtin_shuffle(turn, even), imaginary = __builtin_shuffle(turn, odd);
    store_some(out + d, v * real + __builtin_shuffle(v, swapped) * imaginary * sign, D - d);
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
    for (long i = 0; i < I; i += LANES) {
      Part gate = load_some(gate_up + i, I - i), up = load_some(gate_up + I + i, I - i);
      store_some(y + i, rounded<X>(gate / (1.0f + exponential(-gate))) * up, I - i);
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
