// Shared memory, loads and stores of 16 bytes, and the casts of the 16-bit formats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ptx/thread.cuh"

namespace bertkern::ptx {

using half = __half;
using bfloat16 = __nv_bfloat16;

// Four 32-bit words, the widest that one thread moves at a time.
struct alignas(16) Words4 {
  uint32_t word[4];
};

// The block's dynamic shared memory, as many bytes as the launch asked for; its start is a multiple
// of 1024 (what the swizzles of TMA and wgmma count from).
BERTKERN_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char bytes[];
  return bytes;
}

// An address in shared memory as the 32 bits that instructions take.
BERTKERN_DEVICE uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

// ld.global.v4.b32; the address must be a multiple of 16.
BERTKERN_DEVICE Words4 load_global_16(const void* address) {
  Words4 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(__cvta_generic_to_global(address)));
  return v;
}

// st.global.v4.b32; the address must be a multiple of 16.
BERTKERN_DEVICE void store_global_16(void* address, const Words4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
               "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

BERTKERN_DEVICE float to_float(float x) { return x; }
BERTKERN_DEVICE float to_float(half x) { return __half2float(x); }
BERTKERN_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }

// Round to nearest even. The second argument only names the type.
BERTKERN_DEVICE float from_float(float x, float) { return x; }
BERTKERN_DEVICE half from_float(float x, half) { return __float2half_rn(x); }
BERTKERN_DEVICE bfloat16 from_float(float x, bfloat16) { return __float2bfloat16_rn(x); }

// cvt.rn.f16x2.f32 and cvt.rn.bf16x2.f32: two values in one word, the first in the low half.
BERTKERN_DEVICE uint32_t pack(float low, float high, half) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
BERTKERN_DEVICE uint32_t pack(float low, float high, bfloat16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

}  // namespace bertkern::ptx
