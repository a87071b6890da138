// Distances of many pairs at a time on the CPU: gallery rows lie side by side in panels, so that a vector instruction
// works on one feature of several rows, and every pair is summed in the order of core/distance.h. Without torch, for
// the sanitizers' sake.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/distance.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define PERSONVIT_AVX2 __attribute__((target("avx2,fma")))
#include <immintrin.h>
#endif

// Loops without a sum of products for the compiler to vectorise: their clones agree in every bit.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(PERSONVIT_NO_CLONES)
#define PERSONVIT_CLONES __attribute__((target_clones("avx2", "default")))
#define PERSONVIT_FLAT_CLONES __attribute__((target_clones("avx2", "default"), flatten))  // with all that they call
#else
#define PERSONVIT_CLONES
#define PERSONVIT_FLAT_CLONES
#endif

namespace personvit {

constexpr int64_t kPanel = 16;   // gallery rows side by side in a panel
constexpr int64_t kQueries = 6;  // queries that share a pass over a panel: all that 16 vector registers hold

inline int64_t panel_count(int64_t rows) { return (rows + kPanel - 1) / kPanel; }

// panel[d][j] = gallery[start + j][d]; rows past the end repeat the last one and are ignored later.
inline void pack_panel(const float* gallery, int64_t rows, int64_t start, int64_t features, float* panel) {
  for (int64_t j = 0; j < kPanel; ++j) {
    const float* row = gallery + std::min(start + j, rows - 1) * features;
    for (int64_t d = 0; d < features; ++d) {
      panel[d * kPanel + j] = row[d];
    }
  }
}

// distances[m][j] = squared_distance(queries[m], panel column j) for kQueries queries and kPanel columns.
inline void panel_distances_portable(const float* const* queries, const float* panel, int64_t features,
                                     float* distances) {
  for (int64_t m = 0; m < kQueries; ++m) {
    float total[kPanel] = {};
    for (int64_t start = 0; start < features; start += kSumBlock) {
      const int64_t stop = std::min(start + kSumBlock, features);
      float partial[kPanel] = {};
      for (int64_t d = start; d < stop; ++d) {
        for (int64_t j = 0; j < kPanel; ++j) {
          partial[j] = add_square(partial[j], queries[m][d] - panel[d * kPanel + j]);
        }
      }
      for (int64_t j = 0; j < kPanel; ++j) {
        total[j] += partial[j];
      }
    }
    std::copy(total, total + kPanel, distances + m * kPanel);
  }
}

#ifdef PERSONVIT_AVX2
PERSONVIT_AVX2 inline void panel_distances_avx2(const float* const* queries, const float* panel, int64_t features,
                                                float* distances) {
  __m256 total[kQueries][2];
  for (int64_t m = 0; m < kQueries; ++m) {
    total[m][0] = total[m][1] = _mm256_setzero_ps();
  }
  for (int64_t start = 0; start < features; start += kSumBlock) {
    const int64_t stop = start + kSumBlock < features ? start + kSumBlock : features;
    __m256 partial[kQueries][2];
    for (int64_t m = 0; m < kQueries; ++m) {
      partial[m][0] = partial[m][1] = _mm256_setzero_ps();
    }
    for (int64_t d = start; d < stop; ++d) {
      const __m256 left = _mm256_loadu_ps(panel + d * kPanel);
      const __m256 right = _mm256_loadu_ps(panel + d * kPanel + kPanel / 2);
      for (int64_t m = 0; m < kQueries; ++m) {
        const __m256 value = _mm256_set1_ps(queries[m][d]);
        const __m256 x = _mm256_sub_ps(value, left), y = _mm256_sub_ps(value, right);
        partial[m][0] = _mm256_fmadd_ps(x, x, partial[m][0]);
        partial[m][1] = _mm256_fmadd_ps(y, y, partial[m][1]);
      }
    }
    for (int64_t m = 0; m < kQueries; ++m) {
      total[m][0] = _mm256_add_ps(total[m][0], partial[m][0]);
      total[m][1] = _mm256_add_ps(total[m][1], partial[m][1]);
    }
  }
  for (int64_t m = 0; m < kQueries; ++m) {
    _mm256_storeu_ps(distances + m * kPanel, total[m][0]);
    _mm256_storeu_ps(distances + m * kPanel + kPanel / 2, total[m][1]);
  }
}
#endif

using PanelDistances = void (*)(const float* const*, const float*, int64_t, float*);

// The fastest of them that this processor runs.
inline PanelDistances panel_distances() {
#ifdef PERSONVIT_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return panel_distances_avx2;
  }
#endif
  return panel_distances_portable;
}

// Pointers to kQueries rows from `row` on; those past the end repeat the last one.
inline void query_rows(const float* query, int64_t rows, int64_t row, int64_t features, const float** pointers) {
  for (int64_t m = 0; m < kQueries; ++m) {
    pointers[m] = query + std::min(row + m, rows - 1) * features;
  }
}

// The distances of a block of queries to the whole gallery.
struct DistanceRows {
  const float* query;   // [Q, D]
  const float* panels;  // packed gallery: panel_count(G) panels of [D, kPanel]
  int64_t queries;
  int64_t gallery_rows;
  int64_t features;

  // distances [end - begin, G] of queries begin to end.
  void operator()(int64_t begin, int64_t end, float* distances) const {
    const PanelDistances compute = panel_distances();
    float tile[kQueries * kPanel];
    const float* rows[kQueries];
    for (int64_t panel = 0; panel < panel_count(gallery_rows); ++panel) {
      const int64_t columns = std::min(kPanel, gallery_rows - panel * kPanel);
      for (int64_t row = begin; row < end; row += kQueries) {
        query_rows(query, end, row, features, rows);
        compute(rows, panels + panel * kPanel * features, features, tile);
        for (int64_t m = 0; m < std::min(kQueries, end - row); ++m) {
          std::copy(tile + m * kPanel, tile + m * kPanel + columns,
                    distances + (row - begin + m) * gallery_rows + panel * kPanel);
        }
      }
    }
  }
};

}  // namespace personvit
