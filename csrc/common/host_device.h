// BERTKERN_HOST_DEVICE marks functions that CPU and CUDA code share. On the host they are always
// inlined: the same header is compiled once per instruction set, and an out-of-line copy from one
// of those translation units must never be what the linker keeps for all of them.
#pragma once

#if defined(__CUDACC__)
#define BERTKERN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BERTKERN_HOST_DEVICE inline __attribute__((always_inline))
#endif
