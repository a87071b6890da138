// Squared euclidean distance in float32, as the sum of squared differences.
//
// |q|^2 + |g|^2 - 2<q, g> would be one matrix product, but for unit vectors its error is a constant 1e-7 or so however
// small the distance is: duplicates get distances that are not zero, may be negative, and depend on the blocking of the
// product. Differences are exact for near neighbours and give ties exactly where ties are. They cost one subtraction
// and one fused multiply-add for each feature, and they are symmetric in every bit, so that a set against itself needs
// half of them.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace personvit {

// The order of the sum, the same everywhere: 32 consecutive features one after the other, then these partial sums one
// after the other. Against one running sum over D features it divides the rounding error by about min(32, D / 32).
constexpr int64_t kSumBlock = 32;

// sum + x * x with a single rounding, asked for by name: IEEE 754 defines it, so every processor agrees.
PERSONVIT_HD inline float add_square(float sum, float x) { return fmaf(x, x, sum); }

PERSONVIT_HD inline float squared_distance(const float* a, const float* b, int64_t features) {
  float total = 0.0f;
  for (int64_t start = 0; start < features; start += kSumBlock) {
    const int64_t stop = start + kSumBlock < features ? start + kSumBlock : features;
    float partial = 0.0f;
    for (int64_t d = start; d < stop; ++d) {
      partial = add_square(partial, a[d] - b[d]);
    }
    total += partial;
  }
  return total;
}

// Where a search takes the distance of a query and a gallery row from: computed on the spot, or a matrix.
struct FeatureDistances {
  const float* query;    // [Q, D]
  const float* gallery;  // [G, D]
  int64_t features;

  PERSONVIT_HD float operator()(int64_t row, int64_t index) const {
    return squared_distance(query + row * features, gallery + index * features, features);
  }
};

struct DistanceMatrix {
  const float* distances;  // [Q, G]
  int64_t columns;

  PERSONVIT_HD float operator()(int64_t row, int64_t index) const { return distances[row * columns + index]; }
};

}  // namespace personvit
