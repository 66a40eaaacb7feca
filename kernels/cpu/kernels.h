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

// A target, a draft head, and how trees grow with it: as in network.py and growth.py.
struct Network {
  const Layer* layers;
  const void *embedding, *norm;
  const float* rope;        // [positions, D]
  const int64_t* captured;  // the layers whose inputs are features, in rising order
  long num_layers, num_captured;
};

struct Head {
  Layer layer;
  Linear projection;                                               // its weight may be null, as may all norms
  const void *embedding, *token_norm, *hidden_norm, *output_norm;
  const float* rope;  // [positions, D]
  long hidden_first, normed_residual, first_is_blank;
};

struct Growth {
  Head head;
  Linear lm_head;
  const void* logits_norm;  // or null
  const int64_t* tokens;    // the target's, which the LM head's outputs stand for
  float lowest;             // temperature of a forecast
  long K, W;                // nodes of a level, drafted rows of all levels
};

// Of B requests; null if none has any. See trees.py.
struct Limits {
  const int64_t* top_k;
  const double* top_p;
  const float* log_min_p;
};

// What is drafted for, B requests. Without temperatures all are greedy.
struct Requests {
  const int64_t *prefix, *prefix_len, *scratch, *length, *topk, *num_steps, *seed;
  const float* temperature;  // or null
  Limits limits;
  long B, L, most_steps;
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
  void head_##NAME(const Head* head, const Columns* columns, const int64_t* tokens, const int64_t* positions,     \
                   const int64_t* slots, X* kv, const X* fed, X* y, int threads);                                 \
  void network_##NAME(const Network* net, const Columns* columns, const int64_t* tokens, const int64_t* positions, \
                      const int64_t* slots, X* kv, X* features, X* hidden, long kv_stride, int threads);          \
  void grow_##NAME(const Growth* growth, const Requests* requests, const X* last, X* kv, float* score,            \
                   int64_t* token, int64_t* parent, int threads);                                                 \
  void limit_##NAME(X* logits, const float* temperatures, const Limits* limits, long B, long N, long V, int threads); \
  void pick_##NAME(const X* logits, const float* temperatures, const int64_t* seeds, const int64_t* positions,    \
                   long ahead, int64_t* index, long B, long N, long V, int threads);                              \
  void topk_logprob_##NAME(const X* logits, const int64_t* tokens, const float* temperatures,                     \
                           const int64_t* seeds, const int64_t* positions, float lowest, float* logprob,          \
                           int64_t* token, long B, long N, long W, long k, long stride, int threads);             \
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
    static constexpr auto head = head_##NAME;                                                                     \
    static constexpr auto network = network_##NAME;                                                               \
    static constexpr auto grow = grow_##NAME;                                                                     \
    static constexpr auto limit = limit_##NAME;                                                                   \
    static constexpr auto pick = pick_##NAME;                                                                     \
    static constexpr auto topk_logprob = topk_logprob_##NAME;                                                     \
  };

KERNELS(float32, float)
KERNELS(bfloat16, bfloat16)
#undef KERNELS

extern "C" {
void build_tree(const int64_t* root, const float* scores, const int64_t* tokens, const int64_t* parents,
                const int64_t* num_nodes, int64_t* token, int64_t* parent, bool* mask, int64_t* depth, bool* drafted,
                long B, long C, long N);
void accept_path(const int64_t* token, const int64_t* parent, const bool* drafted, const int64_t* pick, int64_t* order,
                 int64_t* count, long B, long N);
void permute_windows(int64_t* table, const int64_t* row, const int64_t* first, const int64_t* slot,
                     const int64_t* order, long stride, long B, long N);
}

template <class X>
INLINE void multiply(const Linear& by, const X* x, const X* residual, X* y, long T, int threads) {
  if (by.scale)
    Kernels<X>::linear_int8(x, (const int8_t*)by.weight, by.scale, by.bias, residual, y, T, by.D, by.E, threads);
  else
    Kernels<X>::linear(x, (const X*)by.weight, nullptr, by.bias, residual, y, T, by.D, by.E, threads);
}
