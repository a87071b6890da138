#include "cpu/knn_blocks.h"

#include <tuple>

#include "checks.h"

namespace personvit {
namespace {

std::tuple<Tensor, Tensor> knn_cpu(const Tensor& query_, const Tensor& gallery_, int64_t k) {
  check_knn(query_, gallery_, k);
  const Tensor query = torch::stable::contiguous(query_);
  const Tensor gallery = torch::stable::contiguous(gallery_);
  const int64_t rows = query.size(0);
  Tensor distances = torch::stable::new_empty(query, {rows, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(query, {rows, k}, ScalarType::Long);
  const KnnBlocks search{query.const_data_ptr<float>(),
                         gallery.const_data_ptr<float>(),
                         distances.mutable_data_ptr<float>(),
                         indices.mutable_data_ptr<int64_t>(),
                         rows,
                         gallery.size(0),
                         query.size(1),
                         k};
  torch::stable::parallel_for(0, search.count(), 1, [&search](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      search(block);
    }
  });
  return {distances, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CPU, library) { library.impl("knn", TORCH_BOX(&knn_cpu)); }

}  // namespace personvit
