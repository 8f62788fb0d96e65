// Arguments of the LayerNorm kernels on the device, and how a row is spread over threads.
#pragma once

#include <cstdint>

namespace bertkern {

// x, residual, dy, dz, z: [rows, cols] with the row strides beside them; the outputs are
// contiguous.
struct NormKernelArguments {
  const void *x, *residual, *weight, *bias;
  void *y, *z;
  float *mean, *rstd;
  int64_t x_stride, residual_stride, rows;
  int cols;
  float eps;
  bool aligned;  // every row of every tensor starts on 16 bytes and cols is a multiple of a vector
  uint32_t dropout_threshold;
  float dropout_scale;
  const int64_t* dropout_seed;
  const int64_t* dropout_rows;
};

struct NormGradKernelArguments {
  const void *dy, *dz, *z, *weight;
  const float *mean, *rstd;
  void *dx, *dresidual;
  float* partial;  // [blocks, 2, cols]: each block's sums of dy · x̂ and of dy; null: not wanted
  int64_t dy_stride, dz_stride, z_stride, rows;
  int cols;
  bool aligned;
  uint32_t dropout_threshold;
  float dropout_scale;
  const int64_t* dropout_seed;
  const int64_t* dropout_rows;
};

struct NormSumArguments {
  const float* partial;
  void *dweight, *dbias;  // null: not wanted
  int blocks, cols;
};

// Threads of a row, elements of a thread: a row of at most kThreads · kElements columns is in
// registers.
template <int kThreadsPerRow, int kElementsPerThread>
struct NormTile {
  static constexpr int kThreads = kThreadsPerRow;
  static constexpr int kElements = kElementsPerThread;
  static constexpr int kMaxCols = kThreads * kElements;
  static constexpr int kBlockThreads = kThreads < 128 ? 128 : kThreads;
  static constexpr int kRowsPerBlock = kBlockThreads / kThreads;
  static constexpr int kWarps = kBlockThreads / 32;
  static constexpr int kVector = 8;  // elements that are loaded together: 16 bytes, or 32 of fp32
  static_assert(kThreads % 32 == 0, "a row is spread over whole warps");
  static_assert(kThreads == 32 || kRowsPerBlock == 1, "rows share a block only as single warps");
  static_assert(kElements % kVector == 0, "a thread holds whole vectors");
};

using NormTileSmall = NormTile<32, 16>;   // up to 512 columns
using NormTileMedium = NormTile<32, 32>;  // up to 1024 columns
using NormTileLarge = NormTile<256, 32>;  // up to 8192 columns

constexpr int kNormMaxCols = NormTileLarge::kMaxCols;
// Blocks of the backward, and rows of its partial sums: two for each of an H100's 132
// multiprocessors.
constexpr int kNormGradBlocks = 264;

}  // namespace bertkern
