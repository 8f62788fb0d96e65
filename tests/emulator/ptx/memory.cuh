// csrc/ptx/memory.cuh for the emulator: 16-byte accesses that check their alignment, and casts.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "thread.cuh"

namespace bertkern::ptx {

using half = _Float16;
struct bfloat16 {
  uint16_t bits;
};

struct alignas(16) Words4 {
  uint32_t word[4];
};

inline void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    std::fputs("an access of 16 bytes that is not aligned\n", stderr);
    std::abort();
  }
}

inline Words4 load_global_16(const void* address) {
  check_aligned(address);
  Words4 v;
  std::memcpy(&v, address, sizeof(v));
  return v;
}
inline void store_global_16(void* address, const Words4& v) {
  check_aligned(address);
  std::memcpy(address, &v, sizeof(v));
}

inline float to_float(float x) { return x; }
inline float to_float(half x) { return static_cast<float>(x); }
inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float from_float(float x, float) { return x; }
inline half from_float(float x, half) { return static_cast<half>(x); }
inline bfloat16 from_float(float x, bfloat16) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace bertkern::ptx
