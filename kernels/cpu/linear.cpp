// y = x @ weight.T, for few rows at the speed at which the weight can be read. See linear.py.
//
// The weight lies in panels of 16 outputs, along the inputs, two of them side by side: see `pack` in linear.py. A thread
// takes some panels through, several at once: as many streams of reads, of which a core needs some to read fast. Rows
// that do not fit into the registers pass by in blocks, while the weights that come next are on their way.
// Each output is one sum in the order of the inputs, whatever rows it is computed with.

#include <omp.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "kernels.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// The most rows at once, and in each of several blocks; registers for sums.
#ifdef __AVX512F__
constexpr int MOST_ROWS = 14, BLOCK_ROWS = 8, ACCUMULATORS = 28;
#else
constexpr int MOST_ROWS = 6, BLOCK_ROWS = 6, ACCUMULATORS = 6;
#endif
constexpr int MOST_PANELS = 4;
constexpr long CHUNK = 128;  // inputs of the panels at hand, which all blocks go through before the next ones
constexpr long LINE = 64;    // bytes, as all below
constexpr long AHEAD = 8192, AHEAD_OF_TILE = 1024;  // what is fetched early: of all panels at hand, of each
constexpr long CACHED = 1 << 18;                    // of x, while all panels pass by

constexpr int panels_at_once(int rows) { return std::clamp(ACCUMULATORS / rows, 1, MOST_PANELS); }

// The weights of two inputs, 16 outputs each.
struct Two {
  Part first[PARTS], second[PARTS];
};
template <class W>
INLINE Two load_two(const W* p) {
  Two two;
  for (int i = 0; i < PARTS; i++) {
    two.first[i] = load_part(p + i * LANES);
    two.second[i] = load_part(p + WIDTH + i * LANES);
  }
  return two;
}
INLINE Two load_two(const bfloat16* p) {  // in pairs of inputs, as dot products of the hardware want them
  Two two;
  for (int i = 0; i < PARTS; i++) {
    PartBits pairs = read<PartBits>(p + 2 * i * LANES);
    two.first[i] = (Part)(pairs << 16);
    two.second[i] = (Part)(pairs & 0xffff0000u);
  }
  return two;
}

// While all rows go through P panels at once: fetches what each of them has a little ahead, and at its end what the one
// has that its stream of reads goes on with.
template <class W, int P>
INLINE void fetch_ahead(const W* weight, long D, long d) {
  constexpr long INPUT_BYTES = WIDTH * sizeof(W), PART = AHEAD / P;
  const long ahead = PART + (d < D - PART / INPUT_BYTES ? 0 : (P - 1) * D * INPUT_BYTES);  // GCC splits the loop here
  for (int p = 0; p < P; p++) {
    const char* at = (const char*)(weight + (p * D + d) * WIDTH) + ahead;
    __builtin_prefetch(at);
    if (sizeof(W) == 4) __builtin_prefetch(at + LINE);
  }
}

// While a block of rows goes through a chunk of P panels: fetches a few lines of `next`, the panels' next chunk, which
// is there when SHARE blocks have gone through this one.
template <class W, int P, int SHARE>
INLINE void fetch_next(const W* next, long D, long block, long d) {
  constexpr unsigned PAIRS = SHARE * CHUNK / 2, LINES = P * CHUNK * WIDTH * sizeof(W) / LINE;
  constexpr unsigned COUNT = (LINES + PAIRS - 1) / PAIRS;
  for (unsigned i = 0; i < COUNT; i++) {
    unsigned line = std::min<unsigned>((block * CHUNK + d) / 2 * COUNT + i, LINES - 1);
    __builtin_prefetch((const char*)(next + line % P * D * WIDTH) + line / P * LINE, 0, 2);
  }
}

// Adds the products of M rows, x [inputs, M], and P panels of D inputs to sums [M, P * 16].
template <class W, int SHARE, int M, int P>
void multiply(const W* weight, long D, const float* x, long inputs, const W* next, long block, float* sums) {
  Part acc[M][P][PARTS];
#pragma GCC unroll 28  // or it stays in memory
  for (int m = 0; m < M; m++)
    for (int p = 0; p < P; p++)
      for (int i = 0; i < PARTS; i++) acc[m][p][i] = load_part(sums + (m * P + p) * WIDTH + i * LANES);
  long d = 0;
  do {
    if (SHARE == 1) fetch_ahead<W, P>(weight, D, d);
    if (SHARE > 1) fetch_next<W, P, SHARE>(next, D, block, d);
    Two w[P];
    for (int p = 0; p < P; p++) w[p] = load_two(weight + (p * D + d) * WIDTH);
#pragma GCC unroll 28
    for (int m = 0; m < M; m++)
      for (int p = 0; p < P; p++)
        for (int i = 0; i < PARTS; i++) {
          acc[m][p][i] += x[d * M + m] * w[p].first[i];
          acc[m][p][i] += x[d * M + M + m] * w[p].second[i];
        }
  } while ((d += 2) < inputs);
#pragma GCC unroll 28
  for (int m = 0; m < M; m++)
    for (int p = 0; p < P; p++)
      for (int i = 0; i < PARTS; i++) write(sums + (m * P + p) * WIDTH + i * LANES, acc[m][p][i]);
}

template <class W>
using Multiply = void (*)(const W*, long, const float*, long, const W*, long, float*);
template <class W>
using Instances = std::array<std::array<Multiply<W>, MOST_ROWS>, MOST_PANELS>;

template <class W, int SHARE, int P, size_t... M>
constexpr std::array<Multiply<W>, MOST_ROWS> of_panels(std::index_sequence<M...>) {
  return {multiply<W, SHARE, M + 1, P>...};
}

// By panels and rows, each less one: those whose sums have registers.
template <class W, int SHARE, size_t... P>
constexpr Instances<W> instances(std::index_sequence<P...>) {
  return {of_panels<W, SHARE, P + 1>(std::make_index_sequence<std::min(MOST_ROWS, ACCUMULATORS / int(P + 1))>())...};
}

template <class W>
const Instances<W>& instances(long blocks) {
  constexpr auto panels = std::make_index_sequence<MOST_PANELS>();
  static constexpr Instances<W> one = instances<W, 1>(panels), two = instances<W, 2>(panels),
                                three = instances<W, 3>(panels), six = instances<W, 6>(panels);
  return blocks >= 6 ? six : blocks >= 3 ? three : blocks == 2 ? two : one;
}

// Rows in blocks of about the same size.
struct Blocks {
  long rows, count, most;

  Blocks(long rows, long at_once)
      : rows(rows), count((rows + at_once - 1) / at_once), most((rows + count - 1) / count) {}
  long begin(long block) const { return rows * block / count; }
  long size(long block) const { return begin(block + 1) - begin(block); }
};

template <class X>
struct Product {
  const X* x;             // [T, D]
  const void* weight;     // [E / 16, D / 2, 16, 2] in bfloat16, [E / 16, D / 2, 2, 16] in others; the last panel is padded
  const float *scale, *bias;  // [E] or null
  const X* residual;      // [T, E] or null
  X* y;                   // [T, E]
  long T, D, E;

  // Where `finish` will write rows t to `end` of `count` panels from `first` on.
  void fetch_output(long first, int count, long t, long end) const {
    for (; t < end; t++)
      for (int p = 0; p < count; p++) __builtin_prefetch(y + t * E + (first + p) * WIDTH, 1, 2);
  }

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

// to [D, rows] = x [rows, D]. Writes WIDTH - rows floats beyond the end.
template <class X>
void transpose_rows(const X* x, long rows, long D, float* to) {
  long d = 0;
  for (; rows == 1 && d + WIDTH <= D; d += WIDTH) store(to + d, load(x + d));
  for (; d + WIDTH <= D; d += WIDTH) {
    Vec square[WIDTH] = {};
    for (long row = 0; row < rows; row++) square[row] = load(x + row * D + d);
    transpose(square);
    for (int i = 0; i < WIDTH; i++) store(to + (d + i) * rows, square[i]);  // its end is the next one's begin
  }
  for (; d < D; d++)
    for (long row = 0; row < rows; row++) to[d * rows + row] = as_float(x[row * D + d]);
}

template <class W, class X>
void vectors(const Product<X>& product, const Blocks& blocks, const Instances<W>& multiply_by, int threads) {
  const long T = product.T, D = product.D, chunk = blocks.count == 1 ? D : CHUNK;
  std::unique_ptr<float[]> x(new float[T * D + blocks.count * WIDTH]);  // by blocks, each [D, rows]
#pragma omp parallel for num_threads(threads) if (blocks.count > 1)
  for (long block = 0; block < blocks.count; block++) {
    const long t = blocks.begin(block);
    transpose_rows(product.x + t * D, blocks.size(block), D, &x[t * D + block * WIDTH]);
  }
  share_panels(product.E, threads, [&](long panel, long end) {
    std::vector<float> sums;
    for (int count; panel < end; panel += count) {
      count = std::min<long>(panels_at_once(blocks.most), end - panel);
      sums.assign(T * count * WIDTH, 0);
      const W* weight = (const W*)product.weight + panel * D * WIDTH;
      for (long d = 0; d < D; d += chunk) {
        const W* next = weight + (d + chunk < D ? d + chunk : count * D) * WIDTH;
        for (long block = 0; block < blocks.count; block++) {
          const long t = blocks.begin(block), rows = blocks.size(block);
          const float* block_x = &x[t * D + block * WIDTH + d * rows];
          if (blocks.count > 1 && d + chunk >= D) product.fetch_output(panel, count, t, t + rows);
          multiply_by[count - 1][rows - 1](weight + d * WIDTH, D, block_x, std::min(chunk, D - d), next, block,
                                           &sums[t * count * WIDTH]);
        }
      }
      product.finish(panel, count, sums.data());
    }
  });
}

template <class W, class X>
void vectors(const Product<X>& product, int threads) {
  const Blocks blocks(product.T, product.T <= MOST_ROWS ? MOST_ROWS : BLOCK_ROWS);
  vectors(product, blocks, instances<W>(blocks.count), threads);
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
    const long ahead = AHEAD_OF_TILE + (left > AHEAD_OF_TILE ? 0 : skip);
    _tile_loadd(4, x + d, D * sizeof(bfloat16));
    PANEL(0) PANEL(1) PANEL(2) PANEL(3)
  }
#undef PANEL
  _tile_stored(0, sums, stride);
  if (count > 1) _tile_stored(1, sums + WIDTH, stride);
  if (count > 2) _tile_stored(2, sums + 2 * WIDTH, stride);
  if (count > 3) _tile_stored(3, sums + 3 * WIDTH, stride);
}

// What `multiply_tiles` makes of one row, to the bit, and faster: tiles read more slowly. Of 32 products these add the
// even ones and the odd ones up, and then both to the sum.
template <int P>
void multiply_row(const bfloat16* weight, long D, const float* x, long inputs, const bfloat16*, long, float* sums) {
  for (long begin = 0; begin < inputs; begin += 32) {
    Vec even[P] = {}, odd[P] = {};
    for (long d = begin; d < begin + 32; d += 2) {
      fetch_ahead<bfloat16, P>(weight, D, d);
      for (int p = 0; p < P; p++) {
        Two w = load_two(weight + (p * D + d) * WIDTH);
        even[p] += x[d] * w.first[0];
        odd[p] += x[d + 1] * w.second[0];
      }
    }
    for (int p = 0; p < P; p++) store(sums + p * WIDTH, load(sums + p * WIDTH) + (even[p] + odd[p]));
  }
}

void tiles(const Product<bfloat16>& product, int threads) {
  const long T = product.T, D = product.D;
  const Blocks blocks(T, 16);
  share_panels(product.E, threads, [&](long panel, long end) {
    std::vector<float> sums;
    int configured = 0;
    for (; panel < end; panel += MOST_PANELS) {
      int count = std::min<long>(MOST_PANELS, end - panel);
      sums.resize(T * count * WIDTH);
      for (long i = 0; i < blocks.count; i++) {
        const long t = blocks.begin(i);
        const int rows = blocks.size(i);
        if (rows != configured) configure_tiles(configured = rows);
        multiply_tiles((const bfloat16*)product.weight + panel * D * WIDTH, D * WIDTH, count, product.x + t * D, D,
                       &sums[t * count * WIDTH]);
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
  const long D = whole.D, E = whole.E;
  const Blocks parts(whole.T, std::max<long>(64, CACHED / (D * sizeof(X)) / 16 * 16));
  for (long i = 0; i < parts.count; i++) {
    const long t = parts.begin(i);
    Product<X> part = whole;
    part.T = parts.size(i);
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
              [&](const Product<float>& part) { vectors<float>(part, threads); });
}

void linear_float32_int8(const float* x, const int8_t* weight, const float* scale, const float* bias,
                         const float* residual, float* y, long T, long D, long E, int threads) {
  cached_rows(Product<float>{x, weight, scale, bias, residual, y, T, D, E},
              [&](const Product<float>& part) { vectors<int8_t>(part, threads); });
}

void linear_bfloat16_bfloat16(const bfloat16* x, const bfloat16* weight, const float* scale, const float* bias,
                              const bfloat16* residual, bfloat16* y, long T, long D, long E, int threads) {
  cached_rows(Product<bfloat16>{x, weight, scale, bias, residual, y, T, D, E}, [&](const Product<bfloat16>& part) {
#ifdef __AMX_BF16__
    static constexpr Instances<bfloat16> one_row = {
        {{multiply_row<1>}, {multiply_row<2>}, {multiply_row<3>}, {multiply_row<4>}}};
    if (D % 32 == 0 && matrix_unit_granted())
      return part.T == 1 ? vectors(part, Blocks(1, 1), one_row, threads) : tiles(part, threads);
#endif
    vectors<bfloat16>(part, threads);
  });
}

void linear_bfloat16_int8(const bfloat16* x, const int8_t* weight, const float* scale, const float* bias,
                          const bfloat16* residual, bfloat16* y, long T, long D, long E, int threads) {
  cached_rows(Product<bfloat16>{x, weight, scale, bias, residual, y, T, D, E}, [&](const Product<bfloat16>& part) {
    vectors<int8_t>(part, threads);
  });
}
}
