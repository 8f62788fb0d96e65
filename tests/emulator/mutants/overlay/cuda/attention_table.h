// In place of csrc/cuda/attention_table.h while mutants are compiled: few instantiations, and tiles
// so small that a few dozen queries and keys fill several of them. Between them the two head dims
// take every branch that is chosen by a tile's shape:
//
//   64   whole rows of threads copy, q and k are held in registers, two row tiles to a warp
//        forward, swizzles of 64 and (dsᵀ) 32 columns
//   96   some threads idle in copies, q and k are loaded anew, an odd number of column tiles
//        in dq and a warp without any, swizzles of 32 and (dsᵀ) 16 columns
#pragma once

#include "common/attention_params.h"
#include "common/dtype.h"
#include "ptx/memory.cuh"

namespace bertkern::cuda {

template <AttentionVariant kValue>
struct VariantConstant {
  static constexpr AttentionVariant value = kValue;
};

struct SmallTiles64 {
  using Fwd = AttentionTile<64, 2, 2, 32>;
  using FwdGeneral = Fwd;
  using BwdShort = AttentionTile<64, 2, 1, 32>;
  using BwdKeys = AttentionTile<64, 2, 1, 32>;
  using BwdQueries = AttentionTile<64, 2, 1, 32>;
  using BwdBias = AttentionTile<64, 2, 1, 32>;
};

struct SmallTiles96 {
  using Fwd = AttentionTile<96, 2, 1, 16>;
  using FwdGeneral = Fwd;
  using BwdShort = AttentionTile<96, 5, 1, 16>;
  using BwdKeys = AttentionTile<96, 2, 1, 16>;
  using BwdQueries = AttentionTile<96, 2, 1, 16>;
  using BwdBias = AttentionTile<96, 2, 1, 16>;
};

template <typename Body>
void with_tiles(DType, int head_dim, Body body) {
  if (head_dim <= 64) return body(ptx::half{}, SmallTiles64{});
  body(ptx::half{}, SmallTiles96{});
}

// The plain variant is that with dropout, but for what is not compiled into it.
template <typename Body>
void with_variant(const AttentionKernelArguments& a, Body body) {
  if (a.bias_kind != DeviceBias::kNone || a.softcap != 0.0f || !(a.scale > 0.0f)) {
    return body(VariantConstant<AttentionVariant::kGeneral>{});
  }
  body(VariantConstant<AttentionVariant::kDropout>{});
}

}  // namespace bertkern::cuda
