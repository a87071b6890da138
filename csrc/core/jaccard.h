// Jaccard distance of weighted reciprocal sets (Zhong et al. 2017, equation 10) over an inverted index. Rows sum to 1,
// so with t = sum of the minima the sum of the maxima is 2 - t.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/reciprocal_weights.h"
#include "core/sparse_rows.h"

namespace personvit {

// Column c of the gallery's rows: entries offsets[c] to offsets[c + 1], each gallery row at most once.
struct InvertedIndex {
  const int64_t* offsets;  // [N + 1]
  const int32_t* rows;     // [nnz of the gallery]
  const float* values;     // [nnz of the gallery]
};

struct NoBarrier {
  PERSONVIT_HD void operator()() const {}
};

// Adds min(V[q, c], V[g, c]) to overlap[g], columns ascending: whoever takes which gallery rows of a column, the sum of
// each gallery row has one order. The barrier keeps lanes that share a query in the same column.
template <typename Barrier>
PERSONVIT_HD void add_overlap(const SparseRows& queries, const InvertedIndex& index, int64_t query, float* overlap,
                              int64_t lane, int64_t lanes, const Barrier& barrier) {
  for (int64_t at = queries.indptr[query]; at < queries.indptr[query + 1]; ++at) {
    const int64_t column = queries.indices[at];
    const float weight = queries.values[at];
    for (int64_t entry = index.offsets[column] + lane; entry < index.offsets[column + 1]; entry += lanes) {
      const float other = index.values[entry];
      overlap[index.rows[entry]] += other < weight ? other : weight;
    }
    barrier();
  }
}

// 1 - t / (2 - t). Rounding may take t a little above 1, the most that two equal rows reach.
PERSONVIT_HD inline float jaccard_distance(float overlap) {
  const float t = overlap < 1.0f ? overlap : 1.0f;
  return 1.0f - t / (2.0f - t);
}

// The final distance: the Jaccard distance mixed with the normalised original one.
struct Blend {
  float jaccard_share;  // 1 - lambda
  float original_share;

  PERSONVIT_HD float operator()(float overlap, float distance, float largest) const {
    return jaccard_distance(overlap) * jaccard_share + normalised_distance(distance, largest) * original_share;
  }
};

inline Blend make_blend(double lambda_value) {
  return {static_cast<float>(1.0 - lambda_value), static_cast<float>(lambda_value)};
}

}  // namespace personvit
