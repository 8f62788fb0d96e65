// csrc/ptx/math.cuh on the emulator: the functions in full precision, their special values and the
// flush of subnormal operands and results (.ftz) as PTX has them.
#pragma once

#include <cmath>

#include "ptx/thread.cuh"

namespace bertkern::ptx {

// A subnormal number becomes a zero of its sign.
BERTKERN_DEVICE float flush(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

BERTKERN_DEVICE float exp2(float x) { return flush(std::exp2(flush(x))); }
BERTKERN_DEVICE float log2(float x) { return flush(std::log2(flush(x))); }
BERTKERN_DEVICE float reciprocal(float x) { return flush(1.0f / flush(x)); }
BERTKERN_DEVICE float rsqrt(float x) { return 1.0f / std::sqrt(flush(x)); }

BERTKERN_DEVICE float max(float a, float b) {
  if (a != a) return b;
  return b > a ? b : a;
}

BERTKERN_DEVICE float max_nan(float a, float b) {
  if (a != a || b != b) return __builtin_nanf("");
  return b > a ? b : a;
}

BERTKERN_DEVICE float fma(float a, float b, float c) { return std::fma(a, b, c); }

}  // namespace bertkern::ptx
