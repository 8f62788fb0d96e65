// LayerNorm of rows (Ba et al. 2016), with dropout and a residual before it: one read of each
// input, the row in registers, the variance by a second pass over them.
//
//   z = residual + dropout(x),  y = (z − mean) · rstd · weight + bias,  rstd = 1 / √(var + eps)
#pragma once

#include "layer_norm_row.cuh"

namespace bertkern::sm80 {

inline int64_t layer_norm_fwd_blocks(int64_t rows, int rows_per_block) {
  return (rows + rows_per_block - 1) / rows_per_block;
}

// T: of x, residual, y and z. W: of weight and bias.
template <typename T, typename W, typename Tile, bool kResidual>
BERTKERN_KERNEL(Tile::kBlockThreads)
layer_norm_fwd_kernel(const NormKernelArguments a) {
  constexpr int kVectors = Tile::kElements / kVector;
  float* shared = reinterpret_cast<float*>(ptx::shared_memory());
  const int lane = ptx::thread_index() % Tile::kThreads;
  const int64_t row = static_cast<int64_t>(ptx::block_index()) * Tile::kRowsPerBlock +
                      ptx::thread_index() / Tile::kThreads;
  // Single warps may leave: where a row takes the whole block (barriers in row_sum) no thread does.
  if (row >= a.rows) return;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;

  float z[kVectors][kVector];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    load_vector(x, (i * Tile::kThreads + lane) * kVector, a.cols, a.aligned, z[i]);
  }
  if constexpr (kResidual) {
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    T* z_out = static_cast<T*>(a.z) + row * a.cols;
    DropoutRow keys{};
    if (a.dropout_threshold != 0) keys = hidden_row(a.dropout_seed, a.dropout_rows, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = (i * Tile::kThreads + lane) * kVector;
      if (a.dropout_threshold != 0) {
        drop_vector(z[i], keys, column, a.dropout_threshold, a.dropout_scale);
      }
      float r[kVector];
      load_vector(residual, column, a.cols, a.aligned, r);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        // Rounded as it is stored: the backward reads the stored z, so the statistics are of that.
        z[i][j] = ptx::to_float(ptx::from_float(z[i][j] + r[j], T{}));
      }
      store_vector(z_out, column, a.cols, a.aligned, z[i]);
    }
  }

  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum += z[i][j];  // 0 past the row's end
  }
  // The mean is taken twice: what the rounding of the first leaves behind is large beside the
  // deviations of a row with a large mean.
  const float first_mean = row_sum<Tile>(sum, shared) / static_cast<float>(a.cols);
  float deviations = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = (i * Tile::kThreads + lane) * kVector;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      z[i][j] = column + j < a.cols ? z[i][j] - first_mean : 0.0f;
      deviations += z[i][j];
      squares += z[i][j] * z[i][j];
    }
  }
  const float left = row_sum<Tile>(deviations, shared) / static_cast<float>(a.cols);
  const float raw = row_sum<Tile>(squares, shared) / static_cast<float>(a.cols) - left * left;
  const float variance = raw < 0.0f ? 0.0f : raw;
  const float rstd = ptx::rsqrt(variance + a.eps);

  T* y = static_cast<T*>(a.y) + row * a.cols;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = (i * Tile::kThreads + lane) * kVector;
    float w[kVector], b[kVector];
    if (a.weight != nullptr) {
      load_vector(static_cast<const W*>(a.weight), column, a.cols, a.aligned, w);
    }
    if (a.bias != nullptr) {
      load_vector(static_cast<const W*>(a.bias), column, a.cols, a.aligned, b);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      float normalised = (z[i][j] - left) * rstd;
      if (a.weight != nullptr) normalised *= w[j];
      if (a.bias != nullptr) normalised += b[j];
      z[i][j] = normalised;
    }
    store_vector(y, column, a.cols, a.aligned, z[i]);
  }
  if (lane == 0) {
    a.mean[row] = first_mean + left;
    a.rstd[row] = rstd;
  }
}

}  // namespace bertkern::sm80
