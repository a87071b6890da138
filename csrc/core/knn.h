// k nearest neighbours in two passes: every (query, slice of the gallery) keeps its own k nearest and its largest
// distance, then the slices of a query are merged. The order of pairs is total, so the result does not depend on the
// number of slices.
#pragma once

#include <cstdint>

#include "core/distance.h"
#include "core/macros.h"
#include "core/top_k.h"

namespace personvit {

// Not a number is never the largest.
PERSONVIT_HD inline float larger(float largest, float distance) { return distance > largest ? distance : largest; }

// Row number r is slice r / queries of query r % queries: neighbouring threads read the same gallery rows.
template <typename Source>
struct KnnSlices {
  Source source;
  float* distances;  // [slices, Q, k], nearest first
  int64_t* indices;  // [slices, Q, k], -1 where a slice has fewer than k rows
  float* largest;    // [slices, Q]
  int64_t queries;
  int64_t gallery_rows;
  int64_t k;
  int64_t slice_rows;

  PERSONVIT_HD void operator()(int64_t row) const {
    const int64_t begin = row / queries * slice_rows;
    const int64_t end = begin + slice_rows < gallery_rows ? begin + slice_rows : gallery_rows;
    TopK nearest(distances + row * k, indices + row * k, k);
    float farthest = 0.0f;
    for (int64_t index = begin; index < end; ++index) {
      const float distance = source(row % queries, index);
      farthest = larger(farthest, distance);
      nearest.offer(distance, index);
    }
    nearest.sort();
    for (int64_t at = end > begin ? end - begin : 0; at < k; ++at) {
      indices[row * k + at] = -1;
    }
    largest[row] = farthest;
  }
};

struct KnnMerge {
  const float* slice_distances;  // [slices, Q, k]
  const int64_t* slice_indices;  // [slices, Q, k]
  const float* slice_largest;    // [slices, Q]
  float* distances;              // [Q, k]
  int64_t* indices;              // [Q, k]
  float* largest;                // [Q]
  int64_t queries;
  int64_t k;
  int64_t slices;

  PERSONVIT_HD void operator()(int64_t row) const {
    TopK nearest(distances + row * k, indices + row * k, k);
    float farthest = 0.0f;
    for (int64_t slice = 0; slice < slices; ++slice) {
      farthest = larger(farthest, slice_largest[slice * queries + row]);
      const int64_t offset = (slice * queries + row) * k;
      for (int64_t at = 0; at < k; ++at) {
        const int64_t index = slice_indices[offset + at];
        if (index < 0 || !nearest.would_keep(slice_distances[offset + at], index)) {
          break;  // a slice is sorted: nothing after this one is nearer
        }
        nearest.offer(slice_distances[offset + at], index);
      }
    }
    nearest.sort();
    largest[row] = farthest;
  }
};

}  // namespace personvit
