// Tiles in shared memory as the copy engine (TMA) writes them and wgmma reads them: the swizzles,
// and the descriptor that tells wgmma of a tile (PTX ISA, "Shared Memory Matrix Layout" and "Matrix
// Descriptor" of wgmma).
//
// A swizzled tile has rows of a span of 32, 64 or 128 bytes. Chunk c (16 bytes) of row r stands at
// chunk c ^ (r % 8), c ^ (r / 2 % 4) or c ^ (r / 4 % 2) of the row for a span of 128, 64 or 32
// bytes: 8 chunks below each other, which wgmma reads at a time, fall on different banks. The
// pattern repeats every 8 spans and counts from address 0, so tiles start on multiples of that.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace bertkern {

// The value is the span in bytes; without a swizzle, that of one chunk.
enum class Swizzle : int { kNone = 16, k32 = 32, k64 = 64, k128 = 128 };

BERTKERN_HOST_DEVICE constexpr int swizzle_span(Swizzle swizzle) {
  return static_cast<int>(swizzle);
}

// What a tile's address is a multiple of.
BERTKERN_HOST_DEVICE constexpr int swizzle_alignment(Swizzle swizzle) {
  return swizzle == Swizzle::kNone ? 16 : 8 * swizzle_span(swizzle);
}

// Where byte `offset` of a tile of rows of one span stands: bits 4 to 6 (128), 4 and 5 (64) or 4
// (32) are flipped by the bits that are three places higher.
BERTKERN_HOST_DEVICE constexpr int swizzled(int offset, Swizzle swizzle) {
  return offset ^ ((offset >> 3) & (swizzle_span(swizzle) - 16));
}

// The 64 bits by which wgmma finds an operand in shared memory. Addresses and offsets are given
// without their last 4 bits, in 14:
//   0-13 start address, 16-29 leading byte offset, 32-45 stride byte offset, 49-51 base offset,
//   62-63 swizzle: 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes.
// The base offset is 0, since tiles start where the swizzle's pattern does.
struct MatrixDescriptor {
  uint64_t bits;
};

// address: in shared memory, below 2^18. What the offsets are of, for 16-bit elements:
//   K-major (not transposed): a row of the tile holds elements along k.
//     stride   from 8 rows (m or n) to the next 8
//     leading  without a swizzle: from 8 elements along k to the next 8; else not looked at
//   M- or N-major (transposed): a row holds elements along m or n.
//     swizzled:  leading  from one span of m or n to the next (n > span / 2)
//                stride   from 8 rows (k) to the next 8
//     without:   leading  from 8 rows (k) to the next 8
//                stride   from 8 elements along m or n to the next 8
template <Swizzle kSwizzle, int kLeadingBytes, int kStrideBytes>
BERTKERN_HOST_DEVICE constexpr MatrixDescriptor matrix_descriptor(uint32_t address) {
  static_assert(kLeadingBytes >= 0 && kLeadingBytes < 1 << 18 && kLeadingBytes % 16 == 0,
                "14 bits in units of 16 bytes");
  static_assert(kStrideBytes >= 0 && kStrideBytes < 1 << 18 && kStrideBytes % 16 == 0,
                "14 bits in units of 16 bytes");
  constexpr uint64_t kMode = kSwizzle == Swizzle::k128  ? 1
                             : kSwizzle == Swizzle::k64 ? 2
                             : kSwizzle == Swizzle::k32 ? 3
                                                        : 0;
  constexpr uint64_t kFixed = kMode << 62 | static_cast<uint64_t>(kStrideBytes >> 4) << 32 |
                              static_cast<uint64_t>(kLeadingBytes >> 4) << 16;
  return {kFixed | ((address & 0x3FFFFu) >> 4)};
}

// The descriptor of what starts `bytes` later, a multiple of 16 inside the same tile: the next 16 k
// are 32 bytes on in a row of a K-major tile (the swizzle applies to the address that results), and
// 16 rows on in a transposed one.
BERTKERN_HOST_DEVICE constexpr MatrixDescriptor advance(MatrixDescriptor descriptor, int bytes) {
  // No carry leaves the address, so the upper half stays the constant that it is.
  const uint32_t low = static_cast<uint32_t>(descriptor.bits) + static_cast<uint32_t>(bytes >> 4);
  return {(descriptor.bits & 0xFFFFFFFF00000000u) | low};
}

}  // namespace bertkern
