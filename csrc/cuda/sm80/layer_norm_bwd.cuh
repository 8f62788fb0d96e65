// Gradients of LayerNorm with dropout and a residual before it.
//
//   forward:  z = residual + dropout(x),  x̂ = (z − mean) · rstd,  y = x̂ · weight + bias
//   g = dy · weight
//   dresidual = dz + rstd · (g − mean(g) − x̂ · mean(g · x̂)),  dx = dropout'(dresidual)
//   dweight = Σ_rows dy · x̂,  dbias = Σ_rows dy
//
// A fixed number of blocks walks over the rows, each thread keeping the column sums of its rows in
// registers (layer_norm_sums.cuh). The next row is on its way while one is worked on, if 16-bit: an
// fp32 one would need registers that are not there.
#pragma once

#include "cuda/sm80/layer_norm_sums.cuh"

namespace bertkern::sm80 {

// T: of dy, dz, z, dx and dresidual.
template <typename T, typename Tile>
BERTKERN_KERNEL((layer_norm_bwd_bound<T, Tile>()))
layer_norm_bwd_kernel(const NormGradKernelArguments a) {
  constexpr int kVectors = Tile::kVectors;
  constexpr bool kLoadEarly = sizeof(T) == 2;
  const NormRows& rows = a.rows;
  const RowThread<Tile> thread(rows);
  const bool drops = a.dropout.threshold != 0;
  const DropoutStream stream = drops ? hidden_stream(a.dropout) : DropoutStream{};
  ColumnSums<Tile> sums;

  Raw<T> next_z[kVectors], next_dy[kVectors];
  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto load = [&](int64_t row) {
    if (row >= rows.count) return;
    load_row(next_z, static_cast<const T*>(a.z) + row * a.z_stride, thread, rows.cols,
             rows.aligned);
    load_row(next_dy, static_cast<const T*>(a.dy) + row * a.dy_stride, thread, rows.cols,
             rows.aligned);
    next_mean = a.mean[row];
    next_rstd = a.rstd[row];
  };
  load(thread.first_row());
  for (int64_t row = thread.first_row(); row < rows.count; row += thread.row_step()) {
    float x_hat[kVectors][kVector], g[kVectors][kVector];
    const float mean = next_mean, rstd = next_rstd;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      unpack(next_z[i], x_hat[i]);
      unpack(next_dy[i], g[i]);
    }
    if constexpr (kLoadEarly) load(row + thread.row_step());
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      fill_past_end(x_hat[i], thread.column(i), rows.cols, mean);
#pragma unroll
      for (int j = 0; j < kVector; ++j) x_hat[i][j] = (x_hat[i][j] - mean) * rstd;
    }
    sums.add(x_hat, g);
    layer_norm_bwd_row<T>(x_hat, g, rstd, a.weight, rows, thread, sums.row_buffer());

    DropoutRow keys{};
    if (drops) keys = hidden_row(a.dropout, stream, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = thread.column(i);
      if (a.dz != nullptr) {
        float dz[kVector];
        unpack(load_vector(static_cast<const T*>(a.dz) + row * a.dz_stride, column, rows.cols,
                           rows.aligned),
               dz);
#pragma unroll
        for (int j = 0; j < kVector; ++j) g[i][j] += dz[j];
      }
      if (a.dresidual != nullptr) {
        store_vector(static_cast<T*>(a.dresidual) + row * rows.cols, column, rows.cols,
                     rows.aligned, pack_vector<T>(g[i]));
      }
      if (drops) drop_vector(g[i], keys, column, a.dropout);
      store_vector(static_cast<T*>(a.dx) + row * rows.cols, column, rows.cols, rows.aligned,
                   pack_vector<T>(g[i]));
    }
    if constexpr (!kLoadEarly) load(row + thread.row_step());
  }
  if (a.partial != nullptr) sums.store(a.partial, rows.cols, thread);
}

}  // namespace bertkern::sm80
