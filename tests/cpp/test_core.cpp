// Tests of csrc/core for the sanitizers: every buffer has exactly the size that the algorithm may touch.
// Usage: test_core NAME
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "core/block_masks.h"
#include "core/distance.h"
#include "core/rng.h"
#include "core/top_k.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

void test_rng() {
  // First output of splitmix64 from state 0, as published with its reference code.
  CHECK(personvit::mix64(personvit::kGoldenGamma) == 0xE220A8397B1DCDAFull);
  personvit::CounterRng a(1, 2), b(1, 2), c(1, 3), d(2, 2);
  for (int i = 0; i < 1000; ++i) {
    const uint64_t x = a.next();
    CHECK(x == b.next());
    CHECK(x != c.next());
    CHECK(x != d.next());
  }
  for (int i = 0; i < 1000; ++i) {
    const double u = a.uniform();
    CHECK(u >= 0.0 && u < 1.0);
    const int64_t n = a.below(7);
    CHECK(n >= 0 && n < 7);
    CHECK(a.below(1) == 0);
  }
}

void test_block_masks() {
  for (double x = -8.0; x <= 8.0; x += 0.01) {
    CHECK(std::abs(personvit::portable_exp(x) / std::exp(x) - 1.0) < 1e-13);
  }
  const int grids[][2] = {{16, 8}, {1, 1}, {1, 9}, {2, 2}, {64, 64}, {64, 2}, {14, 14}, {63, 64}};
  for (const auto& grid : grids) {
    const int height = grid[0], width = grid[1];
    const float cells = static_cast<float>(height * width);
    const std::vector<float> targets = {0.0f,       0.3f * cells, cells, 2 * cells, kInfinity,
                                        -kInfinity, kNan,         -1.0f, 0.5f,      1.0f};
    const auto count = static_cast<int64_t>(targets.size());
    const auto masks = std::make_unique<bool[]>(static_cast<size_t>(count * height * width));
    for (uint64_t seed = 0; seed < 50; ++seed) {
      // the widest aspect range that the operator admits, and the largest stream number
      const personvit::BlockMasks draw{targets.data(), masks.get(), height, width, seed, ~uint64_t{0} - 3, -8.0, 8.0};
      for (int64_t index = 0; index < count; ++index) {
        draw(index);
        const bool* mask = masks.get() + index * height * width;
        const auto set = static_cast<float>(std::count(mask, mask + height * width, true));
        CHECK(set == 0.0f || set <= targets[static_cast<size_t>(index)]);
      }
    }
  }
}

void test_top_k() {
  std::mt19937 random(0);
  for (int round = 0; round < 500; ++round) {
    const int size = 1 + static_cast<int>(random() % 60);
    const int k = 1 + static_cast<int>(random() % static_cast<unsigned>(size));
    std::vector<std::pair<float, int64_t>> pairs;
    for (int i = 0; i < size; ++i) {
      const unsigned kind = random() % 10;
      pairs.emplace_back(kind == 0 ? kNan : kind == 1 ? kInfinity : static_cast<float>(random() % 8), i);
    }
    std::shuffle(pairs.begin(), pairs.end(), random);
    std::vector<float> distances(static_cast<size_t>(k));
    std::vector<int64_t> indices(static_cast<size_t>(k));
    personvit::TopK nearest(distances.data(), indices.data(), k);
    for (const auto& pair : pairs) {
      nearest.offer(pair.first, pair.second);
    }
    nearest.sort();
    std::sort(pairs.begin(), pairs.end(), [](const auto& a, const auto& b) {
      const float x = std::isnan(a.first) ? kInfinity : a.first, y = std::isnan(b.first) ? kInfinity : b.first;
      return std::make_tuple(std::isnan(a.first), x, a.second) < std::make_tuple(std::isnan(b.first), y, b.second);
    });
    for (int i = 0; i < k; ++i) {
      CHECK(indices[static_cast<size_t>(i)] == pairs[static_cast<size_t>(i)].second);
    }
  }
}

void test_distance() {
  std::mt19937 random(1);
  for (int64_t features : {0, 1, 31, 32, 33, 64, 100, 384}) {
    const std::vector<float> a = random_features(random, features, 1000), b = random_features(random, features, 1000);
    double exact = 0.0;
    for (size_t d = 0; d < a.size(); ++d) {
      exact += (static_cast<double>(a[d]) - b[d]) * (static_cast<double>(a[d]) - b[d]);
    }
    CHECK(std::abs(personvit::squared_distance(a.data(), b.data(), features) - exact) <= 1e-6 * exact);
    CHECK(personvit::squared_distance(a.data(), a.data(), features) == 0.0f);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::pair<const char*, void (*)()> tests[] = {
      {"rng", test_rng}, {"block_masks", test_block_masks}, {"top_k", test_top_k}, {"distance", test_distance}};
  for (const auto& [name, test] : tests) {
    if (argc == 2 && std::strcmp(argv[1], name) == 0) {
      test();
      return 0;
    }
  }
  std::fprintf(stderr, "usage: test_core NAME, one of rng block_masks top_k distance\n");
  return 2;
}
