// csrc/ptx/copy_async.cuh on the emulator's machine.
#pragma once

#include "ptx/memory.cuh"

namespace bertkern::ptx {

BERTKERN_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  emulator::copy_async_16(shared, global, valid);
}

BERTKERN_DEVICE void copy_async_commit() { emulator::copy_async_commit(); }

template <int kPending>
BERTKERN_DEVICE void copy_async_wait() {
  static_assert(kPending >= 0, "a number of groups");
  emulator::copy_async_wait(kPending);
}

}  // namespace bertkern::ptx
