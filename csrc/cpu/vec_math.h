// exp to 1-2 ulp of fp32, the activations to the accuracy stated with them, on vectors. NaN
// propagates. Compiled once per instruction set (see params.h).
#pragma once

#include "vec.h"

namespace bertkern::BERTKERN_ISA {

// exp(x) for x <= 88. Below −87.3 the result is 0 (no denormals). x = n·ln2 + r with |r| <= ln2/2;
// ln2 in two parts, so that n·ln2 is exact where it matters; exp(r) by the polynomial of Cephes'
// expf (S. Moshier).
BERTKERN_INLINE Vf vexp(Vf x) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  constexpr float kLeast = -87.33654f;
  const Vf clamped = vmax(splat(kLeast), x);
  const Vf shifted = clamped * kLog2e + kRound;
  const Vf n = shifted - kRound;
  const Vf r = (clamped - n * kLn2High) - n * kLn2Low;
  Vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // The low bits of `shifted` hold n: they move into the exponent.
  const Vf power = bit_cast<Vf>((bit_cast<Vi>(shifted) << 23) + 0x3F800000);
  return bit_cast<Vf>(~(x < kLeast) & bit_cast<Vi>(p * power));
}

// Coefficients of polynomials, highest power first.
constexpr float kCdfTop[] = {2.276558743e-08f, 6.345891528e-06f, 1.683567234e-04f,
                             4.674447279e-03f, 3.380979330e-02f, 3.989422443e-01f};
constexpr float kCdfBottom[] = {1.197507385e-06f, 7.348015171e-05f, 1.881844848e-03f,
                                2.862082445e-02f, 2.514145883e-01f, 1.000000000e+00f};
constexpr float kSlopeTop[] = {-2.870526431e-11f, 1.287978940e-08f, 1.107995678e-06f,
                               3.204608517e-05f,  2.802922609e-04f, 1.358026878e-02f,
                               -1.830272529e-02f, 7.978845362e-01f};
constexpr float kSlopeBottom[] = {3.593663407e-07f, 1.075653128e-05f, 2.573762750e-04f,
                                  4.136886813e-03f, 4.548618566e-02f, 3.103938823e-01f,
                                  1.000000000e+00f};

template <int kTerms>
BERTKERN_INLINE Vf polynomial(const float (&coefficient)[kTerms], Vf x) {
  Vf p = splat(coefficient[0]);
#pragma GCC unroll 8
  for (int i = 1; i < kTerms; ++i) p = p * x + coefficient[i];
  return p;
}

// Φ(z) and gelu'(z) = Φ(z) + z·φ(z), less 1/2, are odd: z·P(z²)/Q(z²), by minimax fits made for
// this file on |z| <= most to 8e-9 and 5e-9; fp32 arithmetic makes it 1.5e-7 and 2.5e-7. Beyond,
// they are ±1/2, to 1e-7.
template <int kTop, int kBottom>
BERTKERN_INLINE Vf odd_ratio(Vf z, float most, const float (&top)[kTop],
                             const float (&bottom)[kBottom]) {
  const Vi sign = bit_cast<Vi>(z) & INT32_MIN;
  const Vf u = z * z;
  const Vf inside = z * polynomial(top, u) / polynomial(bottom, u);
  const Vf outside = bit_cast<Vf>(sign | bit_cast<Vi>(splat(0.5f)));
  return u > most * most ? outside : inside;
}

BERTKERN_INLINE Vf gelu(Vf z) { return z * odd_ratio(z, 5.5f, kCdfTop, kCdfBottom) + 0.5f * z; }
BERTKERN_INLINE Vf gelu_slope(Vf z) { return odd_ratio(z, 6.0f, kSlopeTop, kSlopeBottom) + 0.5f; }

// tanh's gate, sigmoid(u) with u = 2·√(2/π)·(z + 0.044715 z³), as 1 + tanh(u/2) = 2·sigmoid(u). Its
// parts come from e = exp(−|u|), so that sigmoid(u)·sigmoid(−u) = e / (1 + e)² cancels nothing.
struct TanhGate {
  Vf gate, slope, inner;  // sigmoid(u), sigmoid'(u), du/dz
};

BERTKERN_INLINE TanhGate tanh_gate(Vf z) {
  constexpr float kGain = 1.5957691216057308f, kCubic = 0.044715f;
  constexpr float kMost = 30.0f;  // the gate is 0 or 1 there, and z² has not overflowed
  const Vf a = vmax(splat(-kMost), vmin(splat(kMost), z));
  const Vf u = kGain * (a + kCubic * a * a * a);
  const Vf e = vexp(bit_cast<Vf>(bit_cast<Vi>(u) | INT32_MIN));
  const Vf inverse = 1.0f / (1.0f + e);
  return {select(u < 0.0f, e, splat(1.0f)) * inverse, e * inverse * inverse,
          kGain * (1.0f + 3.0f * kCubic * a * a)};
}

// y = act(z):  gelu z·Φ(z);  gelu_tanh z·sigmoid(u)  (Hendrycks & Gimpel 2016)
template <Activation kActivation>
BERTKERN_INLINE Vf activate(Vf z) {
  if constexpr (kActivation == Activation::kGelu) return gelu(z);
  if constexpr (kActivation == Activation::kGeluTanh) return z * tanh_gate(z).gate;
  if constexpr (kActivation == Activation::kRelu) return select(z < 0.0f, Vf{}, z);
  return z;
}

// act'(z):  gelu Φ(z) + z·φ(z);  gelu_tanh sigmoid(u) + z·sigmoid'(u)·u';  relu 1 where z > 0.
template <Activation kActivation>
BERTKERN_INLINE Vf activation_slope(Vf z) {
  if constexpr (kActivation == Activation::kGelu) return gelu_slope(z);
  if constexpr (kActivation == Activation::kGeluTanh) {
    const TanhGate at = tanh_gate(z);
    return at.gate + z * at.slope * at.inner;
  }
  if constexpr (kActivation == Activation::kRelu) return select(z > 0.0f, splat(1.0f), Vf{});
  return splat(1.0f);
}

// Multiplies columns [first, first + count) of a row by 0 or `scale`; `first` is a multiple of 16,
// and 15 floats behind the row may be overwritten. A dropped value is 0, NaN or not.
BERTKERN_INLINE void drop(float* values, int64_t first, int64_t count, DropoutRow keys,
                          uint32_t threshold, float scale) {
  typedef uint32_t Bits __attribute__((vector_size(32)));
  typedef float Part __attribute__((vector_size(32)));
  const Bits lane = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int64_t c = 0; c < count; c += 16) {
    const Bits pair = dropout_pair(keys, lane + dropout_group(static_cast<uint32_t>(first + c)));
    const Bits half[2] = {pair & 0xFFFFu, pair >> 16};
    for (int i = 0; i < 2; ++i) {
      Part x;
      std::memcpy(&x, values + c + 8 * i, sizeof(x));
      x = bit_cast<Part>(bit_cast<Bits>(x * scale) & bit_cast<Bits>(half[i] >= threshold));
      std::memcpy(values + c + 8 * i, &x, sizeof(x));
    }
  }
}

}  // namespace bertkern::BERTKERN_ISA
