#include <algorithm>
#include <tuple>

#include "checks.h"
#include "core/jaccard.h"
#include "cuda/distances.h"
#include "cuda/launch.h"
#include "cuda/select.h"

namespace personvit {
namespace {

constexpr int kLanes = 256;

struct BlockBarrier {
  __device__ void operator()() const { __syncthreads(); }
};

// What becomes of the overlap of a query and a gallery row.
struct ToJaccard {
  __device__ float operator()(float overlap, float, int64_t) const { return jaccard_distance(overlap); }
};

struct ToFinal {
  Blend blend;
  const float* row_max;  // [Q]

  __device__ float operator()(float overlap, float distance, int64_t query) const {
    return blend(overlap, distance, row_max[query]);
  }
};

// A block of threads per query: they share the entries of a column, column after column. overlap [rows, G] is scratch
// and may be out itself; out [rows, G] holds the original distances, if they are needed, and then the result.
template <typename Finish>
__global__ void __launch_bounds__(kLanes)
    overlap_kernel(SparseRows queries, InvertedIndex index, int64_t first, int64_t rows, int64_t gallery_rows,
                   float* overlap, float* out, Finish finish) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float* sums = overlap + row * gallery_rows;
    float* results = out + row * gallery_rows;
    for (int64_t at = threadIdx.x; at < gallery_rows; at += kLanes) {
      sums[at] = 0.0f;
    }
    __syncthreads();
    add_overlap(queries, index, first + row, sums, threadIdx.x, kLanes, BlockBarrier());
    for (int64_t at = threadIdx.x; at < gallery_rows; at += kLanes) {
      results[at] = finish(sums[at], results[at], first + row);
    }
  }
}

template <typename Finish>
void add_overlaps(const SparseRows& queries, const InvertedIndex& index, int64_t first, int64_t rows,
                  int64_t gallery_rows, float* overlap, float* out, const Finish& finish, cudaStream_t stream) {
  if (rows == 0 || gallery_rows == 0) {
    return;
  }
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(rows, 65535));
  overlap_kernel<<<blocks, kLanes, 0, stream>>>(queries, index, first, rows, gallery_rows, overlap, out, finish);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The contiguous tensors of an encoding, alive as long as the views of them.
struct Rows {
  Rows(const Tensor& indptr_, const Tensor& indices_, const Tensor& values_, const Tensor& offsets_,
       const Tensor& rows_, const Tensor& weights_)
      : indptr(torch::stable::contiguous(indptr_)),
        indices(torch::stable::contiguous(indices_)),
        values(torch::stable::contiguous(values_)),
        offsets(torch::stable::contiguous(offsets_)),
        rows(torch::stable::contiguous(rows_)),
        weights(torch::stable::contiguous(weights_)) {}

  SparseRows matrix() const {
    return {indptr.const_data_ptr<int64_t>(), indices.const_data_ptr<int64_t>(), values.const_data_ptr<float>()};
  }
  InvertedIndex index() const {
    return {offsets.const_data_ptr<int64_t>(), rows.const_data_ptr<int32_t>(), weights.const_data_ptr<float>()};
  }

  Tensor indptr, indices, values, offsets, rows, weights;
};

Tensor jaccard_cuda(const Tensor& indptr, const Tensor& indices, const Tensor& values, const Tensor& offsets,
                    const Tensor& rows, const Tensor& weights, int64_t gallery_rows) {
  check_index(indptr, indices, values, offsets, rows, weights, gallery_rows, "jaccard");
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const Rows encoding(indptr, indices, values, offsets, rows, weights);
  const int64_t queries = indptr.size(0) - 1;
  Tensor distances = torch::stable::new_empty(values, {queries, gallery_rows}, ScalarType::Float);
  auto* out = distances.mutable_data_ptr<float>();
  add_overlaps(encoding.matrix(), encoding.index(), 0, queries, gallery_rows, out, out, ToJaccard(),
               current_stream(values));
  return distances;
}

Tensor rerank_matrix_cuda(const Tensor& query_, const Tensor& gallery_, const Tensor& row_max_, const Tensor& indptr,
                          const Tensor& indices, const Tensor& values, const Tensor& offsets, const Tensor& rows,
                          const Tensor& weights, double lambda_value) {
  check_final(query_, gallery_, row_max_, indptr, indices, values, offsets, rows, weights, lambda_value,
              "rerank_matrix");
  const torch::stable::accelerator::DeviceGuard guard(query_.get_device_index());
  const Tensor query = torch::stable::contiguous(query_), gallery = torch::stable::contiguous(gallery_);
  const Tensor row_max = torch::stable::contiguous(row_max_);
  const Rows encoding(indptr, indices, values, offsets, rows, weights);
  const cudaStream_t stream = current_stream(query);
  const int64_t queries = query.size(0), gallery_rows = gallery.size(0);
  Tensor distances = torch::stable::new_empty(query, {queries, gallery_rows}, ScalarType::Float);
  auto* out = distances.mutable_data_ptr<float>();
  distance_tiles(query.const_data_ptr<float>(), gallery.const_data_ptr<float>(), queries, gallery_rows, query.size(1),
                 out, stream);
  const int64_t block = rows_at_once(queries, gallery_rows);
  Tensor overlap = torch::stable::new_empty(query, {block, gallery_rows}, ScalarType::Float);
  const ToFinal finish{make_blend(lambda_value), row_max.const_data_ptr<float>()};
  for (int64_t start = 0; start < queries; start += block) {
    add_overlaps(encoding.matrix(), encoding.index(), start, std::min(block, queries - start), gallery_rows,
                 overlap.mutable_data_ptr<float>(), out + start * gallery_rows, finish, stream);
  }
  return distances;
}

std::tuple<Tensor, Tensor> rerank_lists_cuda(const Tensor& query_, const Tensor& gallery_, const Tensor& row_max_,
                                             const Tensor& indptr, const Tensor& indices, const Tensor& values,
                                             const Tensor& offsets, const Tensor& rows, const Tensor& weights,
                                             double lambda_value, int64_t top) {
  check_final(query_, gallery_, row_max_, indptr, indices, values, offsets, rows, weights, lambda_value,
              "rerank_lists");
  check_top(top, gallery_.size(0));
  const torch::stable::accelerator::DeviceGuard guard(query_.get_device_index());
  const Tensor query = torch::stable::contiguous(query_), gallery = torch::stable::contiguous(gallery_);
  const Tensor row_max = torch::stable::contiguous(row_max_);
  const Rows encoding(indptr, indices, values, offsets, rows, weights);
  const cudaStream_t stream = current_stream(query);
  const int64_t queries = query.size(0), gallery_rows = gallery.size(0), features = query.size(1);
  Tensor distances = torch::stable::new_empty(query, {queries, top}, ScalarType::Float);
  Tensor best = torch::stable::new_empty(query, {queries, top}, ScalarType::Long);
  const int64_t block = std::min(rows_at_once(queries, gallery_rows), std::max<int64_t>(1, kScratchPairs / top));
  Tensor overlap = torch::stable::new_empty(query, {block, gallery_rows}, ScalarType::Float);
  Tensor mixed = torch::stable::new_empty(query, {block, gallery_rows}, ScalarType::Float);
  Selection select(query, block, gallery_rows, top);
  const ToFinal finish{make_blend(lambda_value), row_max.const_data_ptr<float>()};
  for (int64_t start = 0; start < queries; start += block) {
    const int64_t count = std::min(block, queries - start);
    auto* out = mixed.mutable_data_ptr<float>();
    distance_tiles(query.const_data_ptr<float>() + start * features, gallery.const_data_ptr<float>(), count,
                   gallery_rows, features, out, stream);
    add_overlaps(encoding.matrix(), encoding.index(), start, count, gallery_rows, overlap.mutable_data_ptr<float>(),
                 out, finish, stream);
    select(out, count, distances.mutable_data_ptr<float>() + start * top,
           best.mutable_data_ptr<int64_t>() + start * top, nullptr, stream);
  }
  return {distances, best};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CUDA, library) {
  library.impl("jaccard", TORCH_BOX(&jaccard_cuda));
  library.impl("rerank_matrix", TORCH_BOX(&rerank_matrix_cuda));
  library.impl("rerank_lists", TORCH_BOX(&rerank_lists_cuda));
}

}  // namespace personvit
