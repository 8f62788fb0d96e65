// csrc/ptx/thread.cuh on the emulator's machine.
#pragma once

#include <cstdint>

#include "machine/machine.h"
#include "machine/number.h"

// Always inlined: what is left as a call would hand over references, and so memory.
#define BERTKERN_DEVICE inline __attribute__((always_inline))
#define BERTKERN_KERNEL(max_threads) void

namespace bertkern::ptx {

using emulator::kWarpThreads;

BERTKERN_DEVICE int thread_index() { return emulator::thread_index(); }
BERTKERN_DEVICE int block_index() { return emulator::block_index(); }
BERTKERN_DEVICE int block_count() { return emulator::block_count(); }

BERTKERN_DEVICE void block_barrier() { emulator::block_barrier(); }
BERTKERN_DEVICE void warp_barrier() { emulator::warp_barrier(); }
BERTKERN_DEVICE void named_barrier_sync(int id, int threads) {
  emulator::named_barrier_sync(id, threads);
}
BERTKERN_DEVICE void named_barrier_arrive(int id, int threads) {
  emulator::named_barrier_arrive(id, threads);
}

BERTKERN_DEVICE float shuffle_xor(float value, int mask) {
  return emulator::float_of_bits(emulator::shuffle_xor(emulator::bits_of_float(value), mask));
}
BERTKERN_DEVICE uint32_t shuffle_index(uint32_t value, int lane) {
  return emulator::shuffle_index(value, lane);
}
BERTKERN_DEVICE bool vote_any(bool predicate) { return emulator::vote_any(predicate); }

}  // namespace bertkern::ptx
