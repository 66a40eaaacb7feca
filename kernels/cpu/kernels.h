// The kernels that others call, by the dtype of their rows. Each is explained where it is defined.
#pragma once

#include "vectors.h"

// What the rows of a forward attend to. As in ForwardBatch; see attention.py.
struct Columns {
  const int64_t *prefix, *prefix_len, *window;
  const bool* mask;
  const int64_t* first;  // row of each sequence, and their number in all; null: each has Q
  long B, Q, L, W;       // L columns of prefix slots, W of window slots

  long first_row(long b) const { return first ? first[b] : b * Q; }
};

// One product; the weight is int8 if it has scales.
struct Linear {
  const void* weight;
  const float *scale, *bias;  // or null
  long D, E;
};

struct Layer {
  Linear qkv, out, gate_up, down;
  const void *input_norm, *head_norm, *post_attention_norm;  // the first two or null
  float eps;
  long H, G, D;
};

template <class X>
struct Kernels;

#define KERNELS(NAME, X)                                                                                          \
  extern "C" {                                                                                                    \
  void linear_##NAME##_##NAME(const X* x, const X* weight, const float* scale, const float* bias, const X* residual, \
                              X* y, long T, long D, long E, int threads);                                         \
  void linear_##NAME##_int8(const X* x, const int8_t* weight, const float* scale, const float* bias,              \
                            const X* residual, X* y, long T, long D, long E, int threads);                        \
  void rms_norm_##NAME(const X* x, const X* weight, X* y, long T, long D, long num_weights, float eps, int threads); \
  void rope_kv_write_##NAME(X* qkv, const float* rope, const int64_t* slots, X* kv, long T, long H, long G, long D, \
                            int threads);                                                                         \
  void silu_mul_##NAME(const X* gate_up, X* y, long T, long I, int threads);                                      \
  void attention_##NAME(const X* q, const X* kv, const Columns* columns, X* y, long H, long G, long D,            \
                        long q_stride, int threads);                                                              \
  void decoder_layer_##NAME(const Layer* layer, const Columns* columns, const X* x, const float* rope,            \
                            const int64_t* slots, X* kv, X* y, int threads);                                      \
  }                                                                                                               \
  template <>                                                                                                     \
  struct Kernels<X> {                                                                                             \
    static constexpr auto linear = linear_##NAME##_##NAME;                                                        \
    static constexpr auto linear_int8 = linear_##NAME##_int8;                                                     \
    static constexpr auto rms_norm = rms_norm_##NAME;                                                             \
    static constexpr auto rope_kv_write = rope_kv_write_##NAME;                                                   \
    static constexpr auto silu_mul = silu_mul_##NAME;                                                             \
    static constexpr auto attention = attention_##NAME;                                                           \
    static constexpr auto decoder_layer = decoder_layer_##NAME;                                                   \
  };

KERNELS(float32, float)
KERNELS(bfloat16, bfloat16)
#undef KERNELS
