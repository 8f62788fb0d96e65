// CUDA LayerNorm: argument checks, dispatch over types and tiles, launch. The kernels are in sm80/.
#include "../common/norm_params.h"
#include "launch.h"
#include "layer_norm.h"
#include "sm80/layer_norm_bwd.cuh"
#include "sm80/layer_norm_fwd.cuh"

namespace bertkern::cuda {
namespace {

template <typename T>
struct Type {
  using type = T;
};

void check_sizes(int64_t rows, int64_t cols, DType dtype, DType weight_dtype) {
  if (rows < 0 || cols < 0 || cols > kNormMaxCols) {
    throw std::invalid_argument("x is [" + std::to_string(rows) + ", " + std::to_string(cols) +
                                "]; the kernels take at most " + std::to_string(kNormMaxCols) +
                                " columns");
  }
  if (weight_dtype != DType::kFloat32 && weight_dtype != dtype) {
    throw std::invalid_argument("weight_dtype must be float32 or the dtype of x");
  }
}

// Whether rows of `stride` elements from `address` all start on 16 bytes.
bool rows_aligned(const void* address, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride * element_bytes(dtype) % 16 == 0;
}

template <typename Body>
void with_types(DType dtype, DType weight_dtype, Body body) {
  const bool wide = weight_dtype == DType::kFloat32;
  if (dtype == DType::kFloat32) {
    body(Type<float>{}, Type<float>{});
  } else if (dtype == DType::kFloat16) {
    wide ? body(Type<ptx::half>{}, Type<float>{}) : body(Type<ptx::half>{}, Type<ptx::half>{});
  } else {
    wide ? body(Type<ptx::bfloat16>{}, Type<float>{})
         : body(Type<ptx::bfloat16>{}, Type<ptx::bfloat16>{});
  }
}

// The tile follows from the columns alone, so a row is summed in the same order in every batch.
template <typename Body>
void with_tile(int64_t cols, Body body) {
  if (cols <= NormTileSmall::kMaxCols) {
    body(NormTileSmall{});
  } else if (cols <= NormTileMedium::kMaxCols) {
    body(NormTileMedium{});
  } else {
    body(NormTileLarge{});
  }
}

}  // namespace

int64_t layer_norm_max_cols() { return kNormMaxCols; }
int64_t layer_norm_partials(int64_t rows) {
  return sm80::layer_norm_bwd_blocks(rows, 1);  // tiles with more rows to a block use fewer
}

void layer_norm_fwd(const NormArguments& a, int device, void* stream) {
  check_sizes(a.rows, a.cols, a.dtype, a.weight_dtype);
  if (a.rows == 0 || a.cols == 0) return;
  const DeviceGuard guard(device);
  const bool aligned = a.cols % sm80::kVector == 0 && rows_aligned(a.x, a.x_stride, a.dtype) &&
                       rows_aligned(a.residual, a.residual_stride, a.dtype) &&
                       rows_aligned(a.y, 0, a.dtype) && rows_aligned(a.z, 0, a.dtype) &&
                       rows_aligned(a.weight, 0, a.dtype) && rows_aligned(a.bias, 0, a.dtype);
  const NormKernelArguments arguments{a.x,
                                      a.residual,
                                      a.weight,
                                      a.bias,
                                      a.y,
                                      a.z,
                                      a.mean,
                                      a.rstd,
                                      a.x_stride,
                                      a.residual_stride,
                                      a.rows,
                                      static_cast<int>(a.cols),
                                      a.eps,
                                      aligned,
                                      a.dropout.threshold,
                                      a.dropout.scale,
                                      a.dropout.seed,
                                      a.dropout.rows};
  with_types(a.dtype, a.weight_dtype, [&](auto type, auto weight_type) {
    with_tile(a.cols, [&](auto tile) {
      using T = typename decltype(type)::type;
      using W = typename decltype(weight_type)::type;
      using Tile = decltype(tile);
      const Launch shape{sm80::layer_norm_fwd_blocks(a.rows, Tile::kRowsPerBlock),
                         Tile::kBlockThreads, 4 * Tile::kWarps};
      auto* kernel = a.residual != nullptr ? sm80::layer_norm_fwd_kernel<T, W, Tile, true>
                                           : sm80::layer_norm_fwd_kernel<T, W, Tile, false>;
      launch(kernel, shape, arguments, stream, "layer_norm_fwd");
    });
  });
}

void layer_norm_bwd(const NormGradArguments& a, int device, void* stream) {
  check_sizes(a.rows, a.cols, a.dtype, a.weight_dtype);
  const bool sums = a.dweight != nullptr || a.dbias != nullptr;
  if (sums && a.partial == nullptr && a.rows > 0) {
    throw std::invalid_argument("partial is absent, but dweight or dbias is wanted");
  }
  if (a.cols == 0) return;
  const DeviceGuard guard(device);
  const int cols = static_cast<int>(a.cols);
  const bool aligned = a.cols % sm80::kVector == 0 && rows_aligned(a.dy, a.dy_stride, a.dtype) &&
                       rows_aligned(a.dz, a.dz_stride, a.dtype) &&
                       rows_aligned(a.z, a.z_stride, a.dtype) && rows_aligned(a.dx, 0, a.dtype) &&
                       rows_aligned(a.dresidual, 0, a.dtype) && rows_aligned(a.weight, 0, a.dtype);
  const NormGradKernelArguments arguments{a.dy,
                                          a.dz,
                                          a.z,
                                          a.weight,
                                          a.mean,
                                          a.rstd,
                                          a.dx,
                                          a.dresidual,
                                          sums ? a.partial : nullptr,
                                          a.dy_stride,
                                          a.dz_stride,
                                          a.z_stride,
                                          a.rows,
                                          cols,
                                          aligned,
                                          a.dropout.threshold,
                                          a.dropout.scale,
                                          a.dropout.seed,
                                          a.dropout.rows};
  with_types(a.dtype, a.weight_dtype, [&](auto type, auto weight_type) {
    using T = typename decltype(type)::type;
    using W = typename decltype(weight_type)::type;
    int64_t blocks = 0;
    with_tile(a.cols, [&](auto tile) {
      using Tile = decltype(tile);
      blocks = sm80::layer_norm_bwd_blocks(a.rows, Tile::kRowsPerBlock);
      if (blocks == 0) return;
      const Launch shape{blocks, Tile::kBlockThreads,
                         sm80::layer_norm_bwd_shared_bytes<Tile>(cols)};
      auto* kernel = a.dropout.threshold != 0 ? sm80::layer_norm_bwd_kernel<T, W, Tile, true>
                                              : sm80::layer_norm_bwd_kernel<T, W, Tile, false>;
      launch(kernel, shape, arguments, stream, "layer_norm_bwd");
    });
    if (!sums) return;
    const NormSumArguments sum{a.partial, a.dweight, a.dbias, static_cast<int>(blocks), cols};
    const Launch shape{sm80::layer_norm_bwd_sum_blocks(cols), sm80::kSumThreads, 0};
    launch(&sm80::layer_norm_bwd_sum_kernel<W>, shape, sum, stream, "layer_norm_bwd_sum");
  });
}

}  // namespace bertkern::cuda
