// csrc/cuda/launch.h for the emulator: a grid goes to the machine.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "machine/machine.h"

namespace bertkern::cuda {

struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;
  int cluster = 1;  // blocks
};

struct DeviceGuard {
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}  // as there, so that a guard is not an unused variable
};

// Outside what is watched: a kernel's arguments are the launch's, in no memory that kernels share.
template <typename Arguments>
__attribute__((no_sanitize("thread"))) void enter_kernel(void (*kernel)(), const void* arguments) {
  reinterpret_cast<void (*)(Arguments)>(kernel)(*static_cast<const Arguments*>(arguments));
}

template <typename Arguments>
void launch(void (*kernel)(Arguments), const Launch& shape, const Arguments& arguments, void*,
            const char* what) {
  emulator::run_grid({shape.blocks, shape.threads, shape.shared_bytes, shape.cluster, what},
                     &enter_kernel<Arguments>, reinterpret_cast<void (*)()>(kernel), &arguments);
}

}  // namespace bertkern::cuda
