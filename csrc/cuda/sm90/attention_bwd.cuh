// What both parts of the attention backward on Hopper have: their argument, and what the warps of a
// block tell each other. A block has tiles of its own and walks over others, which one warp has the
// copy engine bring.
#pragma once

#include "cuda/attention_gradient.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "ptx/registers.cuh"

namespace bertkern::sm90 {

struct AttentionBwdArguments {
  TensorMap q, k, v, dout;  // with the boxes of the kernel's tiles
  AttentionKernelArguments a;
};

constexpr int kConsumersBarrier = 1;  // of all warps that compute

template <typename Tile>
struct AttentionBwdSignals {
  ptx::Barrier own_full;  // the block's own tiles
  ptx::Barrier full[Tile::kStages], empty[Tile::kStages];
  ptx::Barrier landed;  // what has come, but is to be cleared before it is full

  // By all threads of the block, before any of them is one of a role.
  BERTKERN_DEVICE void begin() {
    if (ptx::thread_index() == 0) {
      ptx::barrier_init(&own_full, 1);
      ptx::barrier_init(&landed, 1);
      for (int i = 0; i < Tile::kStages; ++i) {
        ptx::barrier_init(&full[i], 1);
        ptx::barrier_init(&empty[i], 4 * Tile::kWarpgroups);
      }
      ptx::barrier_init_fence();
    }
    ptx::block_barrier();
  }
};

}  // namespace bertkern::sm90
