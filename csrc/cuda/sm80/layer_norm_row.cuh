// A row of a matrix in the registers of the threads that share it: loads, stores, sums, dropout.
//
// Thread t of a row holds kElements / 8 vectors of 8 columns; vector i starts at column (i ·
// kThreads + t) · 8.
#pragma once

#include "../../common/dropout.h"
#include "../../common/norm_params.h"
#include "../../ptx/memory.cuh"
#include "../../ptx/thread.cuh"

namespace bertkern::sm80 {

constexpr int kVector = 8;

// 8 elements at `address`, the first of them column `column`, as fp32; zeros past the row's end.
template <typename T>
BERTKERN_DEVICE void load_vector(const T* row, int column, int cols, bool aligned,
                                 float (&out)[kVector]) {
  if (aligned && column < cols) {  // cols is a multiple of 8: the vector is wholly inside
    union {
      ptx::Words4 words[sizeof(T) / 2];
      T element[kVector];
    } raw;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
      raw.words[i] = ptx::load_global_16(row + column + i * (16 / static_cast<int>(sizeof(T))));
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[i] = ptx::to_float(raw.element[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    out[i] = column + i < cols ? ptx::to_float(row[column + i]) : 0.0f;
  }
}

template <typename T>
BERTKERN_DEVICE void store_vector(T* row, int column, int cols, bool aligned,
                                  const float (&in)[kVector]) {
  if (aligned) {
    if (column >= cols) return;
    union {
      ptx::Words4 words[sizeof(T) / 2];
      T element[kVector];
    } raw;
#pragma unroll
    for (int i = 0; i < kVector; ++i) raw.element[i] = ptx::from_float(in[i], T{});
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
      ptx::store_global_16(row + column + i * (16 / static_cast<int>(sizeof(T))), raw.words[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (column + i < cols) row[column + i] = ptx::from_float(in[i], T{});
  }
}

// The sum over all threads of a row, the same bits in each of them. `shared` has kWarps floats;
// every thread of the block takes part.
template <typename Tile>
BERTKERN_DEVICE float row_sum(float value, float* shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += ptx::shuffle_xor(value, mask);
  if constexpr (Tile::kThreads > 32) {
    ptx::block_barrier();  // what was read from `shared` before is no longer needed
    if (ptx::thread_index() % 32 == 0) shared[ptx::thread_index() / 32] = value;
    ptx::block_barrier();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Tile::kWarps; ++warp) value += shared[warp];
  }
  return value;
}

// Dropout of 8 columns of a row, a dropped value is 0, NaN or not; `column` is a multiple of 8.
BERTKERN_DEVICE void drop_vector(float (&values)[kVector], DropoutRow keys, int column,
                                 uint32_t threshold, float scale) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t bits = dropout_bits(keys, static_cast<uint32_t>(column + i));
    values[i] = bits >= threshold ? values[i] * scale : 0.0f;
  }
}

// Keys of a token's row in hidden-state dropout.
BERTKERN_DEVICE DropoutRow hidden_row(const int64_t* seed, const int64_t* rows, int64_t row) {
  const int64_t place = rows != nullptr ? rows[row] : row;
  return dropout_row(dropout_stream(static_cast<uint64_t>(*seed), 0, kHiddenHead),
                     static_cast<uint32_t>(place));
}

}  // namespace bertkern::sm80
