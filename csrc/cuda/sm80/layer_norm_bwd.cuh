// Gradients of LayerNorm with dropout and a residual before it.
//
//   forward:  z = residual + dropout(x),  x̂ = (z − mean) · rstd,  y = x̂ · weight + bias
//   g = dy · weight
//   dresidual = dz + rstd · (g − mean(g) − x̂ · mean(g · x̂)),  dx = dropout'(dresidual)
//   dweight = Σ_rows dy · x̂,  dbias = Σ_rows dy
//
// A fixed number of blocks walks over the rows, each warp (or block) keeping the column sums of its
// rows in registers; the block's warps are added in order through shared memory and stored in
// `partial`, and layer_norm_bwd_sum adds the blocks in order. No atomics: the same bits in every
// run.
#pragma once

#include "layer_norm_row.cuh"

namespace bertkern::sm80 {

inline int64_t layer_norm_bwd_blocks(int64_t rows, int rows_per_block) {
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  return blocks < kNormGradBlocks ? blocks : kNormGradBlocks;
}

// Reductions of a row, then one row of column sums at a time.
template <typename Tile>
constexpr int layer_norm_bwd_shared_bytes(int cols) {
  return 4 * (Tile::kRowsPerBlock > 1 ? (cols + kVector - 1) / kVector * kVector : Tile::kWarps);
}

// Adds the column sums of a block's rows, in the order of its warps, and stores them in target
// [cols].
template <typename Tile, int kVectors>
BERTKERN_DEVICE void store_column_sums(float (&sum)[kVectors][kVector], float* shared,
                                       float* target, int cols) {
  const int lane = ptx::thread_index() % Tile::kThreads;
  const int member = ptx::thread_index() / Tile::kThreads;
#pragma unroll 1
  for (int turn = 0; turn < Tile::kRowsPerBlock; ++turn) {
    if constexpr (Tile::kRowsPerBlock > 1) ptx::block_barrier();
    if (turn != member) continue;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = (i * Tile::kThreads + lane) * kVector;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (column + j >= cols) continue;
        const float total = turn == 0 ? sum[i][j] : shared[column + j] + sum[i][j];
        if (turn == Tile::kRowsPerBlock - 1) {
          target[column + j] = total;
        } else {
          shared[column + j] = total;
        }
      }
    }
  }
}

// T: of dy, dz, z, dx and dresidual. W: of weight. kDropout: dx differs from dresidual.
template <typename T, typename W, typename Tile, bool kDropout>
BERTKERN_KERNEL(Tile::kBlockThreads)
layer_norm_bwd_kernel(const NormGradKernelArguments a) {
  constexpr int kVectors = Tile::kElements / kVector;
  float* shared = reinterpret_cast<float*>(ptx::shared_memory());
  const int lane = ptx::thread_index() % Tile::kThreads;
  const int64_t step = static_cast<int64_t>(ptx::block_count()) * Tile::kRowsPerBlock;
  const float inverse_cols = 1.0f / static_cast<float>(a.cols);
  float dweight[kVectors][kVector] = {}, dbias[kVectors][kVector] = {};

  for (int64_t row = static_cast<int64_t>(ptx::block_index()) * Tile::kRowsPerBlock +
                     ptx::thread_index() / Tile::kThreads;
       row < a.rows; row += step) {
    const T* z = static_cast<const T*>(a.z) + row * a.z_stride;
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const float mean = a.mean[row], rstd = a.rstd[row];
    float normalised[kVectors][kVector], g[kVectors][kVector];
    float sum_g = 0.0f, sum_gx = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = (i * Tile::kThreads + lane) * kVector;
      load_vector(z, column, a.cols, a.aligned, normalised[i]);
      load_vector(dy, column, a.cols, a.aligned, g[i]);
      float w[kVector];
      if (a.weight != nullptr) {
        load_vector(static_cast<const W*>(a.weight), column, a.cols, a.aligned, w);
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        // Past the row's end x̂ is set to 0, and g is 0 as loaded.
        normalised[i][j] = column + j < a.cols ? (normalised[i][j] - mean) * rstd : 0.0f;
        dweight[i][j] += g[i][j] * normalised[i][j];
        dbias[i][j] += g[i][j];
        if (a.weight != nullptr) g[i][j] *= w[j];
        sum_g += g[i][j];
        sum_gx += g[i][j] * normalised[i][j];
      }
    }
    const float mean_g = row_sum<Tile>(sum_g, shared) * inverse_cols;
    const float mean_gx = row_sum<Tile>(sum_gx, shared) * inverse_cols;

    T* dx = static_cast<T*>(a.dx) + row * a.cols;
    DropoutRow keys{};
    if constexpr (kDropout) keys = hidden_row(a.dropout_seed, a.dropout_rows, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = (i * Tile::kThreads + lane) * kVector;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        g[i][j] = rstd * (g[i][j] - mean_g - normalised[i][j] * mean_gx);
      }
      if (a.dz != nullptr) {
        float dz[kVector];
        load_vector(static_cast<const T*>(a.dz) + row * a.dz_stride, column, a.cols, a.aligned, dz);
#pragma unroll
        for (int j = 0; j < kVector; ++j) g[i][j] += dz[j];
      }
      if (a.dresidual != nullptr) {
        store_vector(static_cast<T*>(a.dresidual) + row * a.cols, column, a.cols, a.aligned, g[i]);
      }
      if constexpr (kDropout) {
        drop_vector(g[i], keys, column, a.dropout_threshold, a.dropout_scale);
      }
      store_vector(dx, column, a.cols, a.aligned, g[i]);
    }
  }

  if (a.partial == nullptr) return;
  float* partial = a.partial + static_cast<int64_t>(ptx::block_index()) * 2 * a.cols;
  store_column_sums<Tile>(dweight, shared, partial, a.cols);
  if constexpr (Tile::kRowsPerBlock > 1) ptx::block_barrier();
  store_column_sums<Tile>(dbias, shared, partial + a.cols, a.cols);
}

constexpr int kSumThreads = 128;

inline int64_t layer_norm_bwd_sum_blocks(int cols) {
  return (2 * static_cast<int64_t>(cols) + kSumThreads - 1) / kSumThreads;
}

// dweight, dbias [cols] = Σ_blocks partial [blocks, 2, cols], one thread a column, in order.
template <typename W>
BERTKERN_KERNEL(kSumThreads)
layer_norm_bwd_sum_kernel(const NormSumArguments a) {
  const int at = ptx::block_index() * kSumThreads + ptx::thread_index();
  if (at >= 2 * a.cols) return;
  W* target = static_cast<W*>(at < a.cols ? a.dweight : a.dbias);
  if (target == nullptr) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int block = 0; block < a.blocks; ++block) {
    sum += a.partial[static_cast<int64_t>(block) * 2 * a.cols + at];
  }
  target[at < a.cols ? at : at - a.cols] = ptx::from_float(sum, W{});
}

}  // namespace bertkern::sm80
