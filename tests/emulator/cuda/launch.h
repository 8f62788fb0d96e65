// csrc/cuda/launch.h for the emulator: a grid is a loop over its blocks.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../machine.h"

namespace bertkern::cuda {

struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;
};

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline bool descending = false;  // the order in which a block's threads run

template <typename Arguments>
void launch(void (*kernel)(Arguments), const Launch& shape, const Arguments& arguments, void*,
            const char*) {
  emulator::Block block(shape.threads, shape.shared_bytes, descending);
  for (int64_t i = 0; i < shape.blocks; ++i) {
    block.run(i, shape.blocks, [&] { kernel(arguments); });
  }
}

}  // namespace bertkern::cuda
