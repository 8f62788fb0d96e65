// A row of a matrix in the registers of the threads that share it: loads, stores, sums, dropout.
//
// Thread t of a row holds kVectors vectors of 8 columns; vector i starts at column (i · threads +
// t) · 8, so that neighbouring threads read neighbouring 16 bytes. A row's loads are all issued
// before the first is used: what was loaded stays as it is in memory (Raw) until then.
#pragma once

#include "common/dropout.h"
#include "common/norm_params.h"
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/thread.cuh"

namespace bertkern::sm80 {

constexpr int kVector = 8;
constexpr int kMaxWarps = 16;  // of a block
static_assert(NormTileWide<2>::kMaxThreads <= kMaxWarps * ptx::kWarpThreads &&
                  NormTileWide<4>::kMaxThreads <= kMaxWarps * ptx::kWarpThreads,
              "there is room for the sums of every warp");

// 8 elements as they are in memory.
template <typename T>
union Raw {
  static constexpr int kWords = static_cast<int>(sizeof(T)) / 2;  // of 16 bytes
  static constexpr int kElements = kVector / kWords;              // of one of these
  ptx::Words4 words[kWords];
  T element[kVector];
};

// Which rows a thread works on, and which columns of them.
template <typename Tile>
struct RowThread {
  int lane, threads, block_row;

  BERTKERN_DEVICE explicit RowThread(const NormRows& rows)
      : lane(Tile::kBlockRow ? ptx::thread_index() : ptx::thread_index() % ptx::kWarpThreads),
        threads(Tile::kBlockRow ? rows.threads : ptx::kWarpThreads),
        block_row(Tile::kBlockRow ? 0 : ptx::thread_index() / ptx::kWarpThreads) {}

  BERTKERN_DEVICE int column(int vector) const { return (vector * threads + lane) * kVector; }
  BERTKERN_DEVICE int64_t first_row() const {
    return static_cast<int64_t>(ptx::block_index()) * Tile::kRowsPerBlock + block_row;
  }
  BERTKERN_DEVICE int64_t row_step() const {
    return static_cast<int64_t>(ptx::block_count()) * Tile::kRowsPerBlock;
  }
};

// Columns column to column + 7; zeros past the row's end. `aligned`: the row starts on 16 bytes and
// cols is a multiple of 8, so that a vector lies inside or past the end.
template <typename T>
BERTKERN_DEVICE Raw<T> load_vector(const T* row, int column, int cols, bool aligned) {
  Raw<T> raw;
  if (aligned) {
#pragma unroll
    for (int w = 0; w < Raw<T>::kWords; ++w) {
      raw.words[w] = ptx::Words4{};
      if (column < cols) {
        raw.words[w] = ptx::load_global_16(row + column + w * Raw<T>::kElements);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      raw.element[j] = column + j < cols ? row[column + j] : ptx::from_float(0.0f, T{});
    }
  }
  return raw;
}

template <typename Tile, typename T>
BERTKERN_DEVICE void load_row(Raw<T> (&raw)[Tile::kVectors], const T* row,
                              const RowThread<Tile>& thread, int cols, bool aligned) {
  const auto load = [&](bool known) {
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      raw[i] = load_vector(row, thread.column(i), cols, known);
    }
  };
  aligned ? load(true) : load(false);  // one branch for the whole row
}

// Nothing is written past the row's end.
template <typename T>
BERTKERN_DEVICE void store_vector(T* row, int column, int cols, bool aligned, const Raw<T>& raw) {
  if (aligned) {
    if (column >= cols) return;
#pragma unroll
    for (int w = 0; w < Raw<T>::kWords; ++w) {
      ptx::store_global_16(row + column + w * Raw<T>::kElements, raw.words[w]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (column + j < cols) row[column + j] = raw.element[j];
    }
  }
}

template <typename T>
BERTKERN_DEVICE void unpack(const Raw<T>& raw, float (&values)[kVector]) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) values[j] = ptx::to_float(raw.element[j]);
}

// Rounded to nearest even.
template <typename T>
BERTKERN_DEVICE Raw<T> pack_vector(const float (&values)[kVector]) {
  Raw<T> raw;
#pragma unroll
  for (int j = 0; j < kVector; j += 2) {
    if constexpr (sizeof(T) == 4) {
      raw.element[j] = values[j];
      raw.element[j + 1] = values[j + 1];
    } else {
      raw.words[0].word[j / 2] = ptx::pack(values[j], values[j + 1], T{});
    }
  }
  return raw;
}

// 8 columns of weight or bias: fp32 where they are wide, else of the rows' type T.
template <typename T>
BERTKERN_DEVICE void load_parameter(float (&values)[kVector], const void* parameter, int column,
                                    const NormRows& rows) {
  if (rows.wide_weight) {
    unpack(load_vector(static_cast<const float*>(parameter), column, rows.cols, rows.aligned),
           values);
  } else {
    unpack(load_vector(static_cast<const T*>(parameter), column, rows.cols, rows.aligned), values);
  }
}

// Sets what lies past the row's end to `value`: one comparison for most threads.
BERTKERN_DEVICE void fill_past_end(float (&values)[kVector], int column, int cols, float value) {
  if (column + kVector <= cols) return;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (column + j >= cols) values[j] = value;
  }
}

// kCount sums over all threads of a row, the same bits in each of them. `shared`, where a row is a
// block's, has kCount · kMaxWarps floats that nobody reads any more when the first thread comes
// here; every thread of the block takes part.
template <typename Tile, int kCount>
BERTKERN_DEVICE void row_sums(float (&value)[kCount], const RowThread<Tile>& thread,
                              float* shared) {
  const auto over_warp = [&value] {
#pragma unroll
    for (int mask = ptx::kWarpThreads / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) value[n] += ptx::shuffle_xor(value[n], mask);
    }
  };
  over_warp();
  if constexpr (Tile::kBlockRow) {
    const int in_warp = thread.lane % ptx::kWarpThreads;
    const int warps = thread.threads / ptx::kWarpThreads;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      if (in_warp == 0) shared[n * kMaxWarps + thread.lane / ptx::kWarpThreads] = value[n];
    }
    ptx::block_barrier();
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      value[n] = in_warp < warps ? shared[n * kMaxWarps + in_warp] : 0.0f;
    }
    over_warp();
  }
}

// Mean and rstd of a row. `left` is the mean of the deviations from the first mean: what its
// rounding left behind, which is large beside the deviations of a row with a large mean.
struct RowStatistics {
  float mean, rstd, left;
};

// Of a row z, 0 past its end, from which the first mean is taken off. `shared` as in row_sums,
// 3 · kMaxWarps floats.
template <typename Tile>
BERTKERN_DEVICE RowStatistics centre_row(float (&z)[Tile::kVectors][kVector], float eps,
                                         const NormRows& rows, const RowThread<Tile>& thread,
                                         float* shared) {
  float sum[1] = {};
#pragma unroll
  for (int i = 0; i < Tile::kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum[0] += z[i][j];
  }
  row_sums(sum, thread, shared);
  const float mean = sum[0] * rows.inverse_cols;
  float deviations[2] = {};  // their sum, and that of their squares
#pragma unroll
  for (int i = 0; i < Tile::kVectors; ++i) {
    fill_past_end(z[i], thread.column(i), rows.cols, mean);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      z[i][j] -= mean;
      deviations[0] += z[i][j];
      deviations[1] += z[i][j] * z[i][j];
    }
  }
  row_sums(deviations, thread, shared + kMaxWarps);
  const float left = deviations[0] * rows.inverse_cols;
  const float variance = deviations[1] * rows.inverse_cols - left * left;
  // A row of one value leaves rounding, of either sign. A NaN stays.
  return {mean + left, ptx::rsqrt((variance < 0.0f ? 0.0f : variance) + eps), left};
}

// Keys of hidden-state dropout: of the seed, and of a token's row.
BERTKERN_DEVICE DropoutStream hidden_stream(const DeviceDropout& dropout) {
  return dropout_stream(static_cast<uint64_t>(*dropout.seed), 0, kHiddenHead);
}
BERTKERN_DEVICE DropoutRow hidden_row(const DeviceDropout& dropout, DropoutStream stream,
                                      int64_t row) {
  const int64_t place = dropout.rows != nullptr ? dropout.rows[row] : row;
  return dropout_row(stream, static_cast<uint32_t>(place));
}

// Dropout, which is on, of 8 columns of a row; a dropped value is 0, NaN or not. `column` is a
// multiple of 8, so the columns lie in the same half of their groups (common/dropout.h).
BERTKERN_DEVICE void drop_vector(float (&values)[kVector], DropoutRow keys, int column,
                                 const DeviceDropout& dropout) {
  const uint32_t group = dropout_group(static_cast<uint32_t>(column));
  const int shift = (column & 8) != 0 ? 0 : 16;  // brings this half's 16 bits to the top
  // bits >= threshold, in the upper half of a word. A threshold of 65536 keeps nothing.
  const uint32_t limit = (dropout.threshold << 16) - 1;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const bool keep = dropout_pair(keys, group + static_cast<uint32_t>(j)) << shift > limit;
    values[j] = keep ? values[j] * dropout.scale : 0.0f;
  }
}

}  // namespace bertkern::sm80
