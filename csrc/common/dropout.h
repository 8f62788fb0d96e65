// The one generator of dropout bits, the same on every backend.
//
// 16 random bits r are a function of (seed, sequence, head, row, column); an element is kept when
// r >= threshold. Four elements {row, row ^ 8} x {column, column ^ 8} share one 32-bit hash x:
// these are the values that one thread holds in an mma accumulator. All arithmetic wraps in uint32.
// The mixer is "lowbias32" (C. Wellons, Prospecting for hash functions, 2018).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace bertkern {

constexpr uint32_t kHashMulA = 0x7FEB352Du;
constexpr uint32_t kHashMulB = 0x846CA68Bu;
constexpr uint32_t kHashMulC = 0xC2B2AE35u;
constexpr uint32_t kHashAdd = 0x9E3779B9u;
constexpr uint32_t kHashAdd2 = 0x85EBCA6Bu;
constexpr uint32_t kHiddenHead =
    0xFFFFFFFFu;  // the "head" of hidden-state dropout; its sequence is 0

BERTKERN_HOST_DEVICE constexpr uint32_t hash_mix(uint32_t x) {
  x ^= x >> 16;
  x *= kHashMulA;
  x ^= x >> 15;
  x *= kHashMulB;
  x ^= x >> 16;
  return x;
}

// An index with its bit 3 removed: `i` and `i ^ 8` fall into one group.
BERTKERN_HOST_DEVICE constexpr uint32_t dropout_group(uint32_t i) {
  return ((i >> 4) << 3) | (i & 7u);
}

// Keys of one (seed, sequence, head).
struct DropoutStream {
  uint32_t a, b;
};

BERTKERN_HOST_DEVICE constexpr DropoutStream dropout_stream(uint64_t seed, uint32_t sequence,
                                                            uint32_t head) {
  const uint32_t lo = static_cast<uint32_t>(seed);
  const uint32_t hi = static_cast<uint32_t>(seed >> 32);
  return {hash_mix(hash_mix(hash_mix(hash_mix(lo + kHashAdd) ^ hi) ^ sequence) ^ head),
          hash_mix(hash_mix(hash_mix(hash_mix(hi + kHashAdd2) ^ lo) ^ head) ^ sequence)};
}

// Keys of one row of a stream; `multiplier` is chosen by bit 3 of the row.
struct DropoutRow {
  uint32_t a, b, multiplier;
};

BERTKERN_HOST_DEVICE constexpr DropoutRow dropout_row(DropoutStream stream, uint32_t row) {
  const uint32_t group = dropout_group(row);
  return {hash_mix(stream.a ^ group), hash_mix(stream.b + group * kHashAdd),
          (row & 8u) ? kHashMulC : kHashMulB};
}

// What the elements of a row group and a column group share. `group` may be a vector of uint32.
template <typename U>
BERTKERN_HOST_DEVICE constexpr U dropout_state(DropoutRow row, U group) {
  U x = group * kHashAdd + row.a;
  x ^= x >> 16;
  x *= kHashMulA;
  return x ^ (x >> 15) ^ row.b;
}

// Both halves of the hash of one column group: the low 16 bits are for the column with bit 3 clear,
// the high 16 bits for the column with bit 3 set.
template <typename U>
BERTKERN_HOST_DEVICE constexpr U dropout_pair(DropoutRow row, U group) {
  U y = dropout_state(row, group) * row.multiplier;
  y ^= y >> 16;
  return y;
}

// The 16 random bits of one element.
BERTKERN_HOST_DEVICE constexpr uint32_t dropout_bits(DropoutRow row, uint32_t column) {
  const uint32_t pair = dropout_pair(row, dropout_group(column));
  return (column & 8u) ? pair >> 16 : pair & 0xFFFFu;
}

}  // namespace bertkern
