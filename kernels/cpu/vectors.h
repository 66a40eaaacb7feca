// 16 floats at a time, in whatever registers the CPU has: one of AVX-512, two of AVX2, four of SSE.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

constexpr int WIDTH = 16;

typedef float Vec __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bfloat16 {
  uint16_t bits;
};

// What one register holds of a Vec. Where that is a part, a Vec lives in memory: too slow for the innermost loops.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PARTS = WIDTH / LANES;
typedef float Part __attribute__((vector_size(4 * LANES)));
typedef uint32_t PartBits __attribute__((vector_size(4 * LANES)));
typedef int32_t PartInts __attribute__((vector_size(4 * LANES)));
typedef int16_t PartShorts __attribute__((vector_size(2 * LANES)));
typedef int8_t PartBytes __attribute__((vector_size(LANES)));

template <class V>
INLINE V read(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// By memcpy GCC 12 leaves the registers for the stack first, half of each at a time.
template <class V>
INLINE void write(void* p, V v) {
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  *(Unaligned*)p = v;
}

INLINE Vec load(const float* p) { return read<Vec>(p); }
INLINE Vec load(const bfloat16* p) { return (Vec)(__builtin_convertvector(read<Halves>(p), Bits) << 16); }

INLINE Part load_part(const float* p) { return read<Part>(p); }
INLINE Part load_part(const int8_t* p) {
#ifdef __AVX512F__
  return (Part)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else  // step by step, or GCC 12 goes element by element
  return __builtin_convertvector(
      __builtin_convertvector(__builtin_convertvector(read<PartBytes>(p), PartShorts), PartInts), Part);
#endif
}

INLINE void store(float* p, Vec v) { write(p, v); }
INLINE void store(bfloat16* p, Vec v) {  // to the nearest, ties to even
  Bits bits = (Bits)v;
  Halves rounded = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
  write(p, rounded);
}

INLINE float as_float(float x) { return x; }
INLINE float as_float(bfloat16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  return read<float>(&bits);
}

INLINE float sum(Vec v) {
  typedef float V8 __attribute__((vector_size(32)));
  typedef float V4 __attribute__((vector_size(16)));
  V8 a = read<V8>(&v) + read<V8>((const char*)&v + 32);
  V4 b = read<V4>(&a) + read<V4>((const char*)&a + 16);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// e^x to some 2 units in the last place; 0 below -87, and from 88 on as at 88.
INLINE Vec exponential(Vec x) {
  const Vec highest = Vec{} + 88.0f;
  Ints in_range = x > -87.0f;
  x = x < highest ? x : highest;
  Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer is in the low bits
  Vec n = shifted - 12582912.0f;
  Vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
  Vec p = 1.0f / 5040 * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Vec power = (Vec)(((Ints)shifted << 23) + 0x3f800000);
  return (Vec)((Ints)(p * power) & in_range);
}

// ln x of normal numbers above 0, to some 2 units in the last place. The polynomial is that of Cephes' logf.
INLINE Vec logarithm(Vec x) {
  Ints bits = (Ints)x;
  Ints exponent = (bits >> 23) - 126;
  Vec m = (Vec)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  Ints is_small = m < 0.707106781f;
  exponent += is_small;  // -1 where it is so
  m = (Vec)(((Ints)m & ~is_small) | ((Ints)(m + m) & is_small)) - 1.0f;
  Vec e = __builtin_convertvector(exponent, Vec), square = m * m;
  Vec p = 7.0376836292e-2f * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  Vec y = p * m * square - e * 2.12194440e-4f - square * 0.5f;
  return (m + y) + e * 0.693359375f;
}

// Swaps off-diagonal blocks of S x S; after 1, 2, 4 and 8 a square of 16 x 16 is transposed.
template <int S>
INLINE void swap_blocks(Vec (&rows)[WIDTH]) {
  Ints upper, lower;
  for (int i = 0; i < WIDTH; i++) {
    upper[i] = i & S ? WIDTH + i - S : i;
    lower[i] = i & S ? WIDTH + i : i + S;
  }
  for (int i = 0; i < WIDTH; i++) {
    if (i & S) continue;
    Vec a = rows[i], b = rows[i + S];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + S] = __builtin_shuffle(a, b, lower);
  }
}
INLINE void transpose(Vec (&rows)[WIDTH]) {
  swap_blocks<1>(rows);
  swap_blocks<2>(rows);
  swap_blocks<4>(rows);
  swap_blocks<8>(rows);
}
