#include "core/block_masks.h"

#include "checks.h"

namespace personvit {
namespace {

Tensor block_masks_cpu(const Tensor& targets_, int64_t height, int64_t width, int64_t seed, int64_t first,
                       double log_aspect_low, double log_aspect_high) {
  check_block_masks(targets_, height, width, log_aspect_low, log_aspect_high);
  const Tensor targets = torch::stable::contiguous(targets_);
  const int64_t count = targets.size(0);
  Tensor masks = torch::stable::new_empty(targets, {count, height, width}, ScalarType::Bool);
  const BlockMasks draw{targets.const_data_ptr<float>(),
                        masks.mutable_data_ptr<bool>(),
                        static_cast<int>(height),
                        static_cast<int>(width),
                        static_cast<uint64_t>(seed),
                        static_cast<uint64_t>(first),
                        log_aspect_low,
                        log_aspect_high};
  torch::stable::parallel_for(0, count, 256, [&draw](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      draw(index);
    }
  });
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CPU, library) { library.impl("block_masks", TORCH_BOX(&block_masks_cpu)); }

}  // namespace personvit
