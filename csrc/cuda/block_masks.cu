#include "core/block_masks.h"

#include "checks.h"
#include "cuda/launch.h"

namespace personvit {
namespace {

Tensor block_masks_cuda(const Tensor& targets_, int64_t height, int64_t width, int64_t seed, int64_t first,
                        double log_aspect_low, double log_aspect_high) {
  check_block_masks(targets_, height, width, log_aspect_low, log_aspect_high);
  const torch::stable::accelerator::DeviceGuard guard(targets_.get_device_index());
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
  for_each_row(draw, count, 64, current_stream(targets));
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CUDA, library) { library.impl("block_masks", TORCH_BOX(&block_masks_cuda)); }

}  // namespace personvit
