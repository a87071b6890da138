// Block masks over a patch grid: the algorithm of iBOT's loader (bytedance/ibot, loader.py, ImageFolderMask), which is
// that of BEiT's masking generator, on counter-based random numbers.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"
#include "core/portable_exp.h"
#include "core/rng.h"

namespace personvit {

constexpr int kMaxGridSide = 64;  // one bit per cell, one 64-bit word per grid row
constexpr int kMaskAttempts = 10;

PERSONVIT_HD inline int count_bits(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}

// Draws one block and sets its cells if it is acceptable. Returns the number of cells newly set, 0 if refused.
PERSONVIT_HD inline int try_block(CounterRng& rng, uint64_t* rows, int height, int width, double room,
                                  double smallest_area, double log_aspect_low, double log_aspect_high) {
  const double area = rng.uniform(smallest_area, room);
  const double aspect = portable_exp(rng.uniform(log_aspect_low, log_aspect_high));  // height / width
  const int block_height = static_cast<int>(sqrt(area * aspect) + 0.5);
  const int block_width = static_cast<int>(sqrt(area / aspect) + 0.5);
  if (block_height >= height || block_width >= width || block_height == 0 || block_width == 0) {
    return 0;  // a block never spans the grid
  }
  const int top = static_cast<int>(rng.below(height - block_height + 1));
  const int left = static_cast<int>(rng.below(width - block_width + 1));
  const uint64_t columns = ((uint64_t{1} << block_width) - 1) << left;  // block_width <= 63
  int fresh = 0;
  for (int row = top; row < top + block_height; ++row) {
    fresh += count_bits(columns & ~rows[row]);
  }
  if (fresh == 0 || fresh > room) {
    return 0;
  }
  for (int row = top; row < top + block_height; ++row) {
    rows[row] |= columns;
  }
  return fresh;
}

// Mask number i depends on (seed, first + i, targets[i], grid, aspect) and on nothing else.
struct BlockMasks {
  const float* targets;  // [M] wanted number of masked cells
  bool* masks;           // [M, height, width]
  int height;
  int width;
  uint64_t seed;
  uint64_t first;
  double log_aspect_low;
  double log_aspect_high;

  PERSONVIT_HD void operator()(int64_t index) const {
    const int64_t cells = static_cast<int64_t>(height) * width;
    uint64_t rows[kMaxGridSide];
    for (int row = 0; row < height; ++row) {
      rows[row] = 0;
    }
    double target = targets[index];
    if (target > static_cast<double>(cells)) {
      target = static_cast<double>(cells);
    }
    const int side = (height < width ? height : width) / 3;
    const double smallest_area = static_cast<double>(side * side);
    CounterRng rng(seed, first + static_cast<uint64_t>(index));
    int count = 0;
    while (count < target) {  // false for a NaN target: an empty mask
      int fresh = 0;
      for (int attempt = 0; attempt < kMaskAttempts && fresh == 0; ++attempt) {
        fresh = try_block(rng, rows, height, width, target - count, smallest_area, log_aspect_low, log_aspect_high);
      }
      if (fresh == 0) {
        break;
      }
      count += fresh;
    }
    bool* mask = masks + index * cells;
    for (int row = 0; row < height; ++row) {
      for (int column = 0; column < width; ++column) {
        mask[row * width + column] = (rows[row] >> column) & 1;
      }
    }
  }
};

}  // namespace personvit
