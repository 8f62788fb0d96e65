// CUDA embedding_layer_norm: argument checks, launch. The kernels are in sm80/, what is compiled of
// them is named in norm_launch.h.
#include <climits>

#include "cuda/embedding_layer_norm.h"
#include "cuda/launch.h"
#include "cuda/layer_norm.h"
#include "cuda/norm_launch.h"
#include "cuda/sm80/embedding_layer_norm_bwd.cuh"
#include "cuda/sm80/embedding_layer_norm_fwd.cuh"
#include "cuda/sm80/embedding_layer_norm_tables.cuh"

namespace bertkern::cuda {
namespace {

// Keys are int32, and so are places among them.
void check_keys(int64_t tokens, const int (&size)[kTables]) {
  int64_t rows = 0;
  for (int of_table : size) {
    if (of_table < 1) throw std::invalid_argument("every table has at least one row");
    rows += of_table;
  }
  if (rows > INT_MAX || kTables * tokens > INT_MAX) {
    throw std::invalid_argument(std::to_string(tokens) + " tokens, tables of " +
                                std::to_string(rows) + " rows; allowed are at most 715827882 and " +
                                "2147483647");
  }
}

}  // namespace

int64_t embedding_layer_norm_chunks(int64_t tokens) { return sm80::table_chunks(tokens); }

void embedding_layer_norm_fwd(EmbeddingKernelArguments a, DType dtype, DType weight_dtype,
                              int device, void* stream) {
  check_keys(a.rows.count, a.tables.size);
  a.rows = norm_rows(a.rows.count, a.rows.cols, dtype, weight_dtype,
                     {{a.tables.data[0], a.tables.stride[0], dtype},
                      {a.tables.data[1], a.tables.stride[1], dtype},
                      {a.tables.data[2], a.tables.stride[2], dtype},
                      {a.y, 0, dtype},
                      {a.weight, 0, weight_dtype},
                      {a.bias, 0, weight_dtype}});
  if (a.rows.count == 0 || a.rows.cols == 0) return;
  const DeviceGuard guard(device);
  with_tile(dtype, a.rows.cols, [&](auto type, auto tile) {
    using Tile = decltype(tile);
    a.rows.threads = norm_threads<Tile>(a.rows.cols);
    const int64_t blocks = (a.rows.count + Tile::kRowsPerBlock - 1) / Tile::kRowsPerBlock;
    launch(sm80::embedding_layer_norm_fwd_kernel<decltype(type), Tile>,
           {blocks, a.rows.threads, sm80::layer_norm_fwd_shared_bytes<Tile>()}, a, stream,
           "embedding_layer_norm_fwd");
  });
}

void embedding_layer_norm_keys(const EmbeddingKeyArguments& a, int device, void* stream) {
  check_keys(a.tokens, a.size);
  if (a.tokens == 0) return;
  const DeviceGuard guard(device);
  launch(&sm80::embedding_key_kernel, {sm80::embedding_key_blocks(a.tokens), sm80::kKeyThreads, 0},
         a, stream, "embedding_layer_norm_keys");
}

void embedding_layer_norm_bwd(EmbeddingGradKernelArguments a, void* dweight, void* dbias,
                              DType dtype, DType weight_dtype, int device, void* stream) {
  check_keys(a.rows.count, a.tables.size);
  a.rows = norm_rows(a.rows.count, a.rows.cols, dtype, weight_dtype,
                     {{a.tables.data[0], a.tables.stride[0], dtype},
                      {a.tables.data[1], a.tables.stride[1], dtype},
                      {a.tables.data[2], a.tables.stride[2], dtype},
                      {a.dy, a.dy_stride, dtype},
                      {a.weight, 0, weight_dtype}});
  if (!Matrix{a.dz, a.dz_stride, dtype}.aligned() || a.dz_stride < a.rows.cols) {
    throw std::invalid_argument("rows of dz must hold those of dy and start on 16 bytes");
  }
  const bool sums = dweight != nullptr || dbias != nullptr;
  if (a.rows.count == 0 || a.rows.cols == 0) {
    throw std::invalid_argument("dy is empty; all gradients are 0");
  }
  if (!sums) a.partial = nullptr;
  const DeviceGuard guard(device);
  int64_t blocks = 0;
  with_tile(dtype, a.rows.cols, [&](auto type, auto tile) {
    using Tile = decltype(tile);
    a.rows.threads = norm_threads<Tile>(a.rows.cols);
    blocks = sm80::layer_norm_bwd_blocks(a.rows.count, Tile::kRowsPerBlock);
    launch(sm80::embedding_layer_norm_bwd_kernel<decltype(type), Tile>,
           {blocks, a.rows.threads, sm80::layer_norm_bwd_shared_bytes<Tile>(a.rows.cols)}, a,
           stream, "embedding_layer_norm_bwd");
  });
  if (!sums) return;
  layer_norm_bwd_sum({a.partial, dweight, dbias, static_cast<int>(blocks), a.rows.cols},
                     weight_dtype, stream);
}

void embedding_layer_norm_tables(TableGradArguments a, DType dtype, int device, void* stream) {
  check_keys(a.tokens, a.size);
  a.aligned = a.cols % 8 == 0;
  for (const void* gradient : a.gradient)
    a.aligned = a.aligned && Matrix{gradient, 0, dtype}.aligned();
  a.sum_blocks = static_cast<int>(sm80::table_sum_blocks(a.tokens, a.cols));
  const DeviceGuard guard(device);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch(sm80::table_grad_kernel<T>,
           {a.sum_blocks + sm80::table_clear_blocks(a.size), sm80::kTableThreads, 0}, a, stream,
           "table_grad");
    launch(sm80::table_grad_join_kernel<T>,
           {sm80::table_chunks(a.tokens) * sm80::table_strips(a.cols), sm80::kTableThreads,
            sm80::kTableSharedBytes},
           a, stream, "table_grad_join");
  });
}

}  // namespace bertkern::cuda
