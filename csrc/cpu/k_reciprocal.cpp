#include "core/k_reciprocal.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "core/query_expansion.h"
#include "cpu/entry_distances.h"
#include "cpu/expand_rows.h"
#include "cpu/sparse_chunks.h"

namespace personvit {
namespace {

PERSONVIT_FLAT_CLONES
void expand_set(const ExpandedSets& expand, int64_t row, int64_t* mutual, BitSet* set) { expand(row, mutual, set); }

std::tuple<Tensor, Tensor> k_reciprocal_cpu(const Tensor& neighbours_, int64_t k1) {
  check_neighbours(neighbours_, "k_reciprocal");
  STD_TORCH_CHECK(k1 >= 1, "k_reciprocal: k1=", k1, " must be 1 or more");
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  const int64_t rows = neighbours.size(0);
  const NeighbourLists lists{neighbours.const_data_ptr<int64_t>(), neighbours.size(1)};
  check_indices(lists.neighbours, rows * lists.stride, rows, "k_reciprocal: neighbours");
  const int64_t width = std::min(k1 + 1, lists.stride), half_width = std::min(half_neighbours(k1) + 1, width);
  std::vector<int64_t> half_sets(static_cast<size_t>(rows * half_width));
  const HalfReciprocal half{lists, half_width, half_sets.data()};
  parallel_rows(rows, 256, half);
  const ExpandedSets expand{lists, width, half_sets.data(), half_width};
  auto [indptr, indices, none] = make_sparse(
      neighbours, rows, false, [rows] { return BitSet(rows); },
      [&](BitSet* set, SparseChunk* chunk, int64_t begin, int64_t end) {
        std::vector<int64_t> mutual(static_cast<size_t>(width));
        for (int64_t row = begin; row < end; ++row) {
          const size_t before = chunk->indices.size();
          expand_set(expand, row, mutual.data(), set);
          set->drain([chunk](int64_t member) { chunk->indices.push_back(member); });
          chunk->sizes.push_back(static_cast<int64_t>(chunk->indices.size() - before));
        }
      });
  return {indptr, indices};
}

Tensor reciprocal_weights_cpu(const Tensor& features_, const Tensor& row_max_, const Tensor& indptr_,
                              const Tensor& indices_) {
  check_weights(features_, row_max_, indptr_, indices_);
  const Tensor features = torch::stable::contiguous(features_), row_max = torch::stable::contiguous(row_max_);
  const Tensor indptr = torch::stable::contiguous(indptr_), indices = torch::stable::contiguous(indices_);
  const int64_t rows = features.size(0);
  check_sparse(indptr.const_data_ptr<int64_t>(), indices.const_data_ptr<int64_t>(), rows, indices.size(0), rows,
               "reciprocal_weights");
  Tensor values = torch::stable::new_empty(features, {indices.size(0)}, ScalarType::Float);
  const EntryDistances entries{features.const_data_ptr<float>(), indptr.const_data_ptr<int64_t>(),
                               indices.const_data_ptr<int64_t>(), features.size(1), values.mutable_data_ptr<float>()};
  const ReciprocalWeights weigh{row_max.const_data_ptr<float>(), entries.indptr, entries.values};
  parallel_rows(rows, 64, [&](int64_t row) {
    entry_distances(entries, row);
    weigh(row);
  });
  return values;
}

std::tuple<Tensor, Tensor, Tensor> query_expansion_cpu(const Tensor& indptr_, const Tensor& indices_,
                                                       const Tensor& values_, const Tensor& neighbours_, int64_t k2) {
  check_sparse_tensors(indptr_, indices_, values_, "query_expansion");
  check_neighbours(neighbours_, "query_expansion");
  STD_TORCH_CHECK(k2 >= 1, "query_expansion: k2=", k2, " must be 1 or more");
  const Tensor indptr = torch::stable::contiguous(indptr_), indices = torch::stable::contiguous(indices_);
  const Tensor values = torch::stable::contiguous(values_), neighbours = torch::stable::contiguous(neighbours_);
  const int64_t rows = neighbours.size(0);
  const SparseRows matrix{indptr.const_data_ptr<int64_t>(), indices.const_data_ptr<int64_t>(),
                          values.const_data_ptr<float>()};
  STD_TORCH_CHECK(indptr.size(0) == rows + 1, "query_expansion: ", rows, " neighbour lists, but indptr has ",
                  indptr.size(0), " entries");
  check_sparse(matrix.indptr, matrix.indices, rows, indices.size(0), rows, "query_expansion");
  const QueryExpansion expand{matrix, neighbours.const_data_ptr<int64_t>(), neighbours.size(1),
                              std::min(k2, neighbours.size(1))};
  check_indices(expand.neighbours, rows * expand.stride, rows, "query_expansion: neighbours");
  return make_sparse(
      values, rows, true, [&expand, rows] { return DenseExpansion(expand, rows); },
      [](DenseExpansion* gather, SparseChunk* chunk, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          chunk->sizes.push_back((*gather)(row, &chunk->indices, &chunk->values));
        }
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CPU, library) {
  library.impl("k_reciprocal", TORCH_BOX(&k_reciprocal_cpu));
  library.impl("reciprocal_weights", TORCH_BOX(&reciprocal_weights_cpu));
  library.impl("query_expansion", TORCH_BOX(&query_expansion_cpu));
}

}  // namespace personvit
