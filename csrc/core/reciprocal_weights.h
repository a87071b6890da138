// Gaussian weights of the reciprocal sets (Zhong et al. 2017, equation 7): w(i, j) = exp(-O(i, j)), and each row
// divided by its sum. O(i, j) is the distance divided by the largest distance of row i over all points.
#pragma once

#include <cstdint>

#include "core/distance.h"
#include "core/macros.h"
#include "core/portable_exp.h"

namespace personvit {

// A row whose points all coincide has no largest distance to speak of; nothing in it is far.
PERSONVIT_HD inline float normalised_distance(float distance, float largest) {
  return largest > 0.0f ? distance / largest : 0.0f;
}

// The distances of row r's entries. The CPU computes several at a time; this is how the device does.
struct EntryDistances {
  const float* features;   // [N, D]
  const int64_t* indptr;   // [N + 1]
  const int64_t* indices;  // [nnz]
  int64_t width;           // D
  float* values;           // [nnz]

  PERSONVIT_HD void operator()(int64_t row) const {
    for (int64_t at = indptr[row]; at < indptr[row + 1]; ++at) {
      values[at] = squared_distance(features + row * width, features + indices[at] * width, width);
    }
  }
};

// Turns the distances of row r into its weights.
struct ReciprocalWeights {
  const float* largest;   // [N]
  const int64_t* indptr;  // [N + 1]
  float* values;          // [nnz] distances, then weights

  PERSONVIT_HD void operator()(int64_t row) const {
    double sum = 0.0;
    for (int64_t at = indptr[row]; at < indptr[row + 1]; ++at) {
      const float distance = normalised_distance(values[at], largest[row]);
      values[at] = static_cast<float>(portable_exp(-static_cast<double>(distance)));
      sum += values[at];
    }
    for (int64_t at = indptr[row]; at < indptr[row + 1]; ++at) {
      values[at] = values[at] / static_cast<float>(sum);
    }
  }
};

}  // namespace personvit
