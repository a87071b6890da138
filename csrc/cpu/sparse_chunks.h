// Sparse rows of unknown length, made by many threads: chunks of rows collect their entries, then they are joined in
// order.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/parallel.h"

namespace personvit {

constexpr int64_t kChunkRows = 128;

struct SparseChunk {
  std::vector<int64_t> sizes;
  std::vector<int64_t> indices;
  std::vector<float> values;  // empty for sets
};

// Calls fill(&scratch, chunk, begin, end) for all chunks of rows; fill appends the size and the entries of each of its
// rows, and leaves the scratch of make_scratch() as it was. A thread makes one for all its chunks: scratch has a place
// for every row, so one for each chunk would cost as the square of the rows.
// Returns indptr [rows + 1], indices [nnz] and values [nnz, or 0 for sets].
template <typename MakeScratch, typename Fill>
std::tuple<Tensor, Tensor, Tensor> make_sparse(const Tensor& like, int64_t rows, bool with_values,
                                               const MakeScratch& make_scratch, const Fill& fill) {
  std::vector<SparseChunk> chunks(static_cast<size_t>((rows + kChunkRows - 1) / kChunkRows));
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    auto scratch = make_scratch();
    for (int64_t number = first; number < last; ++number) {
      const int64_t begin = number * kChunkRows;
      fill(&scratch, &chunks[static_cast<size_t>(number)], begin, std::min(begin + kChunkRows, rows));
    }
  });
  Tensor indptr = torch::stable::new_empty(like, {rows + 1}, ScalarType::Long);
  auto* offsets = indptr.mutable_data_ptr<int64_t>();
  offsets[0] = 0;
  int64_t row = 0;
  for (const SparseChunk& chunk : chunks) {
    for (const int64_t size : chunk.sizes) {
      offsets[row + 1] = offsets[row] + size;
      ++row;
    }
  }
  Tensor indices = torch::stable::new_empty(like, {offsets[rows]}, ScalarType::Long);
  Tensor values = torch::stable::new_empty(like, {with_values ? offsets[rows] : 0}, ScalarType::Float);
  auto* all_indices = indices.mutable_data_ptr<int64_t>();
  auto* all_values = values.mutable_data_ptr<float>();
  parallel_rows(static_cast<int64_t>(chunks.size()), 1, [&](int64_t number) {
    SparseChunk& chunk = chunks[static_cast<size_t>(number)];
    const int64_t start = offsets[number * kChunkRows];
    std::copy(chunk.indices.begin(), chunk.indices.end(), all_indices + start);
    std::copy(chunk.values.begin(), chunk.values.end(), all_values + start);
    chunk = SparseChunk();
  });
  return {indptr, indices, values};
}

}  // namespace personvit
