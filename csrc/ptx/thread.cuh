// Where a thread is, what its warp and block share: indices, shuffles, votes, barriers.
// Kernels know the machine only through csrc/ptx; this file and its neighbours are what an emulator
// replaces.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define BERTKERN_DEVICE __device__ __forceinline__
#define BERTKERN_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads, 1)

namespace bertkern::ptx {

constexpr int kWarpThreads = 32;

BERTKERN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
BERTKERN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
BERTKERN_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

// barrier.sync 0: every thread of the block arrives before any goes on; memory is then agreed upon.
BERTKERN_DEVICE void block_barrier() { asm volatile("barrier.sync 0;" ::: "memory"); }

// bar.warp.sync: the 32 threads of the warp arrive before any goes on; memory is then agreed upon.
BERTKERN_DEVICE void warp_barrier() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

// barrier.sync id, threads: as block_barrier for some warps of the block. 1 <= id <= 15 (0 is
// block_barrier's); threads is a multiple of 32, the same at each use until all have arrived.
BERTKERN_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// barrier.arrive id, threads: counts towards the barrier and goes on at once.
BERTKERN_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// shfl.sync.bfly: the value of lane (lane ^ mask), 1 <= mask < 32. All 32 lanes take part.
BERTKERN_DEVICE float shuffle_xor(float value, int mask) {
  float other;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=f"(other)
               : "f"(value), "r"(mask));
  return other;
}

// shfl.sync.idx: the value of lane `lane`, 0 <= lane < 32. All 32 lanes take part.
BERTKERN_DEVICE uint32_t shuffle_index(uint32_t value, int lane) {
  uint32_t other;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=r"(other)
               : "r"(value), "r"(lane));
  return other;
}

// vote.sync.any: whether the predicate holds in some lane. All 32 lanes take part.
BERTKERN_DEVICE bool vote_any(bool predicate) {
  uint32_t any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; vote.sync.any.pred q, p, 0xffffffff; "
      "selp.u32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(predicate)));
  return any != 0;
}

}  // namespace bertkern::ptx
