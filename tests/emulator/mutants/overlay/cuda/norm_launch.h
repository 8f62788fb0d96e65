// In place of csrc/cuda/norm_launch.h while mutants are compiled: a tile of each kind, a row to a
// warp and a row to a block, in fp32 and fp16.
#pragma once

#define with_type every_type
#define with_tile every_tile
#include_next "cuda/norm_launch.h"
#undef with_type
#undef with_tile

namespace bertkern::cuda {

template <typename Body>
void with_type(DType dtype, Body body) {
  if (dtype == DType::kFloat32) return body(float{});
  body(ptx::half{});
}

template <typename Body>
void with_tile(DType dtype, int cols, Body body) {
  with_type(dtype, [&](auto type) {
    if (cols <= NormTile512::kMaxCols) return body(type, NormTile512{});
    body(type, NormTileWide<sizeof(type)>{});
  });
}

}  // namespace bertkern::cuda
