// 16 floats at a time, in whatever registers the CPU has: one of AVX-512, two of AVX2, four of SSE.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX__
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
typedef uint16_t PartHalves __attribute__((vector_size(2 * LANES)));

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
INLINE Part load_part(const bfloat16* p) {
  return (Part)(__builtin_convertvector(read<PartHalves>(p), PartBits) << 16);
}
INLINE Part load_part(const int8_t* p) {
#ifdef __AVX512F__
  return (Part)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else  // step by step, or GCC 12 goes element by element
  return __builtin_convertvector(
      __builtin_convertvector(__builtin_convertvector(read<PartBytes>(p), PartShorts), PartInts), Part);
#endif
}

// To the nearest, ties to even: the upper halves.
template <class Bits>
INLINE Bits rounded_bits(Bits bits) {
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE void store(float* p, Vec v) { write(p, v); }
INLINE void store(bfloat16* p, Vec v) { write(p, __builtin_convertvector(rounded_bits((Bits)v), Halves)); }

INLINE void store_part(float* p, Part v) { write(p, v); }
INLINE void store_part(bfloat16* p, Part v) {
  write(p, __builtin_convertvector(rounded_bits((PartBits)v), PartHalves));
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

template <class F>
INLINE Vec by_parts(Vec x, F f) {
  Part parts[PARTS];
  memcpy(parts, &x, sizeof x);
  for (int p = 0; p < PARTS; p++) parts[p] = f(parts[p]);
  return read<Vec>(parts);
}

// e^x to some 2 units in the last place; 0 below -87, and from 88 on as at 88. Of a Vec or a Part.
template <class V>
INLINE V exponential(V x) {
  if constexpr (sizeof(V) > sizeof(Part)) return by_parts(x, exponential<Part>);
  typedef decltype(x > x) Ints;
  const V highest = V{} + 88.0f;
  Ints in_range = x > -87.0f;
  x = x < highest ? x : highest;
  V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer is in the low bits
  V n = shifted - 12582912.0f;
  V r = x - n * 0.693145752f - n * 1.42860677e-6f;
  V p = 1.0f / 5040 * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  V power = (V)(((Ints)shifted << 23) + 0x3f800000);
  return (V)((Ints)(p * power) & in_range);
}

// ln x of normal numbers above 0, to some 2 units in the last place. The polynomial is that of Cephes' logf.
template <class V>
INLINE V logarithm(V x) {
  if constexpr (sizeof(V) > sizeof(Part)) return by_parts(x, logarithm<Part>);
  typedef decltype(x > x) Ints;
  Ints bits = (Ints)x;
  Ints exponent = (bits >> 23) - 126;
  V m = (V)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  Ints is_small = m < 0.707106781f;
  exponent += is_small;  // -1 where it is so
  m = (V)(((Ints)m & ~is_small) | ((Ints)(m + m) & is_small)) - 1.0f;
  V e = __builtin_convertvector(exponent, V), square = m * m;
  V p = 7.0376836292e-2f * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  V y = p * m * square - e * 2.12194440e-4f - square * 0.5f;
  return (m + y) + e * 0.693359375f;
}

#if !defined(__AVX__) || defined(__AVX512F__)

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

#else  // half a row in a register, or GCC 12 goes element by element

// 8 x 8 of a square; `to` may be `from`.
INLINE void transpose_block(const float* from, float* to) {
  __m256 rows[8], pairs[8], fours[8];
  for (int i = 0; i < 8; i++) rows[i] = _mm256_loadu_ps(from + i * WIDTH);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * WIDTH, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * WIDTH, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
}
INLINE void transpose(Vec (&rows)[WIDTH]) {
  float *square = (float*)rows, corner[8 * WIDTH];
  transpose_block(square, square);
  transpose_block(square + 8, corner);
  transpose_block(square + 8 * WIDTH, square + 8);
  for (int i = 0; i < 8; i++) write(square + (8 + i) * WIDTH, read<__m256>(corner + i * WIDTH));
  transpose_block(square + 8 * WIDTH + 8, square + 8 * WIDTH + 8);
}
#endif
