// Arguments of the LayerNorm kernels on the device, and how a row is spread over threads.
#pragma once

#include <cstdint>

namespace bertkern {

// Dropout on the device: the seed is read there, so that a captured graph draws fresh masks.
struct DeviceDropout {
  uint32_t threshold;  // 0: off
  float scale;
  const int64_t* seed;
  const int64_t* rows;  // null: the row's own index
};

// The shape of a call. Host code fills in what is below `cols`.
struct NormRows {
  int64_t count;
  int cols;
  int threads;  // of a block
  float inverse_cols;
  bool aligned;      // every row of every tensor starts on 16 bytes and cols is a multiple of 8
  bool wide_weight;  // weight and bias are fp32, else of the rows' type
};

// x, residual, dy, dz, z: [rows, cols] with the row strides beside them; the outputs are
// contiguous. weight, bias [cols] or null.
struct NormKernelArguments {
  const void *x, *residual, *weight, *bias;
  void *y, *z;
  float *mean, *rstd;
  int64_t x_stride, residual_stride;
  NormRows rows;
  float eps;
  DeviceDropout dropout;
};

struct NormGradKernelArguments {
  const void *dy, *dz, *z, *weight;  // dz null: none
  const float *mean, *rstd;
  void *dx, *dresidual;  // dresidual null: not wanted
  float* partial;  // [blocks, 2, cols]: each block's sums of dy · x̂ and of dy; null: not wanted
  int64_t dy_stride, dz_stride, z_stride;
  NormRows rows;
  DeviceDropout dropout;
};

struct NormSumArguments {
  const float* partial;
  void *dweight, *dbias;  // null: not wanted
  int blocks, cols;
};

constexpr int kTables = 3;  // word, position, type

struct EmbeddingIds {
  const void* data[kTables];  // [tokens]; null: row 0 everywhere
  bool wide[kTables];         // int64, else int32
};

// z = Σ over the tables of the row that a token's id names.
struct EmbeddingTables {
  const void* data[kTables];
  int64_t stride[kTables];
  int size[kTables];  // rows
};

struct EmbeddingKernelArguments {
  EmbeddingIds ids;
  EmbeddingTables tables;
  const void *weight, *bias;
  void* y;
  float *mean, *rstd;
  NormRows rows;
  float eps;
  DeviceDropout dropout;
};

// A key names a row of any of the tables, which count as one, of size[0] + size[1] + size[2] rows.
// Every token has three, one for each table; an id that its table does not have counts as its
// nearest row.
struct EmbeddingKeyArguments {
  EmbeddingIds ids;
  int size[kTables];
  int32_t* keys;  // [3, tokens]
  int64_t tokens;
};

struct EmbeddingGradKernelArguments {
  EmbeddingTables tables;
  const int32_t* keys;  // [3, tokens]
  const void *dy, *weight;
  const float *mean, *rstd;
  void* dz;        // [tokens, dz_stride], dz_stride a multiple of 8
  float* partial;  // as in NormGradKernelArguments
  int64_t dy_stride, dz_stride;
  NormRows rows;
  DeviceDropout dropout;
};

struct TableGradArguments {
  const void* dz;           // [tokens, dz_stride]
  const int32_t* keys;      // [3 tokens] ascending
  const int64_t* order;     // [3 tokens]: each key's place in [3, tokens] before it was sorted
  float* partial;           // [chunks, 2, dz_stride]: sums of rows that several chunks share
  void* gradient[kTables];  // contiguous [size, cols]
  int size[kTables];
  int64_t tokens, dz_stride;
  int cols, padding_row;  // of word, whose gradient is 0; -1: none
  int sum_blocks;         // blocks that add; the others clear
  bool aligned;           // every row of the gradients starts on 16 bytes
};

// A row's threads hold kVectors vectors of 8 columns each. A row belongs to one warp of a block of
// four, or to a whole block of as many warps as it needs: then a thread has at most 128 (two
// vectors) or 170 (three) of a multiprocessor's 65,536 registers.
template <int kVectorsPerThread, bool kWholeBlock>
struct NormTile {
  static constexpr int kVectors = kVectorsPerThread;
  static constexpr bool kBlockRow = kWholeBlock;
  static constexpr int kMaxThreads = kBlockRow ? (kVectors == 2 ? 512 : 384) : 128;  // of a block
  static constexpr int kRowsPerBlock = kBlockRow ? 1 : kMaxThreads / 32;
  static constexpr int kMaxCols = kVectors * 8 * kMaxThreads / kRowsPerBlock;
};

using NormTile512 = NormTile<2, false>;
using NormTile768 = NormTile<3, false>;
using NormTile1024 = NormTile<4, false>;
// A backward without spills takes the fewer vectors in fp32, and the more in 16 bits, where the
// next row is on its way meanwhile.
template <int kElementBytes>
using NormTileWide = NormTile<kElementBytes == 4 ? 2 : 3, true>;

constexpr int kNormMaxCols = 8192;
static_assert(kNormMaxCols <= NormTileWide<2>::kMaxCols &&
                  kNormMaxCols <= NormTileWide<4>::kMaxCols,
              "a row is held in registers");

// Blocks of the backward, and rows of its partial sums: three for each of an H100's 132
// multiprocessors. A constant, since it fixes the order of the sums.
constexpr int kNormGradBlocks = 396;

}  // namespace bertkern
