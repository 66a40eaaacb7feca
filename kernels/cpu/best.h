#pragma once

#include <cmath>
#include <cstdint>

constexpr float NEVER = -INFINITY;  // the logarithm of a probability

// The k best of what it is shown, in falling order; of equals the first.
struct Best {
  float* value;
  int64_t* index;
  long k, count = 0;

  bool takes(float v) const { return count < k || v > value[k - 1]; }
  void show(float v, int64_t i) {
    if (!takes(v)) return;
    long place = count < k ? count++ : k - 1;
    for (; place > 0 && v > value[place - 1]; place--) {
      value[place] = value[place - 1];
      index[place] = index[place - 1];
    }
    value[place] = v;
    index[place] = i;
  }
};
