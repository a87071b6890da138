#include "core/photometry.h"

#include <memory>
#include <vector>

#include "checks.h"
#include "cpu/panels.h"

namespace personvit {
namespace {

PERSONVIT_FLAT_CLONES void finish_views(const FinishViews& finish, int64_t begin, int64_t end, float* scratch,
                                        const float** rows) {
  for (int64_t index = begin; index < end; ++index) {
    finish(index, scratch, rows);
  }
}

void photometry_cpu(const Tensor& views_, const Tensor& maps_, const Tensor& kernels_, const Tensor& radius_,
                    const Tensor& solarize_, const Tensor& mean_, const Tensor& deviation_, const Tensor& out) {
  check_photometry(views_, maps_, kernels_, radius_, solarize_, mean_, deviation_, out);
  const Tensor views = torch::stable::contiguous(views_);
  const Tensor maps = torch::stable::contiguous(maps_);
  const Tensor kernels = torch::stable::contiguous(kernels_);
  const Tensor radius = torch::stable::contiguous(radius_);
  const Tensor solarize = torch::stable::contiguous(solarize_);
  const Tensor mean = torch::stable::contiguous(mean_);
  const Tensor deviation = torch::stable::contiguous(deviation_);
  const FinishViews finish{views.const_data_ptr<uint8_t>(),
                           maps.const_data_ptr<float>(),
                           kernels.const_data_ptr<float>(),
                           radius.const_data_ptr<int64_t>(),
                           solarize.const_data_ptr<bool>(),
                           mean.const_data_ptr<float>(),
                           deviation.const_data_ptr<float>(),
                           out.mutable_data_ptr<float>(),
                           views.size(2),
                           views.size(3),
                           kernels.size(1)};
  check_radius(finish.radius, views.size(0), finish.taps, finish.height, finish.width);
  torch::stable::parallel_for(0, views.size(0), 1, [&finish](int64_t begin, int64_t end) {
    // Not a vector: its zeros would cost as much as a pass over the view.
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(finish.scratch_size())]);
    std::vector<const float*> rows(static_cast<size_t>(finish.taps));
    finish_views(finish, begin, end, scratch.get(), rows.data());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CPU, library) { library.impl("photometry", TORCH_BOX(&photometry_cpu)); }

}  // namespace personvit
