// Vectors of one instruction set on GCC/Clang vector extensions: types, loads and stores, casts.
// Compiled once per instruction set into the namespace BERTKERN_ISA (see params.h).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "params.h"

#ifndef BERTKERN_ISA
#error "compile with -DBERTKERN_ISA=isa_<name>"
#endif

#define BERTKERN_INLINE inline __attribute__((always_inline))

namespace bertkern::BERTKERN_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vf __attribute__((vector_size(4 * kWidth)));
typedef int32_t Vi __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Vu __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Vh __attribute__((vector_size(2 * kWidth)));

// Storage types of the two 16-bit formats.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

BERTKERN_INLINE Vf splat(float x) { return Vf{} + x; }

template <typename To, typename From>
BERTKERN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// mask ? a : b; a mask lane is all ones or zero, as comparisons give.
BERTKERN_INLINE Vf select(Vi mask, Vf a, Vf b) {
  return bit_cast<Vf>((mask & bit_cast<Vi>(a)) | (~mask & bit_cast<Vi>(b)));
}

// b where either is NaN, as x86's instructions have it.
BERTKERN_INLINE Vf vmax(Vf a, Vf b) { return a > b ? a : b; }
BERTKERN_INLINE Vf vmin(Vf a, Vf b) { return a < b ? a : b; }

BERTKERN_INLINE Vf load(const float* p) {
  Vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
BERTKERN_INLINE void store(float* p, Vf v) { std::memcpy(p, &v, sizeof(v)); }

// Pairwise, so that the order is the same for every caller.
BERTKERN_INLINE float sum_lanes(Vf v) {
  float lane[kWidth];
  store(lane, v);
  for (int n = kWidth / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  }
  return lane[0];
}

BERTKERN_INLINE float max_lanes(Vf v) {
  float lane[kWidth];
  store(lane, v);
  float most = lane[0];
  for (int i = 1; i < kWidth; ++i) most = lane[i] > most ? lane[i] : most;
  return most;
}

BERTKERN_INLINE Vf to_float(Vh bits, BFloat16) {
  return bit_cast<Vf>(__builtin_convertvector(bits, Vu) << 16);
}

// Round to nearest even; NaN stays NaN.
BERTKERN_INLINE Vh from_float(Vf v, BFloat16) {
  const Vu u = bit_cast<Vu>(v);
  const Vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const Vu nan = (u >> 16) | 0x40u;
  const Vu is_nan = bit_cast<Vu>(v != v);
  return __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), Vh);
}

BERTKERN_INLINE Vf to_float(Vh bits, Half) {
#if defined(__AVX512F__)
  return bit_cast<Vf>(_mm512_maskz_cvtph_ps(0xFFFF, bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return bit_cast<Vf>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  // The exponent is moved by a multiplication with 2^112, which is exact, also for denormal halves.
  const Vu u = __builtin_convertvector(bits, Vu);
  const Vu shifted = (u & 0x7FFFu) << 13;
  const Vu magnitude = bit_cast<Vu>(bit_cast<Vf>(shifted) * 0x1p112f);
  const Vu special = shifted | 0x7F800000u;  // Inf and NaN: exponent 31 becomes 255
  const Vu is_special = bit_cast<Vu>((u & 0x7C00u) == 0x7C00u);
  return bit_cast<Vf>((magnitude & ~is_special) | (special & is_special) | ((u & 0x8000u) << 16));
#endif
}

BERTKERN_INLINE Vh from_float(Vf v, Half) {
#if defined(__AVX512F__)
  return bit_cast<Vh>(
      _mm512_maskz_cvtps_ph(0xFFFF, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bit_cast<Vh>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const Vu u = bit_cast<Vu>(v);
  const Vu magnitude = u & 0x7FFFFFFFu;
  // Normal halves: round the mantissa to 10 bits by an integer addition (ties to even), which may
  // carry into the exponent up to infinity.
  const Vu normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Denormal halves: adding 0.5 makes the float unit round to multiples of 2^-24.
  const Vu denormal = bit_cast<Vu>(bit_cast<Vf>(magnitude) + 0.5f) - 0x3F000000u;
  const Vu is_small = bit_cast<Vu>(magnitude < (113u << 23));
  const Vu is_large = bit_cast<Vu>(magnitude >= 0x477FF000u);  // rounds to 65536 or more
  const Vu is_nan = bit_cast<Vu>(v != v);
  Vu half = (normal & ~is_small) | (denormal & is_small);
  half = (half & ~is_large) | (0x7C00u & is_large);
  half = (half & ~is_nan) | (0x7E00u & is_nan);
  return __builtin_convertvector(half | ((u >> 16) & 0x8000u), Vh);
#endif
}

template <typename T>
BERTKERN_INLINE Vf load_as_float(const T* p) {
  Vh bits;
  std::memcpy(&bits, p, sizeof(bits));
  return to_float(bits, T{});
}
template <>
BERTKERN_INLINE Vf load_as_float<float>(const float* p) {
  return load(p);
}

template <typename T>
BERTKERN_INLINE void store_from_float(T* p, Vf v) {
  const Vh bits = from_float(v, T{});
  std::memcpy(p, &bits, sizeof(bits));
}
template <>
BERTKERN_INLINE void store_from_float<float>(float* p, Vf v) {
  store(p, v);
}

// The first n of kWidth elements; the others are 0 and their memory is not touched.
template <typename T>
BERTKERN_INLINE Vf load_as_float(const T* p, int64_t n) {
  T part[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load_as_float(part);
}

template <typename T>
BERTKERN_INLINE void store_from_float(T* p, Vf v, int64_t n) {
  T part[kWidth];
  store_from_float(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// The first n elements where n < kWidth, else kWidth of them: one test, or none where n is known.
template <typename T>
BERTKERN_INLINE Vf load_columns(const T* p, int64_t n) {
  return n >= kWidth ? load_as_float(p) : load_as_float(p, n);
}
template <typename T>
BERTKERN_INLINE void store_columns(T* p, Vf v, int64_t n) {
  if (n >= kWidth) {
    store_from_float(p, v);
  } else {
    store_from_float(p, v, n);
  }
}

// Casts a row to fp32 in `target`, whose last vector is filled up with zeros.
template <typename T>
BERTKERN_INLINE void read_row(const T* source, float* target, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(target + i, load_as_float(source + i));
  if (i < count) store(target + i, load_as_float(source + i, count - i));
}

template <typename T>
BERTKERN_INLINE void write_row(const float* source, T* target, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store_from_float(target + i, load(source + i));
  if (i < count) store_from_float(target + i, load(source + i), count - i);
}

}  // namespace bertkern::BERTKERN_ISA
