#include "core/knn.h"

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "cuda/distances.h"
#include "cuda/launch.h"
#include "cuda/select.h"

namespace personvit {
namespace {

std::tuple<Tensor, Tensor, Tensor> knn_cuda(const Tensor& query_, const Tensor& gallery_, int64_t k) {
  check_knn(query_, gallery_, k);
  const torch::stable::accelerator::DeviceGuard guard(query_.get_device_index());
  const Tensor query = torch::stable::contiguous(query_);
  const Tensor gallery = torch::stable::contiguous(gallery_);
  const int64_t rows = query.size(0);
  const int64_t features = query.size(1);
  const int64_t gallery_rows = gallery.size(0);
  Tensor distances = torch::stable::new_empty(query, {rows, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(query, {rows, k}, ScalarType::Long);
  Tensor largest = torch::stable::new_empty(query, {rows}, ScalarType::Float);
  const cudaStream_t stream = current_stream(query);

  const int64_t block = std::min(rows_at_once(rows, gallery_rows), std::max<int64_t>(1, kScratchPairs / k));
  Tensor matrix = torch::stable::new_empty(query, {block, gallery_rows}, ScalarType::Float);
  Selection select(query, block, gallery_rows, k);
  for (int64_t start = 0; start < rows; start += block) {
    const int64_t count = std::min(block, rows - start);
    distance_tiles(query.const_data_ptr<float>() + start * features, gallery.const_data_ptr<float>(), count,
                   gallery_rows, features, matrix.mutable_data_ptr<float>(), stream);
    select(matrix.const_data_ptr<float>(), count, distances.mutable_data_ptr<float>() + start * k,
           indices.mutable_data_ptr<int64_t>() + start * k, largest.mutable_data_ptr<float>() + start, stream);
  }
  return {distances, indices, largest};
}

Tensor pairwise_distance_cuda(const Tensor& query_, const Tensor& gallery_) {
  check_pair(query_, gallery_, "pairwise_distance");
  const torch::stable::accelerator::DeviceGuard guard(query_.get_device_index());
  const Tensor query = torch::stable::contiguous(query_);
  const Tensor gallery = torch::stable::contiguous(gallery_);
  Tensor distances = torch::stable::new_empty(query, {query.size(0), gallery.size(0)}, ScalarType::Float);
  distance_tiles(query.const_data_ptr<float>(), gallery.const_data_ptr<float>(), query.size(0), gallery.size(0),
                 query.size(1), distances.mutable_data_ptr<float>(), current_stream(query));
  return distances;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CUDA, library) {
  library.impl("knn", TORCH_BOX(&knn_cuda));
  library.impl("pairwise_distance", TORCH_BOX(&pairwise_distance_cuda));
}

}  // namespace personvit
