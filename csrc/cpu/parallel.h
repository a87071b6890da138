// Loops of the CPU operators over torch's threads. No result depends on how the rows are shared out.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "cpu/panels.h"

namespace personvit {

constexpr int64_t kDistanceRows = 48;  // queries that share a pass over the gallery; a multiple of kQueries

template <typename Body>
void parallel_rows(int64_t rows, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, rows, grain, [&body](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      body(row);
    }
  });
}

inline void pack_panels(const float* gallery, int64_t rows, int64_t features, float* panels) {
  parallel_rows(panel_count(rows), 16, [=](int64_t panel) {
    pack_panel(gallery, rows, panel * kPanel, features, panels + panel * kPanel * features);
  });
}

inline std::vector<float> pack_panels(const float* gallery, int64_t rows, int64_t features) {
  std::vector<float> panels(static_cast<size_t>(panel_count(rows) * kPanel * features));
  pack_panels(gallery, rows, features, panels.data());
  return panels;
}

}  // namespace personvit
