// Counter-based random numbers: draw n of stream s under a seed is a pure function of (seed, s, n).
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace personvit {

constexpr uint64_t kGoldenGamma = 0x9E3779B97F4A7C15ull;

// The output function of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
PERSONVIT_HD inline uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// splitmix64 whose start is output number `stream` of a splitmix64 started from the mixed seed.
class CounterRng {
 public:
  PERSONVIT_HD CounterRng(uint64_t seed, uint64_t stream)
      : state_(mix64(mix64(seed + kGoldenGamma) + stream * kGoldenGamma)) {}

  PERSONVIT_HD uint64_t next() {
    state_ += kGoldenGamma;
    return mix64(state_);
  }

  // Uniform in [0, 1): 53 bits, exact in float64.
  PERSONVIT_HD double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

  // Uniform in [low, high); `high` below `low` is fine and means (high, low].
  PERSONVIT_HD double uniform(double low, double high) { return low + (high - low) * uniform(); }

  // Uniform integer in [0, bound), 1 <= bound <= 2^32.
  PERSONVIT_HD int64_t below(int64_t bound) {
    return static_cast<int64_t>(((next() >> 32) * static_cast<uint64_t>(bound)) >> 32);
  }

 private:
  uint64_t state_;
};

}  // namespace personvit
