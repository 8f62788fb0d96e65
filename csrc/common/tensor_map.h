// A tensor map: what the copy engine (TMA) has to know of a tensor and of the boxes that are copied
// of it. Opaque; the host makes it (cuda/tensor_map.h), kernels take it as an argument.
#pragma once

#include <cstdint>

namespace bertkern {

// It must stay where the launch put it, so that it has an address that the copy engine can read: in
// a kernel's BERTKERN_GRID_CONSTANT argument, itself or as a member of the argument struct. The
// engine asks for multiples of 64; CUDA 13 aligns its own type to 128.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

}  // namespace bertkern
