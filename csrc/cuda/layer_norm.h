// The CUDA LayerNorm ops as bindings.cpp calls them. They throw std::invalid_argument for what they
// cannot take and std::runtime_error, with CUDA's own message, when a launch fails.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace bertkern::cuda {

// Dropout on the device: the seed is read there, so that a captured graph draws fresh masks.
struct DeviceDropout {
  uint32_t threshold;  // 0: off
  float scale;
  const int64_t* seed;
  const int64_t* rows;  // null: the row's own index
};

struct NormArguments {
  const void *x, *residual, *weight, *bias;
  void *y, *z;
  float *mean, *rstd;
  int64_t x_stride, residual_stride, rows, cols;
  DType dtype, weight_dtype;
  float eps;
  DeviceDropout dropout;
};

struct NormGradArguments {
  const void *dy, *dz, *z, *weight;
  const float *mean, *rstd;
  void *dx, *dresidual, *dweight, *dbias;
  float* partial;  // [layer_norm_partials(rows), 2, cols]
  int64_t dy_stride, dz_stride, z_stride, rows, cols;
  DType dtype, weight_dtype;
  DeviceDropout dropout;
};

int64_t layer_norm_max_cols();
int64_t layer_norm_partials(int64_t rows);
void layer_norm_fwd(const NormArguments& arguments, int device, void* stream);
void layer_norm_bwd(const NormGradArguments& arguments, int device, void* stream);

}  // namespace bertkern::cuda
