// All distances of two sets on the device: tiles of pairs, features staged through shared memory, each pair summed in
// the order of core/distance.h.
#pragma once

#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdint>

#include "core/distance.h"
#include "cuda/launch.h"

namespace personvit {

constexpr int kTile = 64;                    // pairs of a block: kTile x kTile
constexpr int kTileThreads = 16;             // a block has kTileThreads x kTileThreads threads
constexpr int kEach = kTile / kTileThreads;  // pairs of a thread: kEach x kEach
constexpr int kStage = static_cast<int>(kSumBlock);

// stage[d][r] = rows[start + r][first + d], zero outside: it adds nothing to a sum.
__device__ inline void load_stage(const float* rows, int64_t count, int64_t start, int64_t features, int64_t first,
                                  float (*stage)[kTile + 1]) {
  for (int at = threadIdx.x; at < kTile * kStage; at += kTileThreads * kTileThreads) {
    const int r = at / kStage, d = at % kStage;
    stage[d][r] = start + r < count && first + d < features ? rows[(start + r) * features + first + d] : 0.0f;
  }
}

static __global__ void __launch_bounds__(kTileThreads* kTileThreads)
    distance_tiles_kernel(const float* query, const float* gallery, int64_t queries, int64_t gallery_rows,
                          int64_t features, float* distances) {
  __shared__ float left[kStage][kTile + 1], right[kStage][kTile + 1];  // + 1: no two lanes in one bank
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kTile, column = static_cast<int64_t>(blockIdx.x) * kTile;
  const int y = threadIdx.x / kTileThreads, x = threadIdx.x % kTileThreads;
  float total[kEach][kEach] = {};
  for (int64_t first = 0; first < features; first += kStage) {
    load_stage(query, queries, row, features, first, left);
    load_stage(gallery, gallery_rows, column, features, first, right);
    __syncthreads();
    float partial[kEach][kEach] = {};
    for (int d = 0; d < kStage; ++d) {
      float a[kEach], b[kEach];
      for (int m = 0; m < kEach; ++m) {
        a[m] = left[d][y + m * kTileThreads];
        b[m] = right[d][x + m * kTileThreads];
      }
      for (int m = 0; m < kEach; ++m) {
        for (int n = 0; n < kEach; ++n) {
          partial[m][n] = add_square(partial[m][n], a[m] - b[n]);
        }
      }
    }
    for (int m = 0; m < kEach; ++m) {
      for (int n = 0; n < kEach; ++n) {
        total[m][n] += partial[m][n];
      }
    }
    __syncthreads();
  }
  for (int m = 0; m < kEach; ++m) {
    for (int n = 0; n < kEach; ++n) {
      const int64_t r = row + y + m * kTileThreads, c = column + x + n * kTileThreads;
      if (r < queries && c < gallery_rows) {
        distances[r * gallery_rows + c] = total[m][n];
      }
    }
  }
}

// distances [queries, gallery_rows]
inline void distance_tiles(const float* query, const float* gallery, int64_t queries, int64_t gallery_rows,
                           int64_t features, float* distances, cudaStream_t stream) {
  constexpr int64_t kMostTiles = 65535;  // of a grid's second dimension
  const int64_t across = (gallery_rows + kTile - 1) / kTile;
  for (int64_t start = 0; start < queries && across > 0; start += kMostTiles * kTile) {
    const int64_t count = std::min(queries - start, kMostTiles * kTile);
    const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>((count + kTile - 1) / kTile));
    distance_tiles_kernel<<<grid, kTileThreads * kTileThreads, 0, stream>>>(
        query + start * features, gallery, count, gallery_rows, features, distances + start * gallery_rows);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace personvit
