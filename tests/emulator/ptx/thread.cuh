// csrc/ptx/thread.cuh for the emulator: the same functions on a machine of fibers.
#pragma once

#include <cmath>

#include "../machine.h"

#define BERTKERN_DEVICE inline
#define BERTKERN_KERNEL(max_threads) void

namespace bertkern::ptx {

using emulator::kWarpThreads;

inline int thread_index() { return emulator::Block::current().thread(); }
inline int block_index() { return static_cast<int>(emulator::Block::current().index()); }
inline int block_count() { return static_cast<int>(emulator::Block::current().count()); }
inline char* shared_memory() { return emulator::Block::current().shared(); }
inline void block_barrier() { emulator::Block::current().barrier(); }
inline float shuffle_xor(float value, int mask) {
  return emulator::Block::current().shuffle_xor(value, mask);
}
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }

}  // namespace bertkern::ptx
