// The k smallest of a stream of (distance, index) pairs, ties by the lower index. NaN comes after infinity.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace personvit {

// Orders squared distances as unsigned integers: for non-negative floats the bit patterns are ordered as the values
// are, and any NaN becomes the largest pattern.
PERSONVIT_HD inline uint32_t distance_order(float distance) {
  if (distance != distance) {
    return 0xFFFFFFFFu;
  }
  uint32_t bits;
  memcpy(&bits, &distance, sizeof(bits));
  return bits;
}

PERSONVIT_HD inline bool comes_before(float distance_a, int64_t index_a, float distance_b, int64_t index_b) {
  const uint32_t a = distance_order(distance_a);
  const uint32_t b = distance_order(distance_b);
  return a < b || (a == b && index_a < index_b);
}

// A binary heap with the last of the kept pairs on top, in memory of the caller (two arrays of `capacity`). The order
// is total, so the result does not depend on the order of arrival.
class TopK {
 public:
  // The first `size` entries are a heap already, as an earlier TopK left it.
  PERSONVIT_HD TopK(float* distances, int64_t* indices, int64_t capacity, int64_t size = 0)
      : distances_(distances), indices_(indices), capacity_(capacity), size_(size) {}

  PERSONVIT_HD bool would_keep(float distance, int64_t index) const {
    return size_ < capacity_ || comes_before(distance, index, distances_[0], indices_[0]);
  }

  PERSONVIT_HD bool full() const { return size_ == capacity_; }

  // The distance of the last of the kept pairs, before sorting.
  PERSONVIT_HD float last() const { return distances_[0]; }

  PERSONVIT_HD void offer(float distance, int64_t index) {
    if (size_ < capacity_) {
      rise(distance, index);
    } else if (comes_before(distance, index, distances_[0], indices_[0])) {
      sink(distance, index, size_);
    }
  }

  // Sorts the arrays in place, nearest first. The heap is used up.
  PERSONVIT_HD void sort() {
    for (int64_t last = size_ - 1; last > 0; --last) {
      const float distance = distances_[last];
      const int64_t index = indices_[last];
      distances_[last] = distances_[0];
      indices_[last] = indices_[0];
      sink(distance, index, last);
    }
  }

 private:
  PERSONVIT_HD void put(int64_t at, float distance, int64_t index) {
    distances_[at] = distance;
    indices_[at] = index;
  }

  PERSONVIT_HD void rise(float distance, int64_t index) {
    int64_t at = size_++;
    while (at > 0) {
      const int64_t parent = (at - 1) / 2;
      if (!comes_before(distances_[parent], indices_[parent], distance, index)) {
        break;
      }
      put(at, distances_[parent], indices_[parent]);
      at = parent;
    }
    put(at, distance, index);
  }

  // Places a pair in the heap of the first `size` entries whose top is free.
  PERSONVIT_HD void sink(float distance, int64_t index, int64_t size) {
    int64_t at = 0;
    for (int64_t child = 1; child < size; child = 2 * at + 1) {
      if (child + 1 < size &&
          comes_before(distances_[child], indices_[child], distances_[child + 1], indices_[child + 1])) {
        ++child;
      }
      if (!comes_before(distance, index, distances_[child], indices_[child])) {
        break;
      }
      put(at, distances_[child], indices_[child]);
      at = child;
    }
    put(at, distance, index);
  }

  float* distances_;
  int64_t* indices_;
  int64_t capacity_;
  int64_t size_;
};

// The `capacity` smallest of a row of distances, sorted.
PERSONVIT_HD inline void select_nearest(const float* row, int64_t size, int64_t capacity, float* distances,
                                        int64_t* indices) {
  TopK nearest(distances, indices, capacity);
  for (int64_t index = 0; index < size; ++index) {
    if (!nearest.full() || !(row[index] > nearest.last())) {
      nearest.offer(row[index], index);
    }
  }
  nearest.sort();
}

}  // namespace personvit
