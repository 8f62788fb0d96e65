// CUDA attention for Hopper: tensor maps, schedule, launch. Compiled for sm_90a alone. What is
// compiled: fp16 and bf16 x the padded head dims 32, 64, 96, 128 x the variants of
// AttentionVariant; tiles are HopperAttentionTiles of common/attention_params.h.
#include <algorithm>
#include <string>
#include <type_traits>

#include "cuda/attention_maps.h"
#include "cuda/attention_sm90.h"
#include "cuda/attention_table.h"
#include "cuda/launch.h"
#include "cuda/sm90/attention_fwd.cuh"
#include "cuda/sm90/sequence_order.cuh"

namespace bertkern::cuda {
namespace {

// Where queries see more keys the later they come, all heads take turns with their longest tiles
// first, but only as many as have their keys and values in half of the second-level cache.
sm90::AttentionSchedule schedule_of(const AttentionKernelArguments& a) {
  constexpr int64_t kCacheBytes = 25 << 20;
  const bool longer_and_longer = a.window_right != kNoWindow && a.window_left == kNoWindow;
  if (!longer_and_longer) return {1};
  const int64_t bytes = int64_t{4} * std::max(1, a.seqlen_k) * a.head_dim;
  const int64_t pairs = int64_t{a.heads} * std::max(1, a.batch);
  return {
      static_cast<int>(std::clamp<int64_t>(kCacheBytes / bytes, 2, std::max<int64_t>(2, pairs)))};
}

template <typename T, typename Tile, AttentionVariant kVariant>
void launch_fwd(const AttentionKernelArguments& a, DType dtype, int multiprocessors, void* stream) {
  sm90::AttentionFwdArguments arguments{
      map_of<Tile>(query_rows(a, "q", a.q), a.head_dim, dtype, Tile::kRows),
      map_of<Tile>(key_rows(a, "k", a.k), a.head_dim, dtype, Tile::kColumns),
      map_of<Tile>(key_rows(a, "v", a.v), a.head_dim, dtype, Tile::kColumns), a, schedule_of(a)};
  arguments.a.blocks = (a.seqlen_q + Tile::kRows - 1) / Tile::kRows;
  // Each sequence of a varlen batch, and the rows behind the last one, may end in a tile of few.
  const int64_t tiles = a.cu_seqlens_q != nullptr ? a.total_q / Tile::kRows + a.batch + 1
                                                  : int64_t{arguments.a.blocks} * a.batch;
  launch(sm90::attention_fwd_kernel<T, Tile, kVariant>,
         {std::min<int64_t>(multiprocessors, tiles * a.heads), Tile::kThreads,
          sm90::AttentionFwdMemory<Tile>::kBytes},
         arguments, stream, "attention_fwd");
}

}  // namespace

int32_t* order_sequences(const int32_t* cu_seqlens, int batch, int32_t* order, void* stream) {
  if (cu_seqlens == nullptr || batch < 2) return nullptr;
  launch(sm90::sequence_order_kernel,
         {(batch + sm90::kOrderThreads - 1) / sm90::kOrderThreads, sm90::kOrderThreads,
          sm90::kOrderBytes},
         sm90::SequenceOrderArguments{cu_seqlens, order, batch}, stream, "sequence_order");
  return order;
}

bool attention_fwd_suits_sm90(const AttentionKernelArguments& a) {
  return reached(query_rows(a, "q", a.q)) && reached(key_rows(a, "k", a.k)) &&
         reached(key_rows(a, "v", a.v));
}

void attention_fwd_sm90(const AttentionKernelArguments& given, DType dtype, int multiprocessors,
                        void* stream) {
  AttentionKernelArguments a = given;
  a.order = order_sequences(a.cu_seqlens_k, a.batch, a.order, stream);
  with_tiles(dtype, a.head_dim, [&](auto type, auto tiles) {
    using T = decltype(type);
    using Tiles = typename decltype(tiles)::Hopper;
    with_variant(a, [&](auto variant) {
      using Tile = std::conditional_t<decltype(variant)::value == AttentionVariant::kGeneral,
                                      typename Tiles::FwdGeneral, typename Tiles::Fwd>;
      launch_fwd<T, Tile, decltype(variant)::value>(a, dtype, multiprocessors, stream);
    });
  });
}

}  // namespace bertkern::cuda
