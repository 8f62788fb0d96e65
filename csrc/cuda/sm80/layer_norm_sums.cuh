// What the backwards of LayerNorm share: the gradient of a row, and the sums over all rows
//
//   dweight = Σ_rows dy · x̂,  dbias = Σ_rows dy
//
// in a fixed order and without atomics, so that every run gives the same bits: a thread adds up its
// rows, a block its warps, and layer_norm_bwd_sum the blocks.
#pragma once

#include "cuda/sm80/layer_norm_row.cuh"

namespace bertkern::sm80 {

// 4 floats that move together.
struct alignas(16) Four {
  float value[4];
};

// As layer_norm_fwd_bound: three blocks (kNormGradBlocks), or two.
template <typename T, typename Tile>
constexpr int layer_norm_bwd_bound() {
  if (Tile::kBlockRow) return Tile::kMaxThreads;
  return Tile::kMaxThreads * (Tile::kVectors <= (sizeof(T) == 4 ? 2 : 3) ? 3 : 2);
}

// Bytes of shared memory of a backward: the sums of a row's warps for two rows by turns, or one sum
// of every warp for each column.
template <typename Tile>
constexpr int layer_norm_bwd_shared_bytes(int cols) {
  return 4 * (Tile::kBlockRow ? 2 * 2 * kMaxWarps
                              : Tile::kRowsPerBlock * ((cols + kVector - 1) / kVector * kVector));
}

inline int64_t layer_norm_bwd_blocks(int64_t rows, int rows_per_block) {
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  return blocks < kNormGradBlocks ? blocks : kNormGradBlocks;
}

// dy becomes dz = rstd · (g − mean(g) − x̂ · mean(g · x̂)) with g = dy · weight. Past the row's end
// dy and x̂ are 0. `shared` as in row_sums, for two sums.
template <typename T, typename Tile>
BERTKERN_DEVICE void layer_norm_bwd_row(const float (&x_hat)[Tile::kVectors][kVector],
                                        float (&g)[Tile::kVectors][kVector], float rstd,
                                        const void* weight, const NormRows& rows,
                                        const RowThread<Tile>& thread, float* shared) {
  float sum[2] = {};  // of g, of g · x̂
#pragma unroll
  for (int i = 0; i < Tile::kVectors; ++i) {
    if (weight != nullptr) {
      float w[kVector];
      load_parameter<T>(w, weight, thread.column(i), rows);
#pragma unroll
      for (int j = 0; j < kVector; ++j) g[i][j] *= w[j];
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      sum[0] += g[i][j];
      sum[1] += g[i][j] * x_hat[i][j];
    }
  }
  row_sums(sum, thread, shared);
  const float mean_g = sum[0] * rows.inverse_cols, mean_gx = sum[1] * rows.inverse_cols;
#pragma unroll
  for (int i = 0; i < Tile::kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      g[i][j] = rstd * (g[i][j] - mean_g - x_hat[i][j] * mean_gx);
    }
  }
}

// A thread's sums of its rows.
template <typename Tile>
struct ColumnSums {
  using Row = float[Tile::kVectors][kVector];
  Row dweight = {}, dbias = {};
  int turn = 0;

  BERTKERN_DEVICE void add(const Row& x_hat, const Row& dy) {
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        dweight[i][j] += dy[i][j] * x_hat[i][j];
        dbias[i][j] += dy[i][j];
      }
    }
  }

  // Where a row's warps meet: another place than for the row before, which some may still read.
  // What they read two rows ago is behind the barrier of the last.
  BERTKERN_DEVICE float* row_buffer() {
    turn ^= 1;
    return reinterpret_cast<float*>(ptx::shared_memory()) + turn * 2 * kMaxWarps;
  }

  // The block's sums to its two rows of partial [blocks, 2, cols]. Every thread takes part.
  BERTKERN_DEVICE void store(float* partial, int cols, const RowThread<Tile>& thread) {
    float* block_sums = partial + static_cast<int64_t>(ptx::block_index()) * 2 * cols;
    store_one(dweight, block_sums, cols, thread);
    store_one(dbias, block_sums + cols, cols, thread);
  }

 private:
  BERTKERN_DEVICE static void store_one(const Row& sum, float* target, int cols,
                                        const RowThread<Tile>& thread) {
    if constexpr (Tile::kBlockRow) {  // each column has one thread
#pragma unroll
      for (int i = 0; i < Tile::kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const int column = thread.column(i) + j;
          if (column < cols) target[column] = sum[i][j];
        }
      }
    } else {
      float* shared = reinterpret_cast<float*>(ptx::shared_memory());
      const int padded = (cols + kVector - 1) / kVector * kVector;
      ptx::block_barrier();  // the sum before this one has been read
#pragma unroll
      for (int i = 0; i < Tile::kVectors; ++i) {
        const int column = thread.column(i);
        if (column >= cols) continue;
#pragma unroll
        for (int j = 0; j < kVector; j += 4) {
          *reinterpret_cast<Four*>(shared + thread.block_row * padded + column + j) =
              Four{{sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]}};
        }
      }
      ptx::block_barrier();
      for (int column = ptx::thread_index(); column < cols; column += Tile::kMaxThreads) {
        float total = shared[column];
#pragma unroll
        for (int row = 1; row < Tile::kRowsPerBlock; ++row) total += shared[row * padded + column];
        target[column] = total;
      }
    }
  }
};

constexpr int kSumColumns = 32, kSumGroups = 16, kSumThreads = kSumColumns * kSumGroups;
constexpr int kSumSharedBytes = kSumThreads * 4;

inline int64_t layer_norm_bwd_sum_blocks(int cols) {
  return (2 * static_cast<int64_t>(cols) + kSumColumns - 1) / kSumColumns;
}

// dweight, dbias [cols] = Σ_blocks partial [blocks, 2, cols]: each warp adds every 16th block, in
// order, and the first warp adds the warps.
template <typename W>
BERTKERN_KERNEL(kSumThreads)
layer_norm_bwd_sum_kernel(const NormSumArguments a) {
  float* shared = reinterpret_cast<float*>(ptx::shared_memory());
  const int lane = ptx::thread_index() % kSumColumns, group = ptx::thread_index() / kSumColumns;
  const int at = ptx::block_index() * kSumColumns + lane;
  float sum = 0.0f;
  if (at < 2 * a.cols) {
#pragma unroll 4
    for (int block = group; block < a.blocks; block += kSumGroups) {
      sum += a.partial[static_cast<int64_t>(block) * 2 * a.cols + at];
    }
  }
  shared[ptx::thread_index()] = sum;
  ptx::block_barrier();
  if (group != 0 || at >= 2 * a.cols) return;
  W* target = static_cast<W*>(at < a.cols ? a.dweight : a.dbias);
  if (target == nullptr) return;
#pragma unroll
  for (int other = 1; other < kSumGroups; ++other) sum += shared[other * kSumColumns + lane];
  target[at < a.cols ? at : at - a.cols] = ptx::from_float(sum, W{});
}

}  // namespace bertkern::sm80
