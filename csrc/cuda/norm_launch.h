// What the launches of the LayerNorm family share: the table of what is compiled, and the shape of
// a call.
//
//   layer_norm_fwd, layer_norm_bwd, embedding_layer_norm_fwd, embedding_layer_norm_bwd: fp32, fp16
//   and bf16 x the four tiles of common/norm_params.h;  layer_norm_bwd_sum and the kernels of the
//   tables' gradients: the three types
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/norm_params.h"
#include "ptx/memory.cuh"

namespace bertkern::cuda {

// Calls body(T{}).
template <typename Body>
void with_type(DType dtype, Body body) {
  if (dtype == DType::kFloat32) return body(float{});
  if (dtype == DType::kFloat16) return body(ptx::half{});
  body(ptx::bfloat16{});
}

// Calls body(T{}, Tile{}). The tile follows from the columns and the type alone, so a row is summed
// in the same order in every batch.
template <typename Body>
void with_tile(DType dtype, int cols, Body body) {
  with_type(dtype, [&](auto type) {
    if (cols <= NormTile512::kMaxCols) return body(type, NormTile512{});
    if (cols <= NormTile768::kMaxCols) return body(type, NormTile768{});
    if (cols <= NormTile1024::kMaxCols) return body(type, NormTile1024{});
    body(type, NormTileWide<sizeof(type)>{});
  });
}

// Threads of a block.
template <typename Tile>
int norm_threads(int cols) {
  constexpr int kWarpColumns = 32 * 8 * Tile::kVectors;
  return Tile::kBlockRow ? 32 * ((cols + kWarpColumns - 1) / kWarpColumns) : Tile::kMaxThreads;
}

// A matrix by its address and the stride of its rows; an absent one is aligned.
struct Matrix {
  const void* data;
  int64_t stride;
  DType dtype;

  bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_bytes(dtype) % 16 == 0;
  }
};

// The shape of a call on these matrices, but for `threads`.
inline NormRows norm_rows(int64_t rows, int64_t cols, DType dtype, DType weight_dtype,
                          std::initializer_list<Matrix> matrices) {
  if (rows < 0 || cols < 0 || cols > kNormMaxCols) {
    throw std::invalid_argument("x is [" + std::to_string(rows) + ", " + std::to_string(cols) +
                                "]; the kernels take at most " + std::to_string(kNormMaxCols) +
                                " columns");
  }
  if (weight_dtype != DType::kFloat32 && weight_dtype != dtype) {
    throw std::invalid_argument("weight_dtype must be FLOAT32 or the dtype of x");
  }
  bool aligned = cols % 8 == 0;
  for (const Matrix& matrix : matrices) aligned = aligned && matrix.aligned();
  return {rows,    static_cast<int>(cols),
          0,       cols > 0 ? 1.0f / static_cast<float>(cols) : 0.0f,
          aligned, weight_dtype == DType::kFloat32};
}

}  // namespace bertkern::cuda
