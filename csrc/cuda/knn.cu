#include "core/knn.h"

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "cuda/launch.h"

namespace personvit {
namespace {

constexpr int64_t kThreads = int64_t{1} << 17;       // enough rows to fill the largest device
constexpr int64_t kScratchPairs = int64_t{1} << 26;  // 768 MiB of (float, int64) pairs at most

std::tuple<Tensor, Tensor> knn_cuda(const Tensor& query_, const Tensor& gallery_, int64_t k) {
  check_knn(query_, gallery_, k);
  const torch::stable::accelerator::DeviceGuard guard(query_.get_device_index());
  const Tensor query = torch::stable::contiguous(query_);
  const Tensor gallery = torch::stable::contiguous(gallery_);
  const int64_t rows = query.size(0);
  const int64_t features = query.size(1);
  const int64_t gallery_rows = gallery.size(0);
  Tensor distances = torch::stable::new_empty(query, {rows, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(query, {rows, k}, ScalarType::Long);
  const cudaStream_t stream = current_stream(query);

  const int64_t chunk = std::max<int64_t>(1, std::min(std::min(rows, kThreads), kScratchPairs / k));
  const int64_t wanted = std::max<int64_t>(1, std::min(kThreads / chunk, kScratchPairs / (k * chunk)));
  const int64_t slice_rows = std::max(k, (gallery_rows + wanted - 1) / wanted);  // shorter ones would only be padded
  const int64_t slices = (gallery_rows + slice_rows - 1) / slice_rows;
  Tensor slice_distances = torch::stable::new_empty(query, {slices, chunk, k}, ScalarType::Float);
  Tensor slice_indices = torch::stable::new_empty(query, {slices, chunk, k}, ScalarType::Long);
  for (int64_t start = 0; start < rows; start += chunk) {
    const int64_t count = std::min(chunk, rows - start);
    const KnnSlices search{query.const_data_ptr<float>() + start * features,
                           gallery.const_data_ptr<float>(),
                           slice_distances.mutable_data_ptr<float>(),
                           slice_indices.mutable_data_ptr<int64_t>(),
                           count,
                           gallery_rows,
                           features,
                           k,
                           slice_rows};
    for_each_row(search, slices * count, 128, stream);
    const KnnMerge merge{slice_distances.const_data_ptr<float>(),
                         slice_indices.const_data_ptr<int64_t>(),
                         distances.mutable_data_ptr<float>() + start * k,
                         indices.mutable_data_ptr<int64_t>() + start * k,
                         count,
                         k,
                         slices};
    for_each_row(merge, count, 128, stream);
  }
  return {distances, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CUDA, library) { library.impl("knn", TORCH_BOX(&knn_cuda)); }

}  // namespace personvit
