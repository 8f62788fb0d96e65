// Products of a warpgroup on operands that the caller lays out: registers, and shared memory with
// the descriptors of tiles in it.
#include "common/shared_tile.h"
#include "cuda/launch.h"
#include "kernels/arguments.h"
#include "ptx/fence.cuh"
#include "ptx/thread.cuh"
#include "ptx/wgmma.cuh"

namespace bertkern::emulator::test {
namespace {

constexpr int kMostSteps = 4;

template <int kTiles, typename T>
BERTKERN_DEVICE void multiply(const WarpgroupProducts& p, float (&d)[kTiles][4],
                              const uint32_t (&a)[4], int step, T type) {
  const auto describe = [&](int operand) {
    const char* tile = ptx::shared_memory() + p.at[2 * step + operand];
    return MatrixDescriptor{static_cast<uint64_t>(p.tiles[2 * step + operand]) |
                            ptx::describe_tile<Swizzle::kNone, 0, 0>(tile).bits};
  };
  const MatrixDescriptor left = describe(0), right = describe(1);
  const bool accumulate = step > 0 || p.accumulate;
  if (p.a_in_registers) {
    if (p.transpose_b) {
      ptx::wgmma<true>(d, a, right, accumulate, type);
    } else {
      ptx::wgmma<false>(d, a, right, accumulate, type);
    }
  } else if (p.transpose_a) {
    if (p.transpose_b) {
      ptx::wgmma<true, true>(d, left, right, accumulate, type);
    } else {
      ptx::wgmma<true, false>(d, left, right, accumulate, type);
    }
  } else if (p.transpose_b) {
    ptx::wgmma<false, true>(d, left, right, accumulate, type);
  } else {
    ptx::wgmma<false, false>(d, left, right, accumulate, type);
  }
}

template <int kN, typename T>
BERTKERN_KERNEL(128)
products(const WarpgroupProducts p) {
  const int t = ptx::thread_index();
  auto* words = reinterpret_cast<uint32_t*>(ptx::shared_memory());
  for (int i = t; i < p.shared_bytes / 4; i += 128) words[i] = p.shared[i];
  ptx::fence_async_shared();
  ptx::block_barrier();
  float d[kN / 8][4];
  uint32_t a[kMostSteps][4] = {};
  for (int i = 0; i < kN / 2; ++i) d[i / 4][i % 4] = p.d[i * 128 + t];
  for (int i = 0; i < 4 * p.steps; ++i) a[i / 4][i % 4] = p.a[i * 128 + t];
  ptx::wgmma_fence(d, a);
#pragma unroll
  for (int step = 0; step < kMostSteps; ++step) {
    if (step < p.steps) multiply(p, d, a[step], step, T{});
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d, a);
  for (int i = 0; i < kN / 2; ++i) p.d[i * 128 + t] = d[i / 4][i % 4];
}

template <typename T>
auto* kernel_of(int n) {
  return n == 32    ? products<32, T>
         : n == 64  ? products<64, T>
         : n == 96  ? products<96, T>
         : n == 128 ? products<128, T>
         : n == 192 ? products<192, T>
                    : products<256, T>;
}

}  // namespace

void run_warpgroup_products(const WarpgroupProducts& p) {
  cuda::launch(p.bfloat16 ? kernel_of<ptx::bfloat16>(p.n) : kernel_of<ptx::half>(p.n),
               {1, 128, p.shared_bytes, 1}, p, nullptr, "warpgroup_products");
}

}  // namespace bertkern::emulator::test
