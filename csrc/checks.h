// What the CPU and the CUDA operators demand of their arguments. personvit.ops checks the same and says it better; this
// is the second line, for callers of torch.ops.personvit.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/block_masks.h"

namespace personvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_block_masks(const Tensor& targets, int64_t height, int64_t width, double log_aspect_low,
                              double log_aspect_high) {
  STD_TORCH_CHECK(targets.dim() == 1, "block_masks: targets must have 1 dimension, got ", targets.dim());
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Float, "block_masks: targets must be float32");
  STD_TORCH_CHECK(height >= 1 && height <= kMaxGridSide && width >= 1 && width <= kMaxGridSide,
                  "block_masks: the grid must be from 1x1 to 64x64 cells, got ", height, "x", width);
  STD_TORCH_CHECK(std::abs(log_aspect_low) <= 8.0 && std::abs(log_aspect_high) <= 8.0,
                  "block_masks: the logarithms of the aspect range must lie in [-8, 8], got ", log_aspect_low, " and ",
                  log_aspect_high);
}

inline bool same_place(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_photometry(const Tensor& views, const Tensor& maps, const Tensor& kernels, const Tensor& radius,
                             const Tensor& solarize, const Tensor& mean, const Tensor& deviation, const Tensor& out) {
  STD_TORCH_CHECK(views.dim() == 4 && views.scalar_type() == ScalarType::Byte && views.size(1) == 3 &&
                      views.size(2) >= 1 && views.size(3) >= 1,
                  "photometry: views must be [N, 3, H, W] uint8 with pixels");
  STD_TORCH_CHECK(
      out.dim() == 4 && out.scalar_type() == ScalarType::Float && out.is_contiguous() && same_place(out, views),
      "photometry: out must be [N, 3, H, W] float32, contiguous, on the device of views");
  for (int dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(out.size(dim) == views.size(dim), "photometry: out has ", out.size(dim), " entries along ", dim,
                    ", views ", views.size(dim));
  }
  const int64_t count = views.size(0);
  STD_TORCH_CHECK(maps.dim() == 3 && maps.scalar_type() == ScalarType::Float && maps.size(0) == count &&
                      maps.size(1) == 3 && maps.size(2) == 4,
                  "photometry: maps must be [N, 3, 4] float32");
  STD_TORCH_CHECK(kernels.dim() == 2 && kernels.scalar_type() == ScalarType::Float && kernels.size(0) == count &&
                      kernels.size(1) % 2 == 1,
                  "photometry: kernels must be [N, K] float32, K odd");
  STD_TORCH_CHECK(radius.dim() == 1 && radius.scalar_type() == ScalarType::Long && radius.size(0) == count &&
                      solarize.dim() == 1 && solarize.scalar_type() == ScalarType::Bool && solarize.size(0) == count,
                  "photometry: radius must be [N] int64 and solarize [N] bool");
  STD_TORCH_CHECK(mean.dim() == 1 && mean.scalar_type() == ScalarType::Float && mean.size(0) == 3 &&
                      deviation.dim() == 1 && deviation.scalar_type() == ScalarType::Float && deviation.size(0) == 3,
                  "photometry: mean and deviation must be [3] float32");
}

// No blur reaches beyond its kernel or beyond what a reflection can supply. Only for memory that the host can read.
inline void check_radius(const int64_t* radius, int64_t count, int64_t taps, int64_t height, int64_t width) {
  const int64_t largest = std::min({taps / 2, height - 1, width - 1});
  for (int64_t at = 0; at < count; ++at) {
    STD_TORCH_CHECK(radius[at] >= 0 && radius[at] <= largest, "photometry: a radius of ", radius[at],
                    ", expected 0 to ", largest);
  }
}

inline void check_pair(const Tensor& query, const Tensor& gallery, const char* name) {
  STD_TORCH_CHECK(query.dim() == 2 && gallery.dim() == 2, name, ": query and gallery must have 2 dimensions, got ",
                  query.dim(), " and ", gallery.dim());
  STD_TORCH_CHECK(query.scalar_type() == ScalarType::Float && gallery.scalar_type() == ScalarType::Float, name,
                  ": query and gallery must be float32");
  STD_TORCH_CHECK(query.size(1) == gallery.size(1), name, ": query has ", query.size(1), " features, gallery ",
                  gallery.size(1));
  STD_TORCH_CHECK(same_place(query, gallery), name, ": query and gallery lie on different devices");
}

inline void check_knn(const Tensor& query, const Tensor& gallery, int64_t k) {
  check_pair(query, gallery, "knn");
  STD_TORCH_CHECK(k >= 1 && k <= gallery.size(0), "knn: k=", k, " must be from 1 to the gallery's size ",
                  gallery.size(0));
}

inline void check_knn_step(const Tensor& features, const Tensor& panels, const Tensor& distances, const Tensor& indices,
                           const Tensor& largest, int64_t step, int64_t steps) {
  STD_TORCH_CHECK(distances.dim() == 2 && distances.scalar_type() == ScalarType::Float && distances.is_contiguous() &&
                      indices.dim() == 2 && indices.scalar_type() == ScalarType::Long && indices.is_contiguous() &&
                      indices.size(0) == distances.size(0) && indices.size(1) == distances.size(1) &&
                      largest.dim() == 1 && largest.scalar_type() == ScalarType::Float && largest.is_contiguous() &&
                      largest.size(0) == distances.size(0),
                  "knn_step: distances, indices and largest must be those of knn_begin");
  check_knn(features, features, distances.size(1));
  STD_TORCH_CHECK(features.size(0) == distances.size(0) && panels.dim() == 3 && panels.is_contiguous() &&
                      panels.scalar_type() == ScalarType::Float && panels.size(1) == features.size(1) &&
                      panels.size(0) * panels.size(2) >= features.size(0) &&
                      panels.size(0) * panels.size(2) < features.size(0) + panels.size(2),
                  "knn_step: panels must be those of knn_begin");
  STD_TORCH_CHECK(step >= 0 && step < steps, "knn_step: step ", step, " of ", steps);
}

inline void check_neighbours(const Tensor& neighbours, const char* name) {
  STD_TORCH_CHECK(neighbours.dim() == 2 && neighbours.scalar_type() == ScalarType::Long, name,
                  ": neighbours must be [N, k] int64");
  STD_TORCH_CHECK(neighbours.size(1) >= 1 && neighbours.size(1) <= std::max<int64_t>(1, neighbours.size(0)), name, ": ",
                  neighbours.size(0), " points cannot have ", neighbours.size(1), " neighbours each");
}

// Every index lies in [0, bound). Only for memory that the host can read.
inline void check_indices(const int64_t* indices, int64_t count, int64_t bound, const char* name) {
  for (int64_t at = 0; at < count; ++at) {
    STD_TORCH_CHECK(indices[at] >= 0 && indices[at] < bound, name, " holds ", indices[at], ", expected 0 to ",
                    bound - 1);
  }
}

inline void check_sparse_tensors(const Tensor& indptr, const Tensor& indices, const Tensor& values, const char* name) {
  STD_TORCH_CHECK(indptr.dim() == 1 && indptr.scalar_type() == ScalarType::Long && indptr.size(0) >= 1, name,
                  ": indptr must be [N + 1] int64");
  STD_TORCH_CHECK(indices.dim() == 1 && indices.scalar_type() == ScalarType::Long, name,
                  ": indices must be [nnz] int64");
  STD_TORCH_CHECK(values.dim() == 1 && values.scalar_type() == ScalarType::Float && values.size(0) == indices.size(0),
                  name, ": values must be float32 and as long as indices");
  STD_TORCH_CHECK(same_place(indptr, indices) && same_place(indptr, values), name, ": tensors on different devices");
}

// What the rows of a sparse matrix must obey. Only for memory that the host can read.
inline void check_sparse(const int64_t* indptr, const int64_t* indices, int64_t rows, int64_t entries, int64_t columns,
                         const char* name) {
  STD_TORCH_CHECK(indptr[0] >= 0 && indptr[rows] <= entries, name, ": indptr must stay within 0 to ", entries);
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(indptr[row] <= indptr[row + 1], name, ": indptr falls after row ", row);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t at = indptr[row]; at < indptr[row + 1]; ++at) {
      const int64_t least = at == indptr[row] ? 0 : indices[at - 1] + 1;
      STD_TORCH_CHECK(indices[at] >= least && indices[at] < columns, name, ": the columns of row ", row,
                      " must ascend from 0 to ", columns - 1);
    }
  }
}

// What an inverted index must obey. Only for memory that the host can read.
inline void check_inverted(const int64_t* offsets, const int32_t* rows, int64_t columns, int64_t entries,
                           int64_t gallery_rows, const char* name) {
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[columns] == entries, name, ": offsets must lead from 0 to ", entries);
  for (int64_t column = 0; column < columns; ++column) {
    STD_TORCH_CHECK(offsets[column] <= offsets[column + 1], name, ": offsets fall after column ", column);
  }
  for (int64_t at = 0; at < entries; ++at) {
    STD_TORCH_CHECK(rows[at] >= 0 && rows[at] < gallery_rows, name, ": the index holds gallery row ", rows[at], " of ",
                    gallery_rows);
  }
}

inline void check_weights(const Tensor& features, const Tensor& row_max, const Tensor& indptr, const Tensor& indices) {
  STD_TORCH_CHECK(features.dim() == 2 && features.scalar_type() == ScalarType::Float,
                  "reciprocal_weights: features must be [N, D] float32");
  STD_TORCH_CHECK(
      row_max.dim() == 1 && row_max.scalar_type() == ScalarType::Float && row_max.size(0) == features.size(0),
      "reciprocal_weights: row_max must be [N] float32");
  STD_TORCH_CHECK(indptr.dim() == 1 && indptr.scalar_type() == ScalarType::Long &&
                      indptr.size(0) == features.size(0) + 1 && indices.dim() == 1 &&
                      indices.scalar_type() == ScalarType::Long,
                  "reciprocal_weights: indptr must be [N + 1] int64 and indices [nnz] int64");
  STD_TORCH_CHECK(same_place(features, row_max) && same_place(features, indptr) && same_place(features, indices),
                  "reciprocal_weights: tensors on different devices");
}

inline void check_num_query(int64_t num_query, int64_t rows, const char* name) {
  STD_TORCH_CHECK(num_query >= 0 && num_query <= rows, name, ": num_query=", num_query, " must be from 0 to the ", rows,
                  " rows");
  STD_TORCH_CHECK(rows <= std::numeric_limits<int32_t>::max(), name, ": ", rows, " rows; 2^31 - 1 is the most");
}

inline void check_index(const Tensor& indptr, const Tensor& indices, const Tensor& values, const Tensor& offsets,
                        const Tensor& rows, const Tensor& weights, int64_t gallery_rows, const char* name) {
  check_sparse_tensors(indptr, indices, values, name);
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Long && offsets.size(0) >= 1 &&
                      rows.dim() == 1 && rows.scalar_type() == ScalarType::Int && weights.dim() == 1 &&
                      weights.scalar_type() == ScalarType::Float && weights.size(0) == rows.size(0),
                  name, ": offsets, rows and weights must be those of inverted_index");
  STD_TORCH_CHECK(same_place(indptr, offsets) && same_place(indptr, rows) && same_place(indptr, weights), name,
                  ": tensors on different devices");
  STD_TORCH_CHECK(gallery_rows >= 0, name, ": gallery_rows=", gallery_rows, " must be 0 or more");
}

inline void check_final(const Tensor& query, const Tensor& gallery, const Tensor& row_max, const Tensor& indptr,
                        const Tensor& indices, const Tensor& values, const Tensor& offsets, const Tensor& rows,
                        const Tensor& weights, double lambda_value, const char* name) {
  check_pair(query, gallery, name);
  check_index(indptr, indices, values, offsets, rows, weights, gallery.size(0), name);
  STD_TORCH_CHECK(indptr.size(0) == query.size(0) + 1 && row_max.dim() == 1 && row_max.size(0) == query.size(0) &&
                      row_max.scalar_type() == ScalarType::Float,
                  name, ": ", query.size(0), " queries need as many rows of indptr, and row_max [Q] float32");
  STD_TORCH_CHECK(same_place(query, indptr) && same_place(query, row_max), name, ": tensors on different devices");
  STD_TORCH_CHECK(lambda_value >= 0.0 && lambda_value <= 1.0, name, ": lambda_value=", lambda_value,
                  " must lie in [0, 1]");
}

inline void check_top(int64_t top, int64_t gallery_rows) {
  STD_TORCH_CHECK(top >= 1 && top <= gallery_rows, "rerank_lists: top=", top, " must be from 1 to the gallery's size ",
                  gallery_rows);
}

inline void check_rank_counts(const Tensor& distances, const Tensor& q_pids, const Tensor& g_pids,
                              const Tensor& q_camids, const Tensor& g_camids) {
  STD_TORCH_CHECK(distances.dim() == 2 && distances.scalar_type() == ScalarType::Float,
                  "rank_counts: distances must be [Q, G] float32");
  for (const Tensor* labels : {&q_pids, &g_pids, &q_camids, &g_camids}) {
    const bool of_query = labels == &q_pids || labels == &q_camids;
    STD_TORCH_CHECK(labels->dim() == 1 && labels->scalar_type() == ScalarType::Long &&
                        labels->size(0) == distances.size(of_query ? 0 : 1) && same_place(*labels, distances),
                    "rank_counts: labels must be int64 [Q] and [G] on the device of the distances");
  }
}

}  // namespace personvit
