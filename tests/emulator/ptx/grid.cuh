// csrc/ptx/grid.cuh on the emulator's machine. A grid runs when the one before it is over.
#pragma once

#include "ptx/thread.cuh"

namespace bertkern::ptx {

BERTKERN_DEVICE int atomic_add(int* address, int value) {
  return emulator::atomic_add(address, value, false);
}
BERTKERN_DEVICE int atomic_add_acq_rel(int* address, int value) {
  return emulator::atomic_add(address, value, true);
}
BERTKERN_DEVICE int load_acquire(const int* address) { return emulator::load_word(address, true); }
BERTKERN_DEVICE int load_relaxed(const int* address) { return emulator::load_word(address, false); }

BERTKERN_DEVICE void wait_until_equal(const int* address, int value) {
  while (emulator::load_word(address, true) != value) {
  }
}

BERTKERN_DEVICE void store_release(int* address, int value) {
  emulator::store_word(address, value);
}

BERTKERN_DEVICE void grid_launch_dependents() {}
BERTKERN_DEVICE void grid_wait() {}

}  // namespace bertkern::ptx
