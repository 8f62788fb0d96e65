// csrc/ptx/memory.cuh on the emulator's machine. Types of 16 bits are their bits: host compilers
// do not agree on a half type.
#pragma once

#include <cstdint>

#include "ptx/thread.cuh"

namespace bertkern::ptx {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

using emulator::Words4;

BERTKERN_DEVICE char* shared_memory() { return emulator::shared_memory(); }

BERTKERN_DEVICE uint32_t shared_address(const void* address) {
  return emulator::shared_address(address);
}

BERTKERN_DEVICE Words4 load_global_16(const void* address) {
  return emulator::load_global_16(address);
}
BERTKERN_DEVICE void store_global_16(void* address, const Words4& v) {
  emulator::store_global_16(address, v);
}

BERTKERN_DEVICE float to_float(float x) { return x; }
BERTKERN_DEVICE float to_float(half x) { return emulator::float_of_half(x.bits); }
BERTKERN_DEVICE float to_float(bfloat16 x) { return emulator::float_of_bfloat16(x.bits); }

BERTKERN_DEVICE float from_float(float x, float) { return x; }
BERTKERN_DEVICE half from_float(float x, half) { return {emulator::half_of_float(x)}; }
BERTKERN_DEVICE bfloat16 from_float(float x, bfloat16) { return {emulator::bfloat16_of_float(x)}; }

template <typename T>
BERTKERN_DEVICE uint32_t pack(float low, float high, T type) {
  const uint32_t upper = from_float(high, type).bits;
  return upper << 16 | from_float(low, type).bits;
}

}  // namespace bertkern::ptx
