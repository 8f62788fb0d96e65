// How the warps of a block hand tiles to each other: rings of stages in shared memory.
#pragma once

#include "cuda/sm90/attention_tile.cuh"
#include "ptx/fence.cuh"

namespace bertkern::sm90 {

using namespace cuda;

// Counts through the stages of a ring. The parity is that of the phase in which a stage is filled
// this time round: a reader waits for it, the writer for the phase before.
template <int kStages>
struct Stage {
  int index = 0, parity = 0;
  BERTKERN_DEVICE void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// A value that all lanes of the warp have, as one that the compiler knows to be the same in them:
// what depends on it is computed once for the warp, and descriptors need no moves.
BERTKERN_DEVICE int of_warp(int value) {
  return static_cast<int>(ptx::shuffle_index(static_cast<uint32_t>(value), 0));
}

// One arrival of a warp, once all its lanes have done what is before it.
BERTKERN_DEVICE void arrive_as_warp(ptx::Barrier* barrier) {
  ptx::warp_barrier();
  if (lane_index() == 0) ptx::barrier_arrive(barrier);
}

// Zeros in the rows of a tile for which clears(row) holds, by one warp: what the copy engine
// brought there may be NaN, and 0 · NaN would not be 0. The tile's readers are to be told by a
// barrier.
template <typename Tile, int kRows, typename Clears>
BERTKERN_DEVICE void clear_rows(char* tile, Clears clears) {
  constexpr int kChunks = Tile::kHeadDim / 8;
  for (int at = lane_index(); at < kRows * kChunks; at += ptx::kWarpThreads) {
    const int row = at / kChunks;
    if (!clears(row)) continue;
    *reinterpret_cast<ptx::Words4*>(tile +
                                    chunk_offset<Tile, kRows>(row, at % kChunks)) = {{0, 0, 0, 0}};
  }
  ptx::fence_async_shared();
}

// Whether a tile that ends before key `end_k` holds foreign keys: padding, or what lies behind the
// sequence's own len_k, where the tensor goes on. Where it ends zeros come by themselves.
BERTKERN_DEVICE bool has_foreign_keys(const AttentionKernelArguments& a, int len_k, int end_k) {
  return a.key_padding_mask != nullptr ||
         (end_k > len_k && (a.cu_seqlens_k != nullptr || a.key_lengths != nullptr));
}

// Zeros in the rows of these, of a tile that begins with key `first_k`.
template <typename Tile, int kRows>
BERTKERN_DEVICE void clear_foreign_keys(char* tile, const uint8_t* kept, int len_k, int first_k) {
  clear_rows<Tile, kRows>(tile, [&](int row) {
    const int j = first_k + row;
    return j >= len_k || (kept != nullptr && kept[j] == 0);
  });
}

}  // namespace bertkern::sm90
