// What the files of small kernels with faults share: the table of their kernels, and where these
// keep barriers and numbers in shared memory.
//
// With `fault` 0 a kernel is right; each other value makes one mistake. Lines that an error must
// name end in a comment that the test knows, such as `// first`.
#pragma once

#include <string>
#include <utility>

#include "cuda/launch.h"
#include "kernels/arguments.h"
#include "ptx/copy_async.cuh"
#include "ptx/fence.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/registers.cuh"
#include "ptx/store_matrix.cuh"
#include "ptx/thread.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace bertkern::emulator::test {

using FaultKernel = void (*)(Arguments);

// Adds kernels to those of run_fault; a file does it once, for a constant of its own.
bool add_faults(std::initializer_list<std::pair<const std::string, FaultKernel>> kernels);

BERTKERN_DEVICE float* shared_floats() { return reinterpret_cast<float*>(ptx::shared_memory()); }
BERTKERN_DEVICE int lane_index() { return ptx::thread_index() % 32; }
BERTKERN_DEVICE int warp_index() { return ptx::thread_index() / 32; }

// Shared memory where barriers are used: they stand first, numbers from byte 1024 on.
BERTKERN_DEVICE ptx::Barrier* shared_barriers() {
  return reinterpret_cast<ptx::Barrier*>(ptx::shared_memory());
}
BERTKERN_DEVICE float* shared_values() { return shared_floats() + 256; }

// By thread 0; others may use the barrier after a barrier of the block.
BERTKERN_DEVICE void make_barrier(ptx::Barrier* barrier, int arrivals) {
  if (ptx::thread_index() != 0) return;
  ptx::barrier_init(barrier, arrivals);
  ptx::barrier_init_fence();
}

}  // namespace bertkern::emulator::test
