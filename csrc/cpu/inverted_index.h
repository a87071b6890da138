// Building the inverted index on the CPU. Without torch, for the sanitizers' sake.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/jaccard.h"

namespace personvit {

// The columns of rows begin to end of a sparse matrix; row `begin` is gallery row 0. offsets [columns + 1]; rows and
// values [entries of these rows].
inline void invert_columns(const SparseRows& matrix, int64_t begin, int64_t end, int64_t columns, int64_t* offsets,
                           int32_t* rows, float* values) {
  std::fill(offsets, offsets + columns + 1, 0);
  for (int64_t at = matrix.indptr[begin]; at < matrix.indptr[end]; ++at) {
    ++offsets[matrix.indices[at] + 1];
  }
  for (int64_t column = 0; column < columns; ++column) {
    offsets[column + 1] += offsets[column];
  }
  std::vector<int64_t> cursors(offsets, offsets + columns);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t at = matrix.indptr[row]; at < matrix.indptr[row + 1]; ++at) {
      const int64_t entry = cursors[static_cast<size_t>(matrix.indices[at])]++;
      rows[entry] = static_cast<int32_t>(row - begin);
      values[entry] = matrix.values[at];
    }
  }
}

}  // namespace personvit
