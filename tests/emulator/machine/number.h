// The 16-bit formats by their bits: casts to fp32 and, rounded to nearest even, back.
#pragma once

#include <cstdint>
#include <cstring>

namespace bertkern::emulator {

constexpr uint16_t kCanonicalNan = 0x7FFF;  // what cvt makes of every NaN, in both formats

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  if (magnitude >= 0x0F800000u) return float_of_bits(sign | (magnitude + 0x70000000u));  // Inf, NaN
  if (magnitude >= 0x00800000u) return float_of_bits(sign | (magnitude + 0x38000000u));
  const float subnormal = static_cast<float>(half & 0x3FFu) * 0x1p-24f;
  return float_of_bits(sign | bits_of_float(subnormal));
}

inline uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > 0x7F800000u) return kCanonicalNan;
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to 65536
  if (magnitude >= 0x38800000u) {
    const uint32_t rebased = magnitude - 0x38000000u;
    return static_cast<uint16_t>(sign | ((rebased + 0xFFFu + ((rebased >> 13) & 1u)) >> 13));
  }
  // The unit in the last place of [0.5, 1) is that of subnormal halves: the addition rounds.
  const uint32_t aligned = bits_of_float(float_of_bits(magnitude) + 0.5f);
  return static_cast<uint16_t>(sign | (aligned - 0x3F000000u));
}

inline float float_of_bfloat16(uint16_t bits) {
  return float_of_bits(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return kCanonicalNan;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace bertkern::emulator
