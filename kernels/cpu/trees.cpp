// What grows, builds and checks draft trees. See trees.py.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "best.h"
#include "kernels.h"

namespace {

constexpr long MIN_SHARED = 1 << 16;  // elements from which on threads share the rows
constexpr float LIKELY[] = {-3, -9, NEVER};  // so near to the best is what stays: often, nearly always

INLINE bool any(Ints v) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v);
#else
  int found = 0;
  for (int i = 0; i < WIDTH; i++) found |= v[i];
  return found;
#endif
}

INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

constexpr long BLOCK = 8 * WIDTH;  // columns that are looked at together

// The largest of each lane of a block.
template <class X>
INLINE Vec largest_of_block(const X* row) {
  Vec lanes[4];
  for (int i = 0; i < 4; i++) lanes[i] = larger(load(row + i * WIDTH), load(row + (i + 4) * WIDTH));
  return larger(larger(lanes[0], lanes[1]), larger(lanes[2], lanes[3]));
}

// splitmix64's finalizer. Source: Steele, Lea, Flood 2014.
template <class U>
INLINE U mix(U x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

// Of half as many tokens as a Vec has places: 23 bits each.
typedef uint64_t Longs __attribute__((vector_size(64)));
typedef float HalfVec __attribute__((vector_size(32)));
INLINE HalfVec random_bits(uint64_t stream, Longs tokens) {
  return __builtin_convertvector((mix(tokens + stream) >> 41) & ((1 << 23) - 1), HalfVec);
}

// Standard Gumbel noise of a place: see sampling.pick.gumbel_noise.
INLINE Vec gumbel(uint64_t stream, Longs first, Longs second) {
  HalfVec halves[] = {random_bits(stream, first), random_bits(stream, second)};
  return -logarithm(-logarithm((read<Vec>(halves) + 0.5f) * 0x1p-23f));
}

// Noise lies between -2.82 and 16.64: what is so far below the best cannot win.
constexpr float HOPELESS = -19.6;

// The noise of a place in a request's text, and how logits go together with it.
struct Noise {
  uint64_t stream;
  float shift, divisor, scale, lowest;

  Noise(int64_t seed, int64_t position, float shift, float divisor, float scale, float lowest)
      : stream(mix(mix((uint64_t)seed) + position)), shift(shift), divisor(divisor), scale(scale), lowest(lowest) {}

  // (logits - shift) / divisor + noise * scale; -inf where the first term is not above `lowest`, or that plus noise.
  // tokens: null if a row is the whole vocabulary.
  template <class X>
  const float* add_to(const X* row, const int64_t* tokens, long W, std::vector<float>& room) const {
    const long whole = W / WIDTH * WIDTH, rest = W - whole;
    room.resize(whole + WIDTH);
    const Longs lane = {0, 1, 2, 3, 4, 5, 6, 7};
    for (long w = 0; w < whole; w += WIDTH) {
      if (tokens)
        store(&room[w], noisy(load(row + w), read<Longs>(tokens + w), read<Longs>(tokens + w + WIDTH / 2)));
      else
        store(&room[w], noisy(load(row + w), lane + w, lane + w + WIDTH / 2));
    }
    X logits[WIDTH] = {};
    int64_t ids[WIDTH] = {};
    for (long i = 0; i < rest; i++) logits[i] = row[whole + i], ids[i] = tokens ? tokens[whole + i] : whole + i;
    store(&room[whole], noisy(load(logits), read<Longs>(ids), read<Longs>(ids + WIDTH / 2)));
    return room.data();
  }

 private:
  Vec noisy(Vec logits, Longs first, Longs second) const {
    const Vec scaled = (logits - shift) / divisor;
    return any(scaled > lowest) ? scaled + gumbel(stream, first, second) * scale : Vec{} + NEVER;
  }
};

template <class X>
long first_best(const X* row, long V) {
  const long whole = V / BLOCK * BLOCK;
  float best = NEVER;
  long block = 0;  // the first that has it
  for (long v = 0; v < whole; v += BLOCK) {
    Vec lanes = largest_of_block(row + v);
    if (!any(lanes > best)) continue;
    for (int i = 0; i < WIDTH; i++) best = std::max(best, lanes[i]);
    block = v;
  }
  const long end = std::min(block + BLOCK, whole);
  long found = block;
  while (found < end && as_float(row[found]) != best) found++;
  if (found == end) found = 0;  // there is no whole block, or none of its values is a number
  for (long v = whole; v < V; v++)
    if (as_float(row[v]) > best) best = as_float(row[found = v]);
  return found;
}

// The smallest of values that top_k and top_p jointly let stay: fewer than top_k, and less than top_p of the sum of
// their exponentials, are above it. The best is 0, and there are whole Vecs of them.
float threshold(const std::vector<float>& values, int64_t top_k, double top_p) {
  double total = 0;
  for (size_t v = 0; v < values.size(); v += BLOCK) {
    Vec sums = {};  // of few: there may be a hundred thousand
    for (size_t i = v; i < std::min(v + BLOCK, values.size()); i += WIDTH) sums += exponential(load(&values[i]));
    total += sum(sums);
  }
  static thread_local std::vector<float> best;
  for (float lowest : LIKELY) {
    best.clear();
    for (size_t v = 0; v < values.size(); v += WIDTH)
      if (any(load(&values[v]) > lowest))
        for (int i = 0; i < WIDTH; i++)
          if (values[v + i] > lowest) best.push_back(values[v + i]);
    double mass = 0;
    for (size_t first = 0, chunk = 64; first < best.size(); first += chunk, chunk *= 4) {
      const size_t end = std::min(first + chunk, best.size());
      if (end < best.size()) std::nth_element(best.begin() + first, best.begin() + end, best.end(), std::greater<>());
      std::sort(best.begin() + first, best.begin() + end, std::greater<>());
      for (size_t i = first; i < end; i++) {
        if (i && ((int64_t)i >= top_k || mass >= top_p * total)) return best[i - 1];  // which i may equal
        mass += std::exp(best[i]);
      }
    }
  }
  return best.back();
}

// Forbids what a request's limits leave out of a row.
template <class X>
void limit_row(X* row, float temperature, int64_t top_k, double top_p, float log_min_p, long V) {
  const float highest = as_float(row[first_best(row, V)]);
  if (!std::isfinite(highest)) return;
  static thread_local std::vector<float> scaled;
  const long whole = V / WIDTH * WIDTH;
  scaled.resize(whole + WIDTH);
  for (long v = 0; v < whole; v += WIDTH) store(&scaled[v], (load(row + v) - highest) / temperature);
  for (long v = whole; v < whole + WIDTH; v++) scaled[v] = v < V ? (as_float(row[v]) - highest) / temperature : NEVER;
  float lowest = log_min_p;
  if (top_k < V || top_p < 1) lowest = std::max(lowest, threshold(scaled, top_k, top_p));
  const Vec never = Vec{} + NEVER;
  for (long v = 0; v < whole; v += WIDTH) store(row + v, load(&scaled[v]) < lowest ? never : load(row + v));
  X nevers[WIDTH];
  store(nevers, never);
  for (long v = whole; v < V; v++)
    if (scaled[v] < lowest) row[v] = nevers[0];
}

template <class X>
void limit(X* logits, const float* temperatures, const Limits& of, long B, long N, long V, int threads) {
#pragma omp parallel for num_threads(threads) if (B * N * V > MIN_SHARED)
  for (long r = 0; r < B * N; r++) {
    const long b = r / N;
    const bool has_limits = of.top_k[b] < V || of.top_p[b] < 1 || of.log_min_p[b] > NEVER;
    if (has_limits && temperatures[b])
      limit_row(logits + r * V, temperatures[b], of.top_k[b], of.top_p[b], of.log_min_p[b], V);
  }
}

// N places of each of B requests; the noise is of the tokens that are picked there, `ahead` of the positions.
template <class X>
void pick(const X* logits, const float* temperatures, const int64_t* seeds, const int64_t* positions, long ahead,
          int64_t* index, long B, long N, long V, int threads) {
#pragma omp parallel for num_threads(threads) if (B * N * V > MIN_SHARED)
  for (long r = 0; r < B * N; r++) {
    const X* row = logits + r * V;
    index[r] = first_best(row, V);
    const float temperature = temperatures ? temperatures[r / N] : 0;
    if (!temperature) continue;
    static thread_local std::vector<float> room;
    const Noise noise(seeds[r / N], positions[r] + ahead, as_float(row[index[r]]), temperature, 1, HOPELESS);
    index[r] = first_best(noise.add_to(row, nullptr, V, room), V);
  }
}

// log_softmax(row * scale) of the k best.
template <class X>
void best_of(const X* row, const int64_t* tokens, float scale, long W, long k, float* logprob, int64_t* token) {
  const long whole = W / WIDTH * WIDTH, blocks = W / BLOCK * BLOCK;
  Best best{logprob, token, k};
  for (long w = 0; w < blocks; w += BLOCK) {
    if (best.count == k && !any(largest_of_block(row + w) > best.value[k - 1])) continue;
    for (long v = w; v < w + BLOCK; v += WIDTH)
      if (best.count < k || any(load(row + v) > best.value[k - 1]))
        for (long i = v; i < v + WIDTH; i++) best.show(as_float(row[i]), i);
  }
  for (long w = blocks; w < W; w++) best.show(as_float(row[w]), w);
  const float highest = best.value[0];
  Vec sums = {};
  for (long w = 0; w < whole; w += WIDTH) sums += exponential((load(row + w) - highest) * scale);
  float total = sum(sums);
  for (long w = whole; w < W; w++) total += std::exp((as_float(row[w]) - highest) * scale);
  for (long j = 0; j < k; j++) {
    float& v = best.value[j];
    v = v == NEVER ? NEVER : (v - highest) * scale - std::log(total);
    best.index[j] = tokens[best.index[j]];
  }
}

template <class X>
void topk_logprob(const X* logits, const int64_t* tokens, const float* temperatures, const int64_t* seeds,
                  const int64_t* positions, float lowest, float* logprob, int64_t* token, long B, long N, long W,
                  long k, long stride, int threads) {
#pragma omp parallel for num_threads(threads) if (B * N * W > MIN_SHARED)
  for (long r = 0; r < B * N; r++) {
    const X* row = logits + r * stride;
    const float temperature = temperatures ? temperatures[r / N] : 0;
    if (!temperature) {
      best_of(row, tokens, 1 / lowest, W, k, logprob + r * k, token + r * k);
      continue;
    }
    static thread_local std::vector<float> room;
    const float divisor = std::max(temperature, lowest);
    const Noise noise(seeds[r / N], positions[r], 0, divisor, temperature / divisor, NEVER);
    best_of(noise.add_to(row, tokens, W, room), tokens, 1, W, k, logprob + r * k, token + r * k);
  }
}

}  // namespace

extern "C" {

#define OF_ROWS(NAME, X)                                                                                           \
  void limit_##NAME(X* logits, const float* temperatures, const Limits* limits, long B, long N, long V, int threads) { \
    limit(logits, temperatures, *limits, B, N, V, threads);                                                        \
  }                                                                                                                \
  void pick_##NAME(const X* logits, const float* temperatures, const int64_t* seeds, const int64_t* positions,     \
                   long ahead, int64_t* index, long B, long N, long V, int threads) {                              \
    pick(logits, temperatures, seeds, positions, ahead, index, B, N, V, threads);                                  \
  }                                                                                                                \
  void topk_logprob_##NAME(const X* logits, const int64_t* tokens, const float* temperatures,                      \
                           const int64_t* seeds, const int64_t* positions, float lowest, float* logprob,           \
                           int64_t* token, long B, long N, long W, long k, long stride, int threads) {             \
    topk_logprob(logits, tokens, temperatures, seeds, positions, lowest, logprob, token, B, N, W, k, stride,       \
                 threads);                                                                                         \
  }

OF_ROWS(float32, float)
OF_ROWS(bfloat16, bfloat16)

void permute_windows(int64_t* table, const int64_t* row, const int64_t* first, const int64_t* slot,
                     const int64_t* order, long stride, long B, long N) {
  for (long b = 0; b < B; b++)
    for (long n = 0; n < N; n++) table[row[b] * stride + first[b] + n] = slot[b * N + order[b * N + n]];
}

// N nodes of each tree; mask [B, N, N] is of zeros.
void build_tree(const int64_t* root, const float* scores, const int64_t* tokens, const int64_t* parents,
                const int64_t* num_nodes, int64_t* token, int64_t* parent, bool* mask, int64_t* depth, bool* drafted,
                long B, long C, long N) {
  std::vector<int64_t> rank(C), kept(N - 1), place(C);
  for (long b = 0; b < B; b++, scores += C, tokens += C, parents += C) {
    std::iota(rank.begin(), rank.end(), 0);
    std::partial_sort(rank.begin(), rank.begin() + (N - 1), rank.end(), [&](int64_t one, int64_t other) {
      return scores[one] > scores[other] || (scores[one] == scores[other] && one < other);
    });
    std::copy_n(rank.begin(), N - 1, kept.begin());
    std::sort(kept.begin(), kept.end());
    for (long n = 1; n < N; n++) place[kept[n - 1]] = n;
    for (long n = 0; n < N; n++) drafted[b * N + n] = n == 0;
    for (long n = 1; n < std::min<long>(N, num_nodes[b]); n++) {
      const int64_t candidate = rank[n - 1];
      drafted[b * N + place[candidate]] = scores[candidate] > NEVER;
    }
    for (long n = 0; n < N; n++) {
      const int64_t candidate = n ? kept[n - 1] : -1;
      const int64_t above = n == 0 || parents[candidate] < 0 ? 0 : place[parents[candidate]];
      const long at = b * N + n;
      token[at] = n ? tokens[candidate] : root[b];
      parent[at] = above;
      depth[at] = n ? depth[b * N + above] + 1 : 0;
      if (n) memcpy(mask + at * N, mask + (b * N + above) * N, N);
      mask[at * N + n] = true;
    }
  }
}

void accept_path(const int64_t* token, const int64_t* parent, const bool* drafted, const int64_t* pick, int64_t* order,
                 int64_t* count, long B, long N) {
  std::vector<char> accepted(N);
  for (long b = 0; b < B; b++, token += N, parent += N, drafted += N, pick += N, order += N) {
    for (long n = 0; n < N; n++)
      accepted[n] = n == 0 || (accepted[parent[n]] && drafted[n] && token[n] == pick[parent[n]]);
    long next = 0;
    for (long n = 0; n < N; n++)
      if (accepted[n]) order[next++] = n;
    count[b] = next;
    for (long n = 0; n < N; n++)
      if (!accepted[n]) order[next++] = n;
  }
}
}
