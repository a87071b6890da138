// What the CPU and the CUDA operators demand of their arguments. personvit.ops checks the same and says it better; this
// is the second line, for callers of torch.ops.personvit.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

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

inline void check_knn(const Tensor& query, const Tensor& gallery, int64_t k) {
  STD_TORCH_CHECK(query.dim() == 2 && gallery.dim() == 2, "knn: query and gallery must have 2 dimensions, got ",
                  query.dim(), " and ", gallery.dim());
  STD_TORCH_CHECK(query.scalar_type() == ScalarType::Float && gallery.scalar_type() == ScalarType::Float,
                  "knn: query and gallery must be float32");
  STD_TORCH_CHECK(query.size(1) == gallery.size(1), "knn: query has ", query.size(1), " features, gallery ",
                  gallery.size(1));
  STD_TORCH_CHECK(query.get_device_index() == gallery.get_device_index() && query.is_cpu() == gallery.is_cpu(),
                  "knn: query and gallery lie on different devices");
  STD_TORCH_CHECK(k >= 1 && k <= gallery.size(0), "knn: k=", k, " must be from 1 to the gallery's size ",
                  gallery.size(0));
}

}  // namespace personvit
