// What the C++ tests share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

// Few levels: many ties.
inline std::vector<float> random_features(std::mt19937& random, int64_t size, int levels) {
  std::vector<float> features(static_cast<size_t>(size));
  for (float& value : features) {
    value = static_cast<float>(random() % static_cast<unsigned>(levels)) / 3.0f;
  }
  return features;
}

inline int64_t below(std::mt19937& random, int64_t bound) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(bound));
}

inline size_t at(int64_t index) { return static_cast<size_t>(index); }
