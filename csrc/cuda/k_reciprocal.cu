#include "core/k_reciprocal.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "core/query_expansion.h"
#include "core/reciprocal_weights.h"
#include "cuda/launch.h"

namespace personvit {
namespace {

constexpr int64_t kScratchNumbers = int64_t{1} << 25;  // 256 MiB of int64 at most

void check_cuda(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// sizes [rows] of the device -> indptr [rows + 1] of the device, and the total, which the host has to know.
int64_t add_up(const Tensor& sizes, Tensor* indptr, cudaStream_t stream) {
  const int64_t rows = sizes.size(0);
  std::vector<int64_t> offsets(static_cast<size_t>(rows + 1));
  check_cuda(cudaMemcpyAsync(offsets.data() + 1, sizes.const_data_ptr<int64_t>(), static_cast<size_t>(rows) * 8,
                             cudaMemcpyDeviceToHost, stream),
             "copying sizes");
  check_cuda(cudaStreamSynchronize(stream), "waiting for sizes");
  for (size_t row = 1; row < offsets.size(); ++row) {
    offsets[row] += offsets[row - 1];
  }
  check_cuda(cudaMemcpyAsync(indptr->mutable_data_ptr<int64_t>(), offsets.data(), offsets.size() * 8,
                             cudaMemcpyHostToDevice, stream),
             "copying offsets");
  check_cuda(cudaStreamSynchronize(stream), "waiting for offsets");  // before their memory goes
  return offsets.back();
}

std::tuple<Tensor, Tensor> k_reciprocal_cuda(const Tensor& neighbours_, int64_t k1) {
  check_neighbours(neighbours_, "k_reciprocal");
  STD_TORCH_CHECK(k1 >= 1, "k_reciprocal: k1=", k1, " must be 1 or more");
  const torch::stable::accelerator::DeviceGuard guard(neighbours_.get_device_index());
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  const cudaStream_t stream = current_stream(neighbours);
  const int64_t rows = neighbours.size(0);
  const NeighbourLists lists{neighbours.const_data_ptr<int64_t>(), neighbours.size(1)};
  const int64_t width = std::min(k1 + 1, lists.stride), half_width = std::min(half_neighbours(k1) + 1, width);
  Tensor half_sets = torch::stable::new_empty(neighbours, {rows, half_width}, ScalarType::Long);
  for_each_row(HalfReciprocal{lists, half_width, half_sets.mutable_data_ptr<int64_t>()}, rows, 128, stream);
  const ExpandedSets expand{lists, width, half_sets.const_data_ptr<int64_t>(), half_width};
  const int64_t capacity = expand.capacity(rows);
  const int64_t block = std::max<int64_t>(1, std::min(rows, kScratchNumbers / (width + capacity)));
  Tensor mutual = torch::stable::new_empty(neighbours, {block, width}, ScalarType::Long);
  Tensor members = torch::stable::new_empty(neighbours, {block, capacity}, ScalarType::Long);
  Tensor sizes = torch::stable::new_empty(neighbours, {rows}, ScalarType::Long);
  for (int64_t start = 0; start < rows; start += block) {
    const ExpandedSizes count{
        expand, mutual.mutable_data_ptr<int64_t>(),       members.mutable_data_ptr<int64_t>(), capacity,
        start,  sizes.mutable_data_ptr<int64_t>() + start};
    for_each_row(count, std::min(block, rows - start), 128, stream);
  }
  Tensor indptr = torch::stable::new_empty(neighbours, {rows + 1}, ScalarType::Long);
  Tensor indices = torch::stable::new_empty(neighbours, {add_up(sizes, &indptr, stream)}, ScalarType::Long);
  for (int64_t start = 0; start < rows; start += block) {
    const ExpandedMembers write{expand, mutual.mutable_data_ptr<int64_t>(), indptr.const_data_ptr<int64_t>(), start,
                                indices.mutable_data_ptr<int64_t>()};
    for_each_row(write, std::min(block, rows - start), 128, stream);
  }
  return {indptr, indices};
}

Tensor reciprocal_weights_cuda(const Tensor& features_, const Tensor& row_max_, const Tensor& indptr_,
                               const Tensor& indices_) {
  check_weights(features_, row_max_, indptr_, indices_);
  const torch::stable::accelerator::DeviceGuard guard(features_.get_device_index());
  const Tensor features = torch::stable::contiguous(features_), row_max = torch::stable::contiguous(row_max_);
  const Tensor indptr = torch::stable::contiguous(indptr_), indices = torch::stable::contiguous(indices_);
  const cudaStream_t stream = current_stream(features);
  Tensor values = torch::stable::new_empty(features, {indices.size(0)}, ScalarType::Float);
  const EntryDistances entries{features.const_data_ptr<float>(), indptr.const_data_ptr<int64_t>(),
                               indices.const_data_ptr<int64_t>(), features.size(1), values.mutable_data_ptr<float>()};
  for_each_row(entries, features.size(0), 64, stream);
  for_each_row(ReciprocalWeights{row_max.const_data_ptr<float>(), entries.indptr, entries.values}, features.size(0), 64,
               stream);
  return values;
}

std::tuple<Tensor, Tensor, Tensor> query_expansion_cuda(const Tensor& indptr_, const Tensor& indices_,
                                                        const Tensor& values_, const Tensor& neighbours_, int64_t k2) {
  check_sparse_tensors(indptr_, indices_, values_, "query_expansion");
  check_neighbours(neighbours_, "query_expansion");
  STD_TORCH_CHECK(k2 >= 1, "query_expansion: k2=", k2, " must be 1 or more");
  const torch::stable::accelerator::DeviceGuard guard(values_.get_device_index());
  const Tensor indptr = torch::stable::contiguous(indptr_), indices = torch::stable::contiguous(indices_);
  const Tensor values = torch::stable::contiguous(values_), neighbours = torch::stable::contiguous(neighbours_);
  const cudaStream_t stream = current_stream(values);
  const int64_t rows = neighbours.size(0);
  STD_TORCH_CHECK(indptr.size(0) == rows + 1 && same_place(indptr, neighbours), "query_expansion: ", rows,
                  " neighbour lists, but indptr has ", indptr.size(0), " entries");
  const QueryExpansion expand{
      SparseRows{indptr.const_data_ptr<int64_t>(), indices.const_data_ptr<int64_t>(), values.const_data_ptr<float>()},
      neighbours.const_data_ptr<int64_t>(), neighbours.size(1), std::min(k2, neighbours.size(1))};
  const int64_t block = std::max<int64_t>(1, std::min(rows, kScratchNumbers / expand.count));
  Tensor cursors = torch::stable::new_empty(indptr, {block, expand.count}, ScalarType::Long);
  Tensor sizes = torch::stable::new_empty(indptr, {rows}, ScalarType::Long);
  for (int64_t start = 0; start < rows; start += block) {
    const ExpansionSizes count{expand, cursors.mutable_data_ptr<int64_t>(), start,
                               sizes.mutable_data_ptr<int64_t>() + start};
    for_each_row(count, std::min(block, rows - start), 64, stream);
  }
  Tensor new_indptr = torch::stable::new_empty(indptr, {rows + 1}, ScalarType::Long);
  const int64_t entries = add_up(sizes, &new_indptr, stream);
  Tensor new_indices = torch::stable::new_empty(indices, {entries}, ScalarType::Long);
  Tensor new_values = torch::stable::new_empty(values, {entries}, ScalarType::Float);
  for (int64_t start = 0; start < rows; start += block) {
    const ExpansionEntries write{expand, cursors.mutable_data_ptr<int64_t>(),     new_indptr.const_data_ptr<int64_t>(),
                                 start,  new_indices.mutable_data_ptr<int64_t>(), new_values.mutable_data_ptr<float>()};
    for_each_row(write, std::min(block, rows - start), 64, stream);
  }
  return {new_indptr, new_indices, new_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CUDA, library) {
  library.impl("k_reciprocal", TORCH_BOX(&k_reciprocal_cuda));
  library.impl("reciprocal_weights", TORCH_BOX(&reciprocal_weights_cuda));
  library.impl("query_expansion", TORCH_BOX(&query_expansion_cuda));
}

}  // namespace personvit
