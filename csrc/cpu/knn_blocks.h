// k nearest neighbours on the CPU: csrc/core's distance, computed for many pairs at a time. Without torch, for the
// sanitizers' sake.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/distance.h"
#include "core/top_k.h"

// The same arithmetic for every instruction set (no fused multiply-add is allowed), so the clones agree in every bit.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(PERSONVIT_NO_CLONES)
#define PERSONVIT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PERSONVIT_CLONES
#endif

namespace personvit {

constexpr int64_t kPanel = 16;       // gallery rows side by side in a panel
constexpr int64_t kQueries = 4;      // queries that share a pass over a panel
constexpr int64_t kQueryBlock = 64;  // queries of one task: what packing a panel is spread over

// panel[d][j] = gallery[start + j][d]; rows past the end repeat the last one and are ignored later.
inline void pack_panel(const float* gallery, int64_t rows, int64_t start, int64_t features, float* panel) {
  for (int64_t j = 0; j < kPanel; ++j) {
    const float* row = gallery + std::min(start + j, rows - 1) * features;
    for (int64_t d = 0; d < features; ++d) {
      panel[d * kPanel + j] = row[d];
    }
  }
}

// distances[m][j] = squared_distance(queries[m], panel column j), summed in the order of core/distance.h.
PERSONVIT_CLONES
inline void panel_distances(const float* const* queries, const float* panel, int64_t features, float* distances) {
  float total[kQueries][kPanel] = {};
  for (int64_t start = 0; start < features; start += kSumBlock) {
    const int64_t stop = start + kSumBlock < features ? start + kSumBlock : features;
    float partial[kQueries][kPanel] = {};
    for (int64_t d = start; d < stop; ++d) {
      const float* column = panel + d * kPanel;
      for (int64_t m = 0; m < kQueries; ++m) {
        const float value = queries[m][d];
        for (int64_t j = 0; j < kPanel; ++j) {
          const float difference = value - column[j];
          partial[m][j] += difference * difference;
        }
      }
    }
    for (int64_t m = 0; m < kQueries; ++m) {
      for (int64_t j = 0; j < kPanel; ++j) {
        total[m][j] += partial[m][j];
      }
    }
  }
  std::copy(&total[0][0], &total[0][0] + kQueries * kPanel, distances);
}

// The search of one block of queries; two arrays of k pairs per query hold the neighbours found so far.
struct KnnBlocks {
  const float* query;    // [Q, D]
  const float* gallery;  // [G, D]
  float* distances;      // [Q, k]
  int64_t* indices;      // [Q, k]
  int64_t query_rows;
  int64_t gallery_rows;
  int64_t features;
  int64_t k;

  int64_t count() const { return (query_rows + kQueryBlock - 1) / kQueryBlock; }

  // All neighbours of the queries of one block.
  void operator()(int64_t block) const {
    const int64_t begin = block * kQueryBlock;
    const int64_t end = std::min(begin + kQueryBlock, query_rows);
    std::vector<TopK> nearest;
    nearest.reserve(static_cast<size_t>(end - begin));
    for (int64_t row = begin; row < end; ++row) {
      nearest.emplace_back(distances + row * k, indices + row * k, k);
    }
    std::vector<float> panel(static_cast<size_t>(features * kPanel));
    float tile[kQueries * kPanel];
    for (int64_t start = 0; start < gallery_rows; start += kPanel) {
      pack_panel(gallery, gallery_rows, start, features, panel.data());
      const int64_t columns = std::min(kPanel, gallery_rows - start);
      for (int64_t row = begin; row < end; row += kQueries) {
        const float* rows[kQueries];
        for (int64_t m = 0; m < kQueries; ++m) {
          rows[m] = query + std::min(row + m, end - 1) * features;
        }
        panel_distances(rows, panel.data(), features, tile);
        for (int64_t m = 0; m < std::min(kQueries, end - row); ++m) {
          for (int64_t j = 0; j < columns; ++j) {
            nearest[static_cast<size_t>(row + m - begin)].offer(tile[m * kPanel + j], start + j);
          }
        }
      }
    }
    for (TopK& heap : nearest) {
      heap.sort();
    }
  }
};

}  // namespace personvit
