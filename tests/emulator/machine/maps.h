// Tensor maps of this machine: what make_tensor_map writes into the opaque words.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/shared_tile.h"

namespace bertkern::emulator {

struct EmulatedMap {
  uint64_t mark;  // says that this is a map
  char* data;
  int64_t sizes[5];
  int64_t strides[4];  // in elements, from the second dimension on
  int16_t box[5];
  int16_t rank;
  Swizzle swizzle;
};

// The map at an address that a kernel has. Fails for another rank (0: any), and for what is none.
const EmulatedMap& read_tensor_map(const void* map, int rank, const void* place);

}  // namespace bertkern::emulator
