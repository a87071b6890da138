// Local query expansion (Zhong et al. 2017, section 3.5): a row becomes the mean of its nearest rows, itself included.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/sparse_rows.h"

namespace personvit {

struct QueryExpansion {
  SparseRows rows;
  const int64_t* neighbours;  // [N, stride]
  int64_t stride;
  int64_t count;  // k2, cut to the length of the lists

  // Room that the mean of a row may need.
  PERSONVIT_HD int64_t capacity(int64_t row) const {
    int64_t total = 0;
    for (int64_t at = 0; at < count; ++at) {
      const int64_t other = neighbours[row * stride + at];
      total += rows.indptr[other + 1] - rows.indptr[other];
    }
    return total;
  }

  // Merges the rows, columns ascending; equal columns are added up in the order of the neighbours. cursors [count] is
  // scratch; indices and values may be null, to count only. Returns the number of entries.
  PERSONVIT_HD int64_t operator()(int64_t row, int64_t* cursors, int64_t* indices, float* values) const {
    const int64_t* sources = neighbours + row * stride;
    int64_t column = INT64_MAX;
    for (int64_t at = 0; at < count; ++at) {
      cursors[at] = rows.indptr[sources[at]];
      column = lower(column, cursors[at], rows.indptr[sources[at] + 1]);
    }
    int64_t size = 0;
    while (column != INT64_MAX) {
      float sum = 0.0f;
      int64_t next = INT64_MAX;
      for (int64_t at = 0; at < count; ++at) {
        const int64_t end = rows.indptr[sources[at] + 1];
        if (cursors[at] < end && rows.indices[cursors[at]] == column) {
          sum += rows.values[cursors[at]];
          ++cursors[at];
        }
        next = lower(next, cursors[at], end);
      }
      if (indices != nullptr) {
        indices[size] = column;
        values[size] = sum / static_cast<float>(count);
      }
      ++size;
      column = next;
    }
    return size;
  }

 private:
  PERSONVIT_HD int64_t lower(int64_t column, int64_t cursor, int64_t end) const {
    return cursor < end && rows.indices[cursor] < column ? rows.indices[cursor] : column;
  }
};

// Two passes, as those of core/k_reciprocal.h.
struct ExpansionSizes {
  QueryExpansion expand;
  int64_t* cursors;  // [passed rows, k2]
  int64_t first;
  int64_t* sizes;  // [passed rows]

  PERSONVIT_HD void operator()(int64_t row) const {
    sizes[row] = expand(first + row, cursors + row * expand.count, nullptr, nullptr);
  }
};

struct ExpansionEntries {
  QueryExpansion expand;
  int64_t* cursors;       // [passed rows, k2]
  const int64_t* indptr;  // [N + 1]
  int64_t first;
  int64_t* indices;  // [nnz]
  float* values;     // [nnz]

  PERSONVIT_HD void operator()(int64_t row) const {
    const int64_t start = indptr[first + row];
    expand(first + row, cursors + row * expand.count, indices + start, values + start);
  }
};

}  // namespace personvit
