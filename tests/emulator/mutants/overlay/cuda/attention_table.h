// In place of csrc/cuda/attention_table.h while mutants are compiled: few instantiations, and tiles
// so small that a few dozen queries and keys fill several of them. Between them the head dims take
// every branch that is chosen by a tile's shape:
//
//   64   whole rows of threads copy, q and k are held in registers, two row tiles to a warp
//        forward, swizzles of 64 and (dsᵀ) 32 columns
//   96   some threads idle in copies, q and k are loaded anew, an odd number of column tiles
//        in dq and a warp without any, swizzles of 32 and (dsᵀ) 16 columns
//   128  for Hopper's sake
#pragma once

#define with_tiles every_tile
#include_next "cuda/attention_table.h"
#undef with_tiles

namespace bertkern::cuda {

// Of Hopper's kernels, all by 32 keys or queries:
//
//   64   two warpgroups that take turns forward, one with options; in the backward one warpgroup,
//        64 keys that are all of a sequence's, by square tiles (and otherwise with options), and
//        more
//   96   one warpgroup forward, two with options; in the backward two that share three parts of dq,
//        up to 128 keys; with options any number of keys, as more of them
//   128  q is read from shared memory forward; square tiles of two warpgroups backward
struct SmallHopperTiles64 {
  using Fwd = WarpgroupTile<64, 2, 32, 2>;
  using FwdGeneral = WarpgroupTile<64, 1, 32, 2>;
  using BwdShort = WarpgroupTile<64, 1, 64, 2>;
  using BwdShortGeneral = WarpgroupTile<64, 1, 64, 2, Swizzle::k64>;
  using BwdKeys = WarpgroupTile<64, 1, 32, 2>;
  using BwdQueries = WarpgroupTile<64, 1, 32, 2>;
  using BwdQueriesGeneral = BwdQueries;
};
struct SmallHopperTiles96 {
  using Fwd = WarpgroupTile<96, 1, 32, 2>;
  using FwdGeneral = WarpgroupTile<96, 2, 32, 2>;
  using BwdShort = WarpgroupTile<96, 2, 64, 2>;
  using BwdShortGeneral = void;
  using BwdKeys = WarpgroupTile<96, 2, 32, 2>;
  using BwdQueries = WarpgroupTile<96, 2, 32, 2>;
  using BwdQueriesGeneral = BwdQueries;
};

struct SmallHopperTiles128 {
  using Fwd = WarpgroupTile<128, 1, 32, 2>;
  using FwdGeneral = Fwd;
  using BwdShort = WarpgroupTile<128, 2, 128, 1>;
  using BwdShortGeneral = void;
  using BwdKeys = WarpgroupTile<128, 1, 32, 2>;
  using BwdQueries = WarpgroupTile<128, 1, 32, 2>;
  using BwdQueriesGeneral = BwdQueries;
};

struct SmallTiles64 {
  using Hopper = SmallHopperTiles64;
  using Fwd = AttentionTile<64, 2, 2, 32>;
  using FwdGeneral = Fwd;
  using BwdShort = AttentionTile<64, 2, 1, 32>;
  using BwdKeys = AttentionTile<64, 2, 1, 32>;
  using BwdQueries = AttentionTile<64, 2, 1, 32>;
  using BwdBias = AttentionTile<64, 2, 1, 32>;
};

struct SmallTiles96 {
  using Hopper = SmallHopperTiles96;
  using Fwd = AttentionTile<96, 2, 1, 16>;
  using FwdGeneral = Fwd;
  using BwdShort = AttentionTile<96, 5, 1, 16>;
  using BwdKeys = AttentionTile<96, 2, 1, 16>;
  using BwdQueries = AttentionTile<96, 2, 1, 16>;
  using BwdBias = AttentionTile<96, 2, 1, 16>;
};

struct SmallTiles128 {
  using Hopper = SmallHopperTiles128;
  using Fwd = AttentionTile<128, 2, 1, 16>;
  using FwdGeneral = Fwd;
  using BwdShort = AttentionTile<128, 4, 1, 16>;
  using BwdKeys = AttentionTile<128, 2, 1, 16>;
  using BwdQueries = AttentionTile<128, 2, 1, 16>;
  using BwdBias = AttentionTile<128, 2, 1, 16>;
};

template <typename Body>
void with_tiles(DType, int head_dim, Body body) {
  if (head_dim <= 64) return body(ptx::half{}, SmallTiles64{});
  if (head_dim <= 96) return body(ptx::half{}, SmallTiles96{});
  body(ptx::half{}, SmallTiles128{});
}

}  // namespace bertkern::cuda
