// Tests of core/photometry.h for the sanitizers: every buffer has exactly the size that the algorithm may touch.
// Usage: test_photometry NAME
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "core/photometry.h"

namespace {

// What FinishViews does to a view without blur, said differently: in double precision, a pixel at a time.
float plain_value(const std::vector<uint8_t>& view, int64_t pixels, int64_t pixel, const float* map, int channel) {
  double grey = 0;
  for (int64_t p = 0; p < pixels; ++p) {
    grey += 0.299 * view[p] + 0.587 * view[pixels + p] + 0.114 * view[2 * pixels + p];
  }
  grey = std::floor(grey / static_cast<double>(pixels) + 0.5 + 1e-9);
  double value = std::nearbyint(map[4 * channel + 3] * grey * 4096) / 4096;
  for (int from = 0; from < 3; ++from) {
    value += static_cast<double>(map[4 * channel + from]) * view[from * pixels + pixel];
  }
  return static_cast<float>(std::nearbyint(std::min(255.0, std::max(0.0, value))));
}

void test_rounding() {
  for (int whole = -1000; whole <= 1000; ++whole) {
    for (const float fraction : {0.0f, 0.25f, 0.5f, 0.75f}) {
      const float x = static_cast<float>(whole) + fraction;
      CHECK(personvit::round_half_even(x) == std::nearbyint(x));
    }
  }
  CHECK(personvit::clip_to_byte(-1.0f) == 0.0f && personvit::clip_to_byte(256.0f) == 255.0f);
  CHECK(personvit::clip_to_byte(254.5f) == 254.5f);
  for (int64_t size = 1; size < 9; ++size) {
    for (int64_t at = 1 - size; at < 2 * size - 1; ++at) {
      const int64_t mirrored = personvit::reflect(at, size);
      CHECK(mirrored >= 0 && mirrored < size && (at < 0 || at >= size || mirrored == at));
    }
  }
}

void test_views() {
  std::mt19937 random(0);
  const int64_t sizes[][2] = {{1, 1}, {1, 9}, {9, 1}, {2, 3}, {7, 8}, {8, 7}, {31, 33}, {33, 41}, {6, 129}, {40, 32}};
  for (const auto& size : sizes) {
    const int64_t height = size[0], width = size[1], pixels = height * width;
    for (int64_t reach = 0; reach < std::min<int64_t>({4, height, width}); ++reach) {
      const int64_t taps = 2 * reach + 1 + 2 * static_cast<int64_t>(random() % 3);
      std::vector<uint8_t> view(static_cast<size_t>(3 * pixels));
      for (uint8_t& value : view) {
        value = static_cast<uint8_t>(random());
      }
      std::vector<float> map(12), kernel(static_cast<size_t>(taps), 0.0f);
      for (float& value : map) {
        value = static_cast<float>(static_cast<int>(random() % 8192) - 4096) / 4096;
      }
      kernel[static_cast<size_t>(taps / 2)] = 1.0f;  // a blur that changes nothing
      const bool solarize = random() % 2 == 0;
      const float mean[3] = {0.25f, 0.5f, 0.75f}, deviation[3] = {0.5f, 0.25f, 0.125f};
      std::vector<float> out(static_cast<size_t>(3 * pixels));
      const personvit::FinishViews finish{view.data(), map.data(), kernel.data(), &reach, &solarize, mean,
                                          deviation,   out.data(), height,        width,  taps};
      const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(finish.scratch_size())]);
      const std::unique_ptr<const float*[]> rows(new const float*[static_cast<size_t>(taps)]);
      finish(0, scratch.get(), rows.get());
      for (int channel = 0; channel < 3; ++channel) {
        for (int64_t p = 0; p < pixels; ++p) {
          float value = plain_value(view, pixels, p, map.data(), channel);
          value = solarize && value >= 128 ? 255 - value : value;
          CHECK(out[static_cast<size_t>(channel * pixels + p)] ==
                (value / 255.0f - mean[channel]) / deviation[channel]);
        }
      }
    }
  }
}

void test_blur() {
  // A point spreads over its neighbours by the products of the weights, and a flat view stays flat up to its edges.
  const int64_t height = 9, width = 41, pixels = height * width, reach = 2, taps = 7;
  const bool solarize = false;
  const float mean[3] = {}, deviation[3] = {1, 1, 1};
  const float identity[12] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0};
  const float kernel[taps] = {0, 0.125f, 0.25f, 0.25f, 0.25f, 0.125f, 0};
  for (const bool flat : {false, true}) {
    std::vector<uint8_t> view(static_cast<size_t>(3 * pixels), flat ? 77 : 0);
    if (!flat) {
      view[static_cast<size_t>(4 * width + 20)] = 128;
    }
    std::vector<float> out(static_cast<size_t>(3 * pixels));
    const personvit::FinishViews finish{view.data(), identity,   kernel, &reach, &solarize, mean,
                                        deviation,   out.data(), height, width,  taps};
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(finish.scratch_size())]);
    const std::unique_ptr<const float*[]> rows(new const float*[static_cast<size_t>(taps)]);
    finish(0, scratch.get(), rows.get());
    for (int64_t row = 0; row < height; ++row) {
      for (int64_t column = 0; column < width; ++column) {
        const bool near = std::abs(row - 4) <= reach && std::abs(column - 20) <= reach;
        const float spread = near ? kernel[row - 4 + 3] * kernel[column - 20 + 3] * 128 : 0.0f;
        const float expected = flat ? 77.0f : spread;
        CHECK(out[static_cast<size_t>(row * width + column)] == expected / 255.0f);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const char* name = argc > 1 ? argv[1] : "";
  if (std::strcmp(name, "rounding") == 0) {
    test_rounding();
  } else if (std::strcmp(name, "views") == 0) {
    test_views();
  } else if (std::strcmp(name, "blur") == 0) {
    test_blur();
  } else {
    std::fprintf(stderr, "usage: test_photometry rounding|views|blur\n");
    return 2;
  }
  return 0;
}
