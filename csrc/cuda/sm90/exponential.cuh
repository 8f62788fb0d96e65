// 2^x on the FMA pipe, for a share of the exponentials: at head dims up to 64 the special-function
// unit is as busy as the tensor cores (docs/roofline.md).
#pragma once

#include "ptx/math.cuh"

namespace bertkern::sm90 {

// 2^x for x < 127.5 to a relative error of 3e-6, a hundredth of what rounding the result to half
// costs: x = n + f with n the nearest integer, 2^f by a polynomial whose value at 0 is 1. From -127
// down the result is +0, between there and -126 it is denormal and inexact.
BERTKERN_DEVICE float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: the sum's last bit is of value 1
  constexpr int kExponent = 23;          // where it begins in a float
  constexpr uint32_t kOne = 127u << kExponent;
  // Of the least greatest relative error on [-1/2, 1/2].
  constexpr float kC1 = 0x1.62e12cp-1f, kC2 = 0x1.ec0378p-3f, kC3 = 0x1.c9fc46p-5f,
                  kC4 = 0x1.3a02ccp-7f;
  x = ptx::max_nan(x, -127.0f);
  union {
    float value;
    uint32_t bits;
  } shifted{x + kRound}, power;
  const float f = x - (shifted.value - kRound);
  power.bits = (shifted.bits << kExponent) + kOne;  // the bits above n leave at the top
  return power.value * ptx::fma(ptx::fma(ptx::fma(ptx::fma(kC4, f, kC3), f, kC2), f, kC1), f, 1.0f);
}

}  // namespace bertkern::sm90
