// Colour, blur, solarize and normalisation of one 8-bit view. personvit/ops/colour.py is the same in torch, and says
// why no sum rounds: neither the order of additions nor the width of the vectors changes a bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace personvit {

constexpr float kColourUnit = 1.0f / 4096;
constexpr float kSolarizeThreshold = 128.0f;
constexpr int kColourPixels = 512;  // pixels that are coloured and normalised while they lie in the first cache

constexpr float kNoFractions = 12582912.0f;  // 1.5 * 2^23: a float of that size has no bits for fractions

// To the nearest whole number, halves to the even one, for |x| < 2^22.
PERSONVIT_HD inline float round_half_even(float x) { return (x + kNoFractions) - kNoFractions; }

// One choice after the other: where a comparison depends on another one, compilers do not vectorise.
PERSONVIT_HD inline float clip_to_byte(float x) {
  const float low = x < 0.0f ? 0.0f : x;
  return low > 255.0f ? 255.0f : low;
}

// Row or column -radius ... size + radius - 1, mirrored at the edges, which are not repeated.
PERSONVIT_HD inline int64_t reflect(int64_t at, int64_t size) {
  const int64_t mirrored = at < 0 ? -at : at;
  return mirrored < size ? mirrored : 2 * (size - 1) - mirrored;
}

// Mean luma of a view [3, pixels], rounded as by Pillow: in whole numbers, halves up.
PERSONVIT_HD inline int64_t mean_grey(const uint8_t* view, int64_t pixels) {
  constexpr int64_t kLuma[3] = {299, 587, 114};  // thousandths
  int64_t total = 0;
  for (int channel = 0; channel < 3; ++channel) {
    const uint8_t* plane = view + channel * pixels;
    int64_t sum = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      sum += plane[p];
    }
    total += kLuma[channel] * sum;
  }
  return (2 * total + 1000 * pixels) / (2000 * pixels);
}

// What the mean grey adds to each channel, a multiple of kColourUnit.
PERSONVIT_HD inline void colour_offsets(const float* map, float grey, float* offsets) {
  for (int channel = 0; channel < 3; ++channel) {
    offsets[channel] = nearbyintf(map[4 * channel + 3] * grey / kColourUnit) * kColourUnit;
  }
}

// out[c][p] = round(clip(map[c] * rgb[p] + offsets[c])) for `count` pixels; planes of the input and the output lie
// `stride` and `out_stride` apart.
PERSONVIT_HD inline void colour_pixels(const uint8_t* view, int64_t stride, int64_t count, const float* map,
                                       const float* offsets, float* out, int64_t out_stride) {
  const uint8_t* PERSONVIT_RESTRICT red = view;
  const uint8_t* PERSONVIT_RESTRICT green = view + stride;
  const uint8_t* PERSONVIT_RESTRICT blue = view + 2 * stride;
  for (int channel = 0; channel < 3; ++channel) {
    const float r = map[4 * channel], g = map[4 * channel + 1], b = map[4 * channel + 2];
    const float offset = offsets[channel];
    float* PERSONVIT_RESTRICT to = out + channel * out_stride;
    for (int64_t p = 0; p < count; ++p) {
      const float value = static_cast<float>(red[p]) * r + static_cast<float>(green[p]) * g;
      to[p] = round_half_even(clip_to_byte(value + static_cast<float>(blue[p]) * b + offset));
    }
  }
}

// Eight neighbouring pixels in a register. Spelled out, because GCC pairs the taps of a plain loop over an array of
// sums and then no longer sees the vectors.
typedef float Lanes __attribute__((vector_size(32)));

// Sums of `taps` rows, each with its weight, rounded; for 8 * kVectors pixels from `at` on.
template <int kVectors>
inline void blur_vectors(const float* const* rows, int64_t at, const float* kernel, int64_t taps, float* out) {
  Lanes sums[kVectors] = {};
  for (int64_t tap = 0; tap < taps; ++tap) {
    const float weight = kernel[tap];
    for (int lane = 0; lane < kVectors; ++lane) {
      Lanes pixels;
      std::memcpy(&pixels, rows[tap] + at + 8 * lane, sizeof pixels);
      sums[lane] += weight * pixels;
    }
  }
  for (int lane = 0; lane < kVectors; ++lane) {
    const Lanes rounded = (sums[lane] + kNoFractions) - kNoFractions;  // round_half_even
    std::memcpy(out + at + 8 * lane, &rounded, sizeof rounded);
  }
}

inline void blur_rows(const float* const* rows, const float* kernel, int64_t taps, int64_t width, float* out) {
  int64_t at = 0;
  for (; at + 32 <= width; at += 32) {
    blur_vectors<4>(rows, at, kernel, taps, out);
  }
  for (; at + 8 <= width; at += 8) {
    blur_vectors<1>(rows, at, kernel, taps, out);
  }
  for (; at < width; ++at) {
    float sum = 0.0f;
    for (int64_t tap = 0; tap < taps; ++tap) {
      sum += kernel[tap] * rows[tap][at];
    }
    out[at] = round_half_even(sum);
  }
}

// Solarize on request, then to [0, 1], minus mean, over standard deviation.
PERSONVIT_HD inline void normalise_pixels(const float* PERSONVIT_RESTRICT from, int64_t count, bool solarize,
                                          float mean, float deviation, float* PERSONVIT_RESTRICT to) {
  const float threshold = solarize ? kSolarizeThreshold : 256.0f;
  for (int64_t p = 0; p < count; ++p) {
    const float inverse = 255.0f - from[p];
    const float value = from[p] >= threshold ? inverse : from[p];
    to[p] = (value / 255.0f - mean) / deviation;
  }
}

// Finishes view number i. `scratch` belongs to the caller's thread.
struct FinishViews {
  const uint8_t* views;    // [N, 3, height, width]
  const float* maps;       // [N, 3, 4]
  const float* kernels;    // [N, taps], taps odd
  const int64_t* radius;   // [N], 0: not blurred; less than height and width, at most taps / 2
  const bool* solarize;    // [N]
  const float* mean;       // [3]
  const float* deviation;  // [3]
  float* out;              // [N, 3, height, width]
  int64_t height;
  int64_t width;
  int64_t taps;

  // Floats that `scratch` holds; `rows` holds as many pointers as there are taps.
  PERSONVIT_HD int64_t scratch_size() const {
    const int64_t planes = 3 * (height * width > kColourPixels ? height * width : kColourPixels);
    return planes + 2 * width + taps;
  }

  PERSONVIT_HD void operator()(int64_t index, float* scratch, const float** rows) const {
    const int64_t pixels = height * width;
    const uint8_t* view = views + index * 3 * pixels;
    const float* map = maps + index * 12;
    float offsets[3];
    colour_offsets(map, static_cast<float>(mean_grey(view, pixels)), offsets);
    if (radius[index] > 0) {
      colour_pixels(view, pixels, pixels, map, offsets, scratch, pixels);
      blur_view(index, scratch, scratch + 3 * pixels, rows);
      return;
    }
    float* to = out + index * 3 * pixels;
    for (int64_t at = 0; at < pixels; at += kColourPixels) {
      const int64_t count = pixels - at < kColourPixels ? pixels - at : kColourPixels;
      colour_pixels(view + at, pixels, count, map, offsets, scratch, kColourPixels);
      for (int channel = 0; channel < 3; ++channel) {
        normalise_pixels(scratch + channel * kColourPixels, count, solarize[index], mean[channel], deviation[channel],
                         to + channel * pixels + at);
      }
    }
  }

 private:
  // Down, then across, then the rest, row by row. `line` holds a row with its margins, and one without.
  PERSONVIT_HD void blur_view(int64_t index, const float* planes, float* line, const float** rows) const {
    const int64_t reach = radius[index];
    const int64_t used = 2 * reach + 1;
    const float* kernel = kernels + index * taps + (taps / 2 - reach);
    float* blurred = line + width + 2 * reach;
    for (int channel = 0; channel < 3; ++channel) {
      const float* plane = planes + channel * height * width;
      float* to = out + (index * 3 + channel) * height * width;
      for (int64_t row = 0; row < height; ++row, to += width) {
        for (int64_t tap = 0; tap < used; ++tap) {
          rows[tap] = plane + reflect(row + tap - reach, height) * width;
        }
        blur_rows(rows, kernel, used, width, line + reach);
        for (int64_t step = 1; step <= reach; ++step) {
          line[reach - step] = line[reach + step];
          line[reach + width - 1 + step] = line[reach + width - 1 - step];
        }
        for (int64_t tap = 0; tap < used; ++tap) {
          rows[tap] = line + tap;
        }
        blur_rows(rows, kernel, used, width, blurred);
        normalise_pixels(blurred, width, solarize[index], mean[channel], deviation[channel], to);
      }
    }
  }
};

}  // namespace personvit
