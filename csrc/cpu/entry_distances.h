// Distances of one row to a few others on the CPU, in the order of core/distance.h. The sums of several pairs overlap,
// for a single one would wait for each of its additions. Without torch, for the sanitizers' sake.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/reciprocal_weights.h"
#include "cpu/panels.h"

namespace personvit {

constexpr int64_t kTogether = 8;

#if defined(PERSONVIT_AVX2)
PERSONVIT_AVX2 inline void distances_together(const float* a, const float* const* b, int64_t features, float* out) {
  float total[kTogether] = {};
  for (int64_t start = 0; start < features; start += kSumBlock) {
    const int64_t stop = start + kSumBlock < features ? start + kSumBlock : features;
    __m128 partial[kTogether];
    for (int64_t n = 0; n < kTogether; ++n) {
      partial[n] = _mm_setzero_ps();
    }
    for (int64_t d = start; d < stop; ++d) {
      const __m128 value = _mm_load_ss(a + d);
      for (int64_t n = 0; n < kTogether; ++n) {
        const __m128 x = _mm_sub_ss(value, _mm_load_ss(b[n] + d));
        partial[n] = _mm_fmadd_ss(x, x, partial[n]);
      }
    }
    for (int64_t n = 0; n < kTogether; ++n) {
      total[n] += _mm_cvtss_f32(partial[n]);
    }
  }
  std::copy(total, total + kTogether, out);
}

inline void entry_distances_avx2(const EntryDistances& entries, int64_t row) {
  const int64_t end = entries.indptr[row + 1];
  for (int64_t at = entries.indptr[row]; at < end; at += kTogether) {
    const float* others[kTogether];
    float out[kTogether];
    for (int64_t n = 0; n < kTogether; ++n) {
      others[n] = entries.features + entries.indices[std::min(at + n, end - 1)] * entries.width;
    }
    distances_together(entries.features + row * entries.width, others, entries.width, out);
    std::copy(out, out + std::min(kTogether, end - at), entries.values + at);
  }
}
#endif

inline void entry_distances(const EntryDistances& entries, int64_t row) {
#if defined(PERSONVIT_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    entry_distances_avx2(entries, row);
    return;
  }
#endif
  entries(row);
}

}  // namespace personvit
