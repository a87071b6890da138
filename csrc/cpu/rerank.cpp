#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "core/jaccard.h"
#include "core/top_k.h"
#include "cpu/inverted_index.h"
#include "cpu/parallel.h"

namespace personvit {
namespace {

std::tuple<Tensor, Tensor, Tensor> inverted_index_cpu(const Tensor& indptr_, const Tensor& indices_,
                                                      const Tensor& values_, int64_t num_query) {
  check_sparse_tensors(indptr_, indices_, values_, "inverted_index");
  const Tensor indptr = torch::stable::contiguous(indptr_), indices = torch::stable::contiguous(indices_);
  const Tensor values = torch::stable::contiguous(values_);
  const int64_t rows = indptr.size(0) - 1;
  check_num_query(num_query, rows, "inverted_index");
  const SparseRows matrix{indptr.const_data_ptr<int64_t>(), indices.const_data_ptr<int64_t>(),
                          values.const_data_ptr<float>()};
  check_sparse(matrix.indptr, matrix.indices, rows, indices.size(0), rows, "inverted_index");
  const int64_t entries = matrix.indptr[rows] - matrix.indptr[num_query];
  Tensor offsets = torch::stable::new_empty(indptr, {rows + 1}, ScalarType::Long);
  Tensor index_rows = torch::stable::new_empty(indptr, {entries}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(indptr, {entries}, ScalarType::Float);
  invert_columns(matrix, num_query, rows, rows, offsets.mutable_data_ptr<int64_t>(),
                 index_rows.mutable_data_ptr<int32_t>(), weights.mutable_data_ptr<float>());
  return {offsets, index_rows, weights};
}

Tensor jaccard_cpu(const Tensor& indptr_, const Tensor& indices_, const Tensor& values_, const Tensor& offsets_,
                   const Tensor& rows_, const Tensor& weights_, int64_t gallery_rows) {
  check_index(indptr_, indices_, values_, offsets_, rows_, weights_, gallery_rows, "jaccard");
  const Tensor indptr = torch::stable::contiguous(indptr_), indices = torch::stable::contiguous(indices_);
  const Tensor values = torch::stable::contiguous(values_), offsets = torch::stable::contiguous(offsets_);
  const Tensor rows = torch::stable::contiguous(rows_), weights = torch::stable::contiguous(weights_);
  const int64_t queries = indptr.size(0) - 1, columns = offsets.size(0) - 1;
  const SparseRows matrix{indptr.const_data_ptr<int64_t>(), indices.const_data_ptr<int64_t>(),
                          values.const_data_ptr<float>()};
  check_sparse(matrix.indptr, matrix.indices, queries, indices.size(0), columns, "jaccard");
  const InvertedIndex index{offsets.const_data_ptr<int64_t>(), rows.const_data_ptr<int32_t>(),
                            weights.const_data_ptr<float>()};
  check_inverted(index.offsets, index.rows, columns, rows.size(0), gallery_rows, "jaccard");
  Tensor distances = torch::stable::new_empty(values, {queries, gallery_rows}, ScalarType::Float);
  auto* out = distances.mutable_data_ptr<float>();
  parallel_rows(queries, 4, [&](int64_t query) {
    float* row = out + query * gallery_rows;
    std::fill(row, row + gallery_rows, 0.0f);
    add_overlap(matrix, index, query, row, 0, 1, NoBarrier());
    std::transform(row, row + gallery_rows, row, jaccard_distance);
  });
  return distances;
}

// The final distances of a block of queries.
struct FinalDistances {
  SparseRows matrix;  // of the queries
  InvertedIndex index;
  DistanceRows original;
  const float* row_max;  // [Q]
  Blend blend;

  int64_t blocks() const { return (original.queries + kDistanceRows - 1) / kDistanceRows; }

  // out [end - begin, G]; overlap [G] is scratch.
  void operator()(int64_t begin, int64_t end, float* overlap, float* out) const {
    original(begin, end, out);
    for (int64_t query = begin; query < end; ++query) {
      std::fill(overlap, overlap + original.gallery_rows, 0.0f);
      add_overlap(matrix, index, query, overlap, 0, 1, NoBarrier());
      float* row = out + (query - begin) * original.gallery_rows;
      const float largest = row_max[query];
      for (int64_t at = 0; at < original.gallery_rows; ++at) {
        row[at] = blend(overlap[at], row[at], largest);
      }
    }
  }
};

// Checks and unpacks the arguments that both operators share, and calls body(FinalDistances).
template <typename Body>
void with_final_distances(const Tensor& query_, const Tensor& gallery_, const Tensor& row_max_, const Tensor& indptr_,
                          const Tensor& indices_, const Tensor& values_, const Tensor& offsets_, const Tensor& rows_,
                          const Tensor& weights_, double lambda_value, const char* name, const Body& body) {
  check_final(query_, gallery_, row_max_, indptr_, indices_, values_, offsets_, rows_, weights_, lambda_value, name);
  const Tensor query = torch::stable::contiguous(query_), gallery = torch::stable::contiguous(gallery_);
  const Tensor row_max = torch::stable::contiguous(row_max_), indptr = torch::stable::contiguous(indptr_);
  const Tensor indices = torch::stable::contiguous(indices_), values = torch::stable::contiguous(values_);
  const Tensor offsets = torch::stable::contiguous(offsets_), rows = torch::stable::contiguous(rows_);
  const Tensor weights = torch::stable::contiguous(weights_);
  const int64_t queries = query.size(0), gallery_rows = gallery.size(0), columns = offsets.size(0) - 1;
  const SparseRows matrix{indptr.const_data_ptr<int64_t>(), indices.const_data_ptr<int64_t>(),
                          values.const_data_ptr<float>()};
  check_sparse(matrix.indptr, matrix.indices, queries, indices.size(0), columns, name);
  const InvertedIndex index{offsets.const_data_ptr<int64_t>(), rows.const_data_ptr<int32_t>(),
                            weights.const_data_ptr<float>()};
  check_inverted(index.offsets, index.rows, columns, rows.size(0), gallery_rows, name);
  const std::vector<float> panels = pack_panels(gallery.const_data_ptr<float>(), gallery_rows, query.size(1));
  body(FinalDistances{matrix, index,
                      DistanceRows{query.const_data_ptr<float>(), panels.data(), queries, gallery_rows, query.size(1)},
                      row_max.const_data_ptr<float>(), make_blend(lambda_value)});
}

Tensor rerank_matrix_cpu(const Tensor& query, const Tensor& gallery, const Tensor& row_max, const Tensor& indptr,
                         const Tensor& indices, const Tensor& values, const Tensor& offsets, const Tensor& rows,
                         const Tensor& weights, double lambda_value) {
  const int64_t queries = query.size(0), gallery_rows = gallery.size(0);
  Tensor distances = torch::stable::new_empty(query, {queries, gallery_rows}, ScalarType::Float);
  auto* out = distances.mutable_data_ptr<float>();
  with_final_distances(query, gallery, row_max, indptr, indices, values, offsets, rows, weights, lambda_value,
                       "rerank_matrix", [&](const FinalDistances& compute) {
                         parallel_rows(compute.blocks(), 1, [&](int64_t block) {
                           const int64_t begin = block * kDistanceRows;
                           std::vector<float> overlap(static_cast<size_t>(gallery_rows));
                           compute(begin, std::min(begin + kDistanceRows, queries), overlap.data(),
                                   out + begin * gallery_rows);
                         });
                       });
  return distances;
}

std::tuple<Tensor, Tensor> rerank_lists_cpu(const Tensor& query, const Tensor& gallery, const Tensor& row_max,
                                            const Tensor& indptr, const Tensor& indices, const Tensor& values,
                                            const Tensor& offsets, const Tensor& rows, const Tensor& weights,
                                            double lambda_value, int64_t top) {
  const int64_t queries = query.size(0), gallery_rows = gallery.size(0);
  check_top(top, gallery_rows);
  Tensor distances = torch::stable::new_empty(query, {queries, top}, ScalarType::Float);
  Tensor best = torch::stable::new_empty(query, {queries, top}, ScalarType::Long);
  auto* out = distances.mutable_data_ptr<float>();
  auto* out_indices = best.mutable_data_ptr<int64_t>();
  with_final_distances(query, gallery, row_max, indptr, indices, values, offsets, rows, weights, lambda_value,
                       "rerank_lists", [&](const FinalDistances& compute) {
                         parallel_rows(compute.blocks(), 1, [&](int64_t block) {
                           const int64_t begin = block * kDistanceRows, end = std::min(begin + kDistanceRows, queries);
                           std::vector<float> overlap(static_cast<size_t>(gallery_rows));
                           std::vector<float> mixed(static_cast<size_t>((end - begin) * gallery_rows));
                           compute(begin, end, overlap.data(), mixed.data());
                           for (int64_t row = begin; row < end; ++row) {
                             select_nearest(mixed.data() + (row - begin) * gallery_rows, gallery_rows, top,
                                            out + row * top, out_indices + row * top);
                           }
                         });
                       });
  return {distances, best};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CPU, library) {
  library.impl("inverted_index", TORCH_BOX(&inverted_index_cpu));
  library.impl("jaccard", TORCH_BOX(&jaccard_cpu));
  library.impl("rerank_matrix", TORCH_BOX(&rerank_matrix_cpu));
  library.impl("rerank_lists", TORCH_BOX(&rerank_lists_cpu));
}

}  // namespace personvit
