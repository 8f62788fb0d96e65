// Fast mathematics of the special-function unit.
#pragma once

#include "ptx/thread.cuh"

namespace bertkern::ptx {

// ex2.approx.ftz.f32: 2^x with a relative error of 2^-22.5 at most; -Inf gives 0.
BERTKERN_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// lg2.approx.ftz.f32: log2(x) with an absolute error of 2^-22 at most near 1, relative elsewhere.
BERTKERN_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx.ftz.f32: 1 / x with a relative error of 2^-23 at most.
BERTKERN_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rsqrt.approx.ftz.f32 has 2^-22.9 relative error: one Newton step makes it as good as 1 / sqrt(x).
BERTKERN_DEVICE float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float refined = y * (1.5f - 0.5f * x * y * y);
  return y < 3e38f && y > 0.0f && x > 1e-37f ? refined
                                             : y;  // x of 0, Inf and NaN: as the machine says
}

// max.f32: the greater; of a NaN and a number, the number.
BERTKERN_DEVICE float max(float a, float b) {
  float c;
  asm("max.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// max.NaN.f32: the greater; NaN if one of them is.
BERTKERN_DEVICE float max_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// fma.rn.f32: a · b + c, rounded once.
BERTKERN_DEVICE float fma(float a, float b, float c) {
  float d;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

}  // namespace bertkern::ptx
