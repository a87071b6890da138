// The nearest of each row of a matrix of distances on the device: slices of the rows in parallel, then merged.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "core/knn.h"
#include "cuda/launch.h"

namespace personvit {

constexpr int64_t kSearchThreads = int64_t{1} << 17;  // enough rows to fill the largest device
constexpr int64_t kScratchPairs = int64_t{1} << 26;   // 768 MiB of (float, int64) pairs at most
constexpr int64_t kBlockFloats = int64_t{1} << 28;    // 1 GiB of distances at a time

// Rows of `columns` distances that are worked on at once.
inline int64_t rows_at_once(int64_t rows, int64_t columns) {
  return std::max<int64_t>(1, std::min(rows, kBlockFloats / std::max<int64_t>(1, columns)));
}

// Scratch and launches of a search in blocks of at most `most_rows` rows.
class Selection {
 public:
  Selection(const torch::stable::Tensor& like, int64_t most_rows, int64_t columns, int64_t k)
      : columns_(columns),
        k_(k),
        slices_(slices(most_rows, columns, k)),
        distances_(torch::stable::new_empty(like, {slices_, most_rows, k}, torch::headeronly::ScalarType::Float)),
        indices_(torch::stable::new_empty(like, {slices_, most_rows, k}, torch::headeronly::ScalarType::Long)),
        largest_(torch::stable::new_empty(like, {slices_ + 1, most_rows}, torch::headeronly::ScalarType::Float)),
        most_rows_(most_rows) {}

  // matrix [rows, columns] -> distances [rows, k], indices [rows, k], and largest [rows] unless it is null.
  void operator()(const float* matrix, int64_t rows, float* distances, int64_t* indices, float* largest,
                  cudaStream_t stream) {
    auto* slice_largest = largest_.mutable_data_ptr<float>();
    const int64_t slice_rows = (columns_ + slices_ - 1) / slices_;
    const KnnSlices<DistanceMatrix> search{DistanceMatrix{matrix, columns_},
                                           distances_.mutable_data_ptr<float>(),
                                           indices_.mutable_data_ptr<int64_t>(),
                                           slice_largest,
                                           rows,
                                           columns_,
                                           k_,
                                           slice_rows};
    for_each_row(search, slices_ * rows, 128, stream);
    const KnnMerge merge{search.distances,
                         search.indices,
                         slice_largest,
                         distances,
                         indices,
                         largest != nullptr ? largest : slice_largest + slices_ * most_rows_,
                         rows,
                         k_,
                         slices_};
    for_each_row(merge, rows, 128, stream);
  }

 private:
  // Slices shorter than k would only be padded.
  static int64_t slices(int64_t rows, int64_t columns, int64_t k) {
    const int64_t wanted = std::min(kSearchThreads / rows, kScratchPairs / (k * rows));
    return std::max<int64_t>(1, std::min(wanted, columns / k));
  }

  int64_t columns_;
  int64_t k_;
  int64_t slices_;
  torch::stable::Tensor distances_;
  torch::stable::Tensor indices_;
  torch::stable::Tensor largest_;
  int64_t most_rows_;
};

}  // namespace personvit
