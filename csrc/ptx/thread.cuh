// Where a thread is, what its warp and block share: indices, shuffles, barriers, shared memory.
// Kernels know the machine only through csrc/ptx; this file and its neighbours are what an emulator
// replaces.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define BERTKERN_DEVICE __device__ __forceinline__
#define BERTKERN_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads)

namespace bertkern::ptx {

constexpr int kWarpThreads = 32;

BERTKERN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
BERTKERN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
BERTKERN_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

// The block's dynamic shared memory; 16-byte aligned, as many bytes as the launch asked for.
BERTKERN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char bytes[];
  return bytes;
}

// barrier.sync 0: every thread of the block arrives before any goes on; shared memory is then
// agreed upon.
BERTKERN_DEVICE void block_barrier() { asm volatile("barrier.sync 0;" ::: "memory"); }

// shfl.sync.bfly: the value of lane (lane ^ mask), 1 <= mask < 32. All 32 lanes take part.
BERTKERN_DEVICE float shuffle_xor(float value, int mask) {
  float other;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=f"(other)
               : "f"(value), "r"(mask));
  return other;
}

// rsqrt.approx.ftz.f32 has 2^-22.9 relative error: one Newton step makes it as good as 1 / sqrt(x).
BERTKERN_DEVICE float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float refined = y * (1.5f - 0.5f * x * y * y);
  return y < 3e38f && y > 0.0f && x > 1e-37f ? refined
                                             : y;  // x of 0, Inf and NaN: as the machine says
}

}  // namespace bertkern::ptx
