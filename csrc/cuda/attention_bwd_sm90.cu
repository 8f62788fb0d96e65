// CUDA attention backward for Hopper: tensor maps, launch. Compiled for sm_90a alone. What is
// compiled: fp16 and bf16 x the padded head dims 32, 64, 96, 128 x the variants of
// AttentionVariant; tiles are HopperAttentionTiles of common/attention_params.h.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "cuda/attention_maps.h"
#include "cuda/attention_sm90.h"
#include "cuda/attention_table.h"
#include "cuda/launch.h"
#include "cuda/sm90/attention_bwd_keys.cuh"
#include "cuda/sm90/attention_bwd_queries.cuh"
#include "cuda/sm90/attention_bwd_short.cuh"

namespace bertkern::cuda {
namespace {

int tiles_of(int length, int tile) { return std::max(1, (length + tile - 1) / tile); }

// In varlen one more "sequence" holds the rows behind the last one.
int64_t sequences(const AttentionKernelArguments& a) {
  return static_cast<int64_t>(a.batch) + (a.cu_seqlens_q != nullptr ? 1 : 0);
}

// What the kernels read, by tiles of so many queries and keys.
template <typename Tile>
sm90::AttentionBwdArguments with_maps(const AttentionKernelArguments& a, DType dtype, int queries,
                                      int keys) {
  return {map_of<Tile>(query_rows(a, "q", a.q), a.head_dim, dtype, queries),
          map_of<Tile>(key_rows(a, "k", a.k), a.head_dim, dtype, keys),
          map_of<Tile>(key_rows(a, "v", a.v), a.head_dim, dtype, keys),
          map_of<Tile>(query_rows(a, "dout", a.dout), a.head_dim, dtype, queries), a};
}

template <typename T, typename Tile, AttentionVariant kVariant, bool kShort>
void launch_keys(const AttentionKernelArguments& a, DType dtype, int64_t sequences, void* stream,
                 const char* what) {
  auto arguments = with_maps<Tile>(a, dtype, Tile::kColumns, Tile::kRows);
  arguments.a.blocks = kShort ? 1 : tiles_of(a.seqlen_k, Tile::kRows);
  launch(sm90::attention_bwd_keys_kernel<T, Tile, kVariant, kShort>,
         {arguments.a.blocks * a.key_heads * sequences, Tile::kThreads,
          sm90::BwdKeysMemory<Tile, kShort>::kBytes},
         arguments, stream, what);
}

// Of so many sequences, whose keys are those of a tile at the most.
template <typename T, typename Tile, AttentionVariant kVariant>
void launch_short(const AttentionKernelArguments& a, DType dtype, int64_t sequences,
                  int multiprocessors, void* stream) {
  constexpr const char* kWhat = "attention_bwd_short";
  if constexpr (Tile::kSquare && kVariant != AttentionVariant::kGeneral) {
    launch(sm90::attention_bwd_short_kernel<T, Tile, kVariant>,
           {std::min<int64_t>(multiprocessors, a.key_heads * sequences), Tile::kThreads,
            sm90::BwdShortMemory<Tile>::kBytes},
           with_maps<Tile>(a, dtype, Tile::kRows, Tile::kRows), stream, kWhat);
  } else {
    launch_keys<T, Tile, kVariant, true>(a, dtype, sequences, stream, kWhat);
  }
}

// Which kernel computes a sequence follows from its own number of keys. Where that differs within a
// batch both are launched, each leaving out the sequences of the other. a.order is that by queries.
template <typename T, typename Tiles, AttentionVariant kVariant>
void launch_bwd(AttentionKernelArguments a, int32_t* order_by_keys, DType dtype,
                int multiprocessors, void* stream) {
  constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  using Short =
      std::conditional_t<kGeneral, typename Tiles::BwdShortGeneral, typename Tiles::BwdShort>;
  using Keys = typename Tiles::BwdKeys;
  using Queries =
      std::conditional_t<kGeneral, typename Tiles::BwdQueriesGeneral, typename Tiles::BwdQueries>;
  bool some_long = true;
  a.least_keys = 0;
  if constexpr (!std::is_void_v<Short>) {
    const bool own_lengths = a.cu_seqlens_k != nullptr || a.key_lengths != nullptr;
    some_long = a.seqlen_k > Short::kRows;
    const int64_t its_sequences = some_long ? a.batch : sequences(a);
    if ((own_lengths || !some_long) && its_sequences > 0) {
      AttentionKernelArguments part = a;
      part.most_keys = Short::kRows;
      launch_short<T, Short, kVariant>(part, dtype, its_sequences, multiprocessors, stream);
    }
    a.least_keys = Short::kRows + 1;
  }
  if (!some_long) return;
  a.most_keys = INT_MAX;
  auto arguments = with_maps<Queries>(a, dtype, Queries::kRows, Queries::kColumns);
  arguments.a.blocks = tiles_of(a.seqlen_q, Queries::kRows);
  arguments.a.order = order_by_keys;
  launch(sm90::attention_bwd_queries_kernel<T, Queries, kVariant>,
         {arguments.a.blocks * a.heads * sequences(a), Queries::kThreads,
          sm90::BwdQueriesMemory<Queries>::kBytes},
         arguments, stream, "attention_bwd_queries");
  launch_keys<T, Keys, kVariant, false>(a, dtype, sequences(a), stream, "attention_bwd_keys");
}

}  // namespace

bool attention_bwd_suits_sm90(const AttentionKernelArguments& a) {
  return reached(query_rows(a, "q", a.q)) && reached(key_rows(a, "k", a.k)) &&
         reached(key_rows(a, "v", a.v)) && reached(query_rows(a, "dout", a.dout));
}

void attention_bwd_sm90(const AttentionKernelArguments& given, DType dtype, int multiprocessors,
                        void* stream) {
  // Blocks that own keys walk over queries, and the other way round.
  AttentionKernelArguments a = given;
  a.order = order_sequences(a.cu_seqlens_q, a.batch, given.order, stream);
  int32_t* by_keys = a.cu_seqlens_k == a.cu_seqlens_q
                         ? a.order
                         : order_sequences(a.cu_seqlens_k, a.batch, given.order + a.batch, stream);
  with_tiles(dtype, a.head_dim, [&](auto type, auto tiles) {
    using T = decltype(type);
    using Tiles = typename decltype(tiles)::Hopper;
    with_variant(a, [&](auto variant) {
      launch_bwd<T, Tiles, decltype(variant)::value>(a, by_keys, dtype, multiprocessors, stream);
    });
  });
}

}  // namespace bertkern::cuda
