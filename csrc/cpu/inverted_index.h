// Building the inverted index on the CPU. Without torch, for the sanitizers' sake.
#pragma once

#include <cstdint>
#include <vector>

#include "core/jaccard.h"

namespace personvit {

// The columns of rows begin to end of a sparse matrix with `columns` columns; row `begin` is gallery row 0.
class InvertedColumns {
 public:
  InvertedColumns(const SparseRows& matrix, int64_t begin, int64_t end, int64_t columns)
      : offsets_(static_cast<size_t>(columns + 1)),
        rows_(static_cast<size_t>(matrix.indptr[end] - matrix.indptr[begin])),
        values_(rows_.size()) {
    for (int64_t at = matrix.indptr[begin]; at < matrix.indptr[end]; ++at) {
      ++offsets_[static_cast<size_t>(matrix.indices[at] + 1)];
    }
    for (size_t column = 0; column < static_cast<size_t>(columns); ++column) {
      offsets_[column + 1] += offsets_[column];
    }
    std::vector<int64_t> cursors(offsets_.begin(), offsets_.end() - 1);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t at = matrix.indptr[row]; at < matrix.indptr[row + 1]; ++at) {
        const auto entry = static_cast<size_t>(cursors[static_cast<size_t>(matrix.indices[at])]++);
        rows_[entry] = static_cast<int32_t>(row - begin);
        values_[entry] = matrix.values[at];
      }
    }
  }

  InvertedIndex view() const { return {offsets_.data(), rows_.data(), values_.data()}; }

 private:
  std::vector<int64_t> offsets_;
  std::vector<int32_t> rows_;
  std::vector<float> values_;
};

}  // namespace personvit
