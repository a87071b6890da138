#pragma once

#include "core/macros.h"

namespace personvit {

// exp by a Taylor polynomial and four squarings. Only IEEE additions, multiplications and divisions, so that the host,
// the device and the Python reference agree in every bit, which their exp() functions do not promise.
// Relative error below 1e-13 for |x| <= 8.
PERSONVIT_HD inline double portable_exp(double x) {
  const double r = x / 16.0;
  double sum = 1.0;
  for (int n = 14; n >= 1; --n) {
    sum = 1.0 + sum * r / n;
  }
  for (int n = 0; n < 4; ++n) {
    sum = sum * sum;
  }
  return sum;
}

}  // namespace personvit
