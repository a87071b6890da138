// Local query expansion on the CPU: the sums of core/query_expansion.h, in the same order, gathered in a dense row
// instead of merged. Without torch, for the sanitizers' sake.
#pragma once

#include <cstdint>
#include <vector>

#include "core/query_expansion.h"
#include "cpu/bit_set.h"

namespace personvit {

class DenseExpansion {
 public:
  DenseExpansion(const QueryExpansion& expand, int64_t columns)
      : expand_(expand), sums_(static_cast<size_t>(columns)), used_(columns) {}

  // Appends the entries of a row, returns their number.
  int64_t operator()(int64_t row, std::vector<int64_t>* indices, std::vector<float>* values) {
    for (int64_t at = 0; at < expand_.count; ++at) {
      const int64_t source = expand_.neighbours[row * expand_.stride + at];
      for (int64_t entry = expand_.rows.indptr[source]; entry < expand_.rows.indptr[source + 1]; ++entry) {
        const int64_t column = expand_.rows.indices[entry];
        sums_[static_cast<size_t>(column)] += expand_.rows.values[entry];
        used_.insert(column);
      }
    }
    const size_t before = indices->size();
    used_.drain([&](int64_t column) {
      float& sum = sums_[static_cast<size_t>(column)];
      indices->push_back(column);
      values->push_back(sum / static_cast<float>(expand_.count));
      sum = 0.0f;
    });
    return static_cast<int64_t>(indices->size() - before);
  }

 private:
  const QueryExpansion& expand_;
  std::vector<float> sums_;  // zero between rows
  BitSet used_;              // empty between rows
};

}  // namespace personvit
