// y = x @ weight.T, for few rows at the speed at which the weight can be read. See linear.py.
//
// The weight lies in panels of 16 outputs, along the inputs, two of them side by side; see `pack` in linear.py. A thread
// takes some panels through, several at once: as many streams of reads, of which a core needs some to read fast.
// Each output is one sum in the order of the inputs, whatever rows it is computed with.

#include <omp.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "kernels.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int MOST_ROWS = 8, ACCUMULATORS = 24;
#else
constexpr int MOST_ROWS = 6, ACCUMULATORS = 6;
#endif
constexpr int MOST_PANELS = 4;
constexpr long CACHED_INPUTS = 1024;  // of the panels at hand, which all rows go through before the next inputs
constexpr long PREFETCH_BYTES = 1024;  // ahead in a panel; at its end, in the one that its stream of reads goes on with
constexpr long CACHED_BYTES = 1 << 20;  // of x, while all panels pass by

constexpr int panels_at_once(int rows) { return std::clamp(ACCUMULATORS / rows, 1, MOST_PANELS); }

// The weights of two inputs, 16 outputs each.
struct Two {
  Vec first, second;
};
template <class W>
INLINE Two load_two(const W* p) {
  return {load(p), load(p + WIDTH)};
}
INLINE Two load_two(const bfloat16* p) {  // in pairs of inputs, as dot products of the hardware want them
  Bits pairs = read<Bits>(p);
  return {(Vec)(pairs << 16), (Vec)(pairs & 0xffff0000u)};
}

// Adds the products of `inputs` inputs to sums [M, P * 16], of which a row of more sums is `stride` long.
template <class W, int M, int P>
void multiply(const W* weight, long panel_size, const float* x, long D, long inputs, float* sums, long stride) {
  constexpr long INPUT_BYTES = WIDTH * sizeof(W);
  const long last = inputs - PREFETCH_BYTES / INPUT_BYTES;  // GCC splits the loop here, which is faster; in tiles slower
  const long skip = (P - 1) * panel_size * long(sizeof(W));
  Vec acc[M][P];
  for (int m = 0; m < M; m++)
    for (int p = 0; p < P; p++) acc[m][p] = load(sums + m * stride + p * WIDTH);
  for (long d = 0; d < inputs; d += 2) {
    const long ahead = PREFETCH_BYTES + (d < last ? 0 : skip);
    Two w[P];
    for (int p = 0; p < P; p++) {
      const W* at = weight + p * panel_size + d * WIDTH;
      __builtin_prefetch((const char*)at + ahead);
      if (sizeof(W) == 4) __builtin_prefetch((const char*)at + ahead + 64);
      w[p] = load_two(at);
    }
    for (int m = 0; m < M; m++)
      for (int p = 0; p < P; p++) {
        acc[m][p] += x[m * D + d] * w[p].first;
        acc[m][p] += x[m * D + d + 1] * w[p].second;
      }
  }
  for (int m = 0; m < M; m++)
    for (int p = 0; p < P; p++) store(sums + m * stride + p * WIDTH, acc[m][p]);
}

template <class W>
using Multiply = void (*)(const W*, long, const float*, long, long, float*, long);

template <class W, int P, size_t... M>
constexpr std::array<Multiply<W>, MOST_ROWS> of_panels(std::index_sequence<M...>) {
  return {multiply<W, M + 1, P>...};
}

// By panels and rows, each less one.
template <class W, size_t... P>
constexpr std::array<std::array<Multiply<W>, MOST_ROWS>, MOST_PANELS> instances(std::index_sequence<P...>) {
  return {of_panels<W, P + 1>(std::make_index_sequence<MOST_ROWS>())...};
}

template <class X>
struct Product {
  const X* x;             // [T, D]
  const void* weight;     // [E / 16, D / 2, 16, 2] in bfloat16, [E / 16, D / 2, 2, 16] in others; the last panel is padded
  const float *scale, *bias;  // [E] or null
  const X* residual;      // [T, E] or null
  X* y;                   // [T, E]
  long T, D, E;

  // Of `count` panels from `first` on; sums [T, count * 16].
  void finish(long first, int count, const float* sums) const {
    for (long t = 0; t < T; t++)
      for (int p = 0; p < count; p++) {
        long e = (first + p) * WIDTH, there = std::min<long>(WIDTH, E - e);
        const float* sum = sums + (t * count + p) * WIDTH;
        if (there == WIDTH) {
          Vec v = load(sum);
          if (scale) v *= load(scale + e);
          if (bias) v += load(bias + e);
          if (residual) v += load(residual + t * E + e);
          store(y + t * E + e, v);
          continue;
        }
        X last[WIDTH];
        Vec v = load(sum);
        for (int i = 0; i < there; i++) {
          if (scale) v[i] *= scale[e + i];
          if (bias) v[i] += bias[e + i];
          if (residual) v[i] += as_float(residual[t * E + e + i]);
        }
        store(last, v);
        memcpy(y + t * E + e, last, there * sizeof(X));
      }
  }
};

// Calls work(first, last) in each thread with its part of the panels.
template <class Work>
void share_panels(long E, int threads, Work work) {
  long panels = (E + WIDTH - 1) / WIDTH;
#pragma omp parallel num_threads(threads)
  {
    long id = omp_get_thread_num(), count = omp_get_num_threads();
    work(panels * id / count, panels * (id + 1) / count);
  }
}

template <class W, class X>
void vectors(const Product<X>& product, const float* x, int threads) {
  constexpr auto multiply_by = instances<W>(std::make_index_sequence<MOST_PANELS>());
  const long T = product.T, D = product.D;
  const long blocks = (T + MOST_ROWS - 1) / MOST_ROWS, most = (T + blocks - 1) / blocks;  // rows of a block
  const long inputs = blocks == 1 ? D : CACHED_INPUTS;
  share_panels(product.E, threads, [&](long panel, long end) {
    std::vector<float> sums;
    for (int count; panel < end; panel += count) {
      count = std::min<long>(panels_at_once(most), end - panel);
      sums.assign(T * count * WIDTH, 0);
      const W* weight = (const W*)product.weight + panel * D * WIDTH;
      for (long d = 0; d < D; d += inputs)
        for (long block = 0, t = 0; block < blocks; block++) {
          const long rows = T * (block + 1) / blocks - t;
          multiply_by[count - 1][rows - 1](weight + d * WIDTH, D * WIDTH, x + t * D + d, D, std::min(inputs, D - d),
                                           &sums[t * count * WIDTH], count * WIDTH);
          t += rows;
        }
      product.finish(panel, count, sums.data());
    }
  });
}

std::vector<float> floats(const bfloat16* x, long count) {
  std::vector<float> found(count);
  for (long i = 0; i < count; i++) found[i] = as_float(x[i]);
  return found;
}

#ifdef __AMX_BF16__

bool matrix_unit_granted() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
  return granted;
}

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles: 0 to 3 are sums of four panels, 4 is rows of x, 5 is weights.
void configure_tiles(int rows) {
  TileConfig config;
  for (int tile = 0; tile < 6; tile++) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = tile == 5 ? 16 : rows;
  }
  _tile_loadconfig(&config);
}

INLINE void prefetch_tile(const bfloat16* weight, long ahead) {
  for (int line = 0; line < 16; line++) __builtin_prefetch((const char*)weight + ahead + 64 * line);
}

// 16 rows at most, of `count` panels.
void multiply_tiles(const bfloat16* weight, long panel_size, int count, const bfloat16* x, long D, float* sums) {
  constexpr long INPUT_BYTES = WIDTH * sizeof(bfloat16);
  const long panel_bytes = D * INPUT_BYTES, skip = (count - 1) * panel_bytes;
  const long stride = count * WIDTH * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#define PANEL(p)                                       \
  if (count > p) {                                     \
    const bfloat16* at = weight + p * panel_size + d * WIDTH; \
    prefetch_tile(at, ahead);                          \
    _tile_loadd(5, at, 64);                            \
    _tile_dpbf16ps(p, 4, 5);                           \
  }
  for (long d = 0; d < D; d += 32) {
    const long left = panel_bytes - d * INPUT_BYTES;
    const long ahead = PREFETCH_BYTES + (left > PREFETCH_BYTES ? 0 : skip);
    _tile_loadd(4, x + d, D * sizeof(bfloat16));
    PANEL(0) PANEL(1) PANEL(2) PANEL(3)
  }
#undef PANEL
  _tile_stored(0, sums, stride);
  if (count > 1) _tile_stored(1, sums + WIDTH, stride);
  if (count > 2) _tile_stored(2, sums + 2 * WIDTH, stride);
  if (count > 3) _tile_stored(3, sums + 3 * WIDTH, stride);
}

void tiles(const Product<bfloat16>& product, int threads) {
  const long T = product.T, D = product.D, blocks = (T + 15) / 16;
  share_panels(product.E, threads, [&](long panel, long end) {
    std::vector<float> sums;
    int configured = 0;
    for (; panel < end; panel += MOST_PANELS) {
      int count = std::min<long>(MOST_PANELS, end - panel);
      sums.resize(T * count * WIDTH);
      for (long block = 0, t = 0; block < blocks; block++) {
        int rows = T * (block + 1) / blocks - t;
        if (rows != configured) configure_tiles(configured = rows);
        multiply_tiles((const bfloat16*)product.weight + panel * D * WIDTH, D * WIDTH, count, product.x + t * D, D,
                       &sums[t * count * WIDTH]);
        t += rows;
      }
      product.finish(panel, count, sums.data());
    }
    if (configured) _tile_release();
  });
}

#endif

// Calls run with one part of the rows after the other: as many as stay in a core's own cache.
template <class X, class Run>
void cached_rows(const Product<X>& whole, Run run) {
  const long D = whole.D, E = whole.E, at_once = std::max<long>(64, CACHED_BYTES / (D * sizeof(X)) / 16 * 16);
  for (long t = 0; t < whole.T; t += at_once) {
    Product<X> part = whole;
    part.T = std::min(at_once, whole.T - t);
    part.x += t * D;
    part.y += t * E;
    if (part.residual) part.residual += t * E;
    run(part);
  }
}

}  // namespace

extern "C" {

// x in float32 or bfloat16, which y and residual are in too; weight in the second dtype named.

void linear_float32_float32(const float* x, const float* weight, const float* scale, const float* bias,
                            const float* residual, float* y, long T, long D, long E, int threads) {
  cached_rows(Product<float>{x, weight, scale, bias, residual, y, T, D, E},
              [&](const Product<float>& part) { vectors<float>(part, part.x, threads); });
}

void linear_float32_int8(const float* x, const int8_t* weight, const float* scale, const float* bias,
                         const float* residual, float* y, long T, long D, long E, int threads) {
  cached_rows(Product<float>{x, weight, scale, bias, residual, y, T, D, E},
              [&](const Product<float>& part) { vectors<int8_t>(part, part.x, threads); });
}

void linear_bfloat16_bfloat16(const bfloat16* x, const bfloat16* weight, const float* scale, const float* bias,
                              const bfloat16* residual, bfloat16* y, long T, long D, long E, int threads) {
  cached_rows(Product<bfloat16>{x, weight, scale, bias, residual, y, T, D, E}, [&](const Product<bfloat16>& part) {
#ifdef __AMX_BF16__
    if (D % 32 == 0 && matrix_unit_granted()) return tiles(part, threads);
#endif
    vectors<bfloat16>(part, floats(part.x, part.T * D).data(), threads);
  });
}

void linear_bfloat16_int8(const bfloat16* x, const int8_t* weight, const float* scale, const float* bias,
                          const bfloat16* residual, bfloat16* y, long T, long D, long E, int threads) {
  cached_rows(Product<bfloat16>{x, weight, scale, bias, residual, y, T, D, E}, [&](const Product<bfloat16>& part) {
    vectors<int8_t>(part, floats(part.x, part.T * D).data(), threads);
  });
}
}
