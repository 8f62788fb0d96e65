// CUDA LayerNorm: argument checks, launch. The kernels are in sm80/, what is compiled of them is
// named in norm_launch.h.
#include "cuda/launch.h"
#include "cuda/layer_norm.h"
#include "cuda/norm_launch.h"
#include "cuda/sm80/layer_norm_bwd.cuh"
#include "cuda/sm80/layer_norm_fwd.cuh"

namespace bertkern::cuda {

int64_t layer_norm_max_cols() { return kNormMaxCols; }
int64_t layer_norm_partials(int64_t rows) {
  return sm80::layer_norm_bwd_blocks(rows, 1);  // tiles with more rows to a block use fewer
}

void layer_norm_fwd(NormKernelArguments a, DType dtype, DType weight_dtype, int device,
                    void* stream) {
  a.rows = norm_rows(a.rows.count, a.rows.cols, dtype, weight_dtype,
                     {{a.x, a.x_stride, dtype},
                      {a.residual, a.residual_stride, dtype},
                      {a.y, 0, dtype},
                      {a.z, 0, dtype},
                      {a.weight, 0, weight_dtype},
                      {a.bias, 0, weight_dtype}});
  if (a.rows.count == 0 || a.rows.cols == 0) return;
  const DeviceGuard guard(device);
  with_tile(dtype, a.rows.cols, [&](auto type, auto tile) {
    using Tile = decltype(tile);
    a.rows.threads = norm_threads<Tile>(a.rows.cols);
    const int64_t blocks = (a.rows.count + Tile::kRowsPerBlock - 1) / Tile::kRowsPerBlock;
    launch(sm80::layer_norm_fwd_kernel<decltype(type), Tile>,
           {blocks, a.rows.threads, sm80::layer_norm_fwd_shared_bytes<Tile>()}, a, stream,
           "layer_norm_fwd");
  });
}

void layer_norm_bwd(NormGradKernelArguments a, void* dweight, void* dbias, DType dtype,
                    DType weight_dtype, int device, void* stream) {
  a.rows = norm_rows(a.rows.count, a.rows.cols, dtype, weight_dtype,
                     {{a.dy, a.dy_stride, dtype},
                      {a.dz, a.dz_stride, dtype},
                      {a.z, a.z_stride, dtype},
                      {a.dx, 0, dtype},
                      {a.dresidual, 0, dtype},
                      {a.weight, 0, weight_dtype}});
  const bool sums = dweight != nullptr || dbias != nullptr;
  if (sums && a.partial == nullptr && a.rows.count > 0) {
    throw std::invalid_argument("partial is absent, but dweight or dbias is wanted");
  }
  if (a.rows.cols == 0) return;
  if (!sums) a.partial = nullptr;
  const DeviceGuard guard(device);
  int64_t blocks = 0;
  with_tile(dtype, a.rows.cols, [&](auto type, auto tile) {
    using Tile = decltype(tile);
    a.rows.threads = norm_threads<Tile>(a.rows.cols);
    blocks = sm80::layer_norm_bwd_blocks(a.rows.count, Tile::kRowsPerBlock);
    if (blocks == 0) return;
    launch(sm80::layer_norm_bwd_kernel<decltype(type), Tile>,
           {blocks, a.rows.threads, sm80::layer_norm_bwd_shared_bytes<Tile>(a.rows.cols)}, a,
           stream, "layer_norm_bwd");
  });
  if (!sums) return;
  layer_norm_bwd_sum({a.partial, dweight, dbias, static_cast<int>(blocks), a.rows.cols},
                     weight_dtype, stream);
}

void layer_norm_bwd_sum(const NormSumArguments& a, DType dtype, void* stream) {
  with_type(dtype, [&](auto type) {
    launch(&sm80::layer_norm_bwd_sum_kernel<decltype(type)>,
           {sm80::layer_norm_bwd_sum_blocks(a.cols), sm80::kSumThreads, sm80::kSumSharedBytes}, a,
           stream, "layer_norm_bwd_sum");
  });
}

}  // namespace bertkern::cuda
