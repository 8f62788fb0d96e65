// LayerNorm of rows (Ba et al. 2016), with dropout and a residual before it: one read of each
// input, the row in registers.
//
//   z = residual + dropout(x),  y = (z − mean) · rstd · weight + bias,  rstd = 1 / √(var + eps)
#pragma once

#include "cuda/sm80/layer_norm_row.cuh"

namespace bertkern::sm80 {

// Threads among which a forward leaves room to share a multiprocessor's 65,536 registers: several
// blocks', whose loads are on their way together. More would spill.
template <typename T, typename Tile>
constexpr int layer_norm_fwd_bound() {
  if (Tile::kBlockRow) return Tile::kMaxThreads;
  return Tile::kMaxThreads * (sizeof(T) == 4 ? 4 : Tile::kVectors == 4 ? 6 : 8);
}

// Shared memory of the forward kernels: sums of a row's warps.
template <typename Tile>
constexpr int layer_norm_fwd_shared_bytes() {
  return Tile::kBlockRow ? 3 * kMaxWarps * 4 : 0;
}

// y of a row z (0 past its end), which is overwritten; mean and rstd. finish(values, column) is
// applied to each vector of the result.
template <typename T, typename Tile, typename Finish>
BERTKERN_DEVICE void normalise_row(float (&z)[Tile::kVectors][kVector], int64_t row, float eps,
                                   const void* weight, const void* bias, void* y, float* mean,
                                   float* rstd, const NormRows& rows, const RowThread<Tile>& thread,
                                   Finish finish) {
  float* shared = reinterpret_cast<float*>(ptx::shared_memory());
  const RowStatistics statistics = centre_row(z, eps, rows, thread, shared);
  T* y_row = static_cast<T*>(y) + row * rows.cols;
#pragma unroll
  for (int i = 0; i < Tile::kVectors; ++i) {
    const int column = thread.column(i);
#pragma unroll
    for (int j = 0; j < kVector; ++j) z[i][j] = (z[i][j] - statistics.left) * statistics.rstd;
    float parameter[kVector];
    if (weight != nullptr) {
      load_parameter<T>(parameter, weight, column, rows);
#pragma unroll
      for (int j = 0; j < kVector; ++j) z[i][j] *= parameter[j];
    }
    if (bias != nullptr) {
      load_parameter<T>(parameter, bias, column, rows);
#pragma unroll
      for (int j = 0; j < kVector; ++j) z[i][j] += parameter[j];
    }
    finish(z[i], column);
    store_vector(y_row, column, rows.cols, rows.aligned, pack_vector<T>(z[i]));
  }
  if (thread.lane == 0) {
    mean[row] = statistics.mean;
    rstd[row] = statistics.rstd;
  }
}

// T: of x, residual, y and z.
template <typename T, typename Tile>
BERTKERN_KERNEL((layer_norm_fwd_bound<T, Tile>()))
layer_norm_fwd_kernel(const NormKernelArguments a) {
  const NormRows& rows = a.rows;
  const RowThread<Tile> thread(rows);
  const int64_t row = thread.first_row();
  // Single warps may leave: where a row takes the whole block, with barriers, no thread does.
  if (row >= rows.count) return;

  Raw<T> x[Tile::kVectors];
  load_row(x, static_cast<const T*>(a.x) + row * a.x_stride, thread, rows.cols, rows.aligned);
  float z[Tile::kVectors][kVector];
  if (a.residual == nullptr) {
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) unpack(x[i], z[i]);
  } else {
    Raw<T> residual[Tile::kVectors];
    load_row(residual, static_cast<const T*>(a.residual) + row * a.residual_stride, thread,
             rows.cols, rows.aligned);
    const bool drops = a.dropout.threshold != 0;
    DropoutRow keys{};
    if (drops) keys = hidden_row(a.dropout, hidden_stream(a.dropout), row);
    T* z_row = static_cast<T*>(a.z) + row * rows.cols;
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      const int column = thread.column(i);
      unpack(x[i], z[i]);
      if (drops) drop_vector(z[i], keys, column, a.dropout);
      float r[kVector];
      unpack(residual[i], r);
#pragma unroll
      for (int j = 0; j < kVector; ++j) z[i][j] += r[j];
      // The backward reads the stored z, so the statistics are of that.
      const Raw<T> stored = pack_vector<T>(z[i]);
      store_vector(z_row, column, rows.cols, rows.aligned, stored);
      unpack(stored, z[i]);
    }
  }
  normalise_row<T>(z, row, a.eps, a.weight, a.bias, a.y, a.mean, a.rstd, rows, thread,
                   [](float (&)[kVector], int) {});
}

}  // namespace bertkern::sm80
