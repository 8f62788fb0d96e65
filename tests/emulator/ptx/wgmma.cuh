// csrc/ptx/wgmma.cuh on the emulator's machine. The registers are the kernel's own arrays: products
// that are under way know where they are.
#pragma once

#include <type_traits>

#include "common/shared_tile.h"
#include "ptx/memory.cuh"

namespace bertkern::ptx {

template <Swizzle kSwizzle, int kLeadingBytes, int kStrideBytes>
BERTKERN_DEVICE MatrixDescriptor describe_tile(const void* tile) {
  emulator::check_tile(tile, swizzle_alignment(kSwizzle));
  return matrix_descriptor<kSwizzle, kLeadingBytes, kStrideBytes>(shared_address(tile));
}

// The compiler here moves nothing across calls; that products' registers are held is checked.
template <typename Registers>
BERTKERN_DEVICE void hold(Registers& registers) {
  emulator::warpgroup_hold(&registers, sizeof(registers) / 4);
}

template <typename... Registers>
BERTKERN_DEVICE void wgmma_fence(Registers&... registers) {
  (emulator::warpgroup_fence(&registers, sizeof(registers) / 4), ...);
}

BERTKERN_DEVICE void wgmma_commit() { emulator::warpgroup_commit(); }

template <int kPending, typename... Registers>
BERTKERN_DEVICE void wgmma_wait(Registers&... registers) {
  static_assert(kPending >= 0 && kPending <= 7, "wgmma.wait_group takes 0 to 7");
  emulator::warpgroup_wait(kPending);
  (hold(registers), ...);
}

template <int kTiles, typename T>
constexpr bool is_wgmma() {
  constexpr int kN = 8 * kTiles;
  return (kN == 32 || kN == 64 || kN == 96 || kN == 128 || kN == 192 || kN == 256) &&
         (std::is_same_v<T, half> || std::is_same_v<T, bfloat16>);
}

template <typename T>
constexpr emulator::Format format_of() {
  return std::is_same_v<T, half> ? emulator::Format::kHalf : emulator::Format::kBFloat16;
}

template <bool kTransposeA, bool kTransposeB, typename T, int kTiles>
BERTKERN_DEVICE void wgmma(float (&d)[kTiles][4], MatrixDescriptor a, MatrixDescriptor b,
                           bool accumulate, T) {
  static_assert(is_wgmma<kTiles, T>(), "N is one of 32, 64, 96, 128, 192 and 256");
  emulator::warpgroup_product(
      &d[0][0], 4 * kTiles,
      {a.bits, b.bits, nullptr, kTransposeA, kTransposeB, accumulate, format_of<T>()});
}

template <bool kTransposeB, typename T, int kTiles>
BERTKERN_DEVICE void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], MatrixDescriptor b,
                           bool accumulate, T) {
  static_assert(is_wgmma<kTiles, T>(), "N is one of 32, 64, 96, 128, 192 and 256");
  emulator::warpgroup_product(&d[0][0], 4 * kTiles,
                              {0, b.bits, a, false, kTransposeB, accumulate, format_of<T>()});
}

}  // namespace bertkern::ptx
