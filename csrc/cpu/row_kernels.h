// What the kernels on [rows, cols] matrices share. Compiled once per instruction set (see
// params.h).
#pragma once

#include "vec_math.h"

// A lambda that is called several times must not become a function that is called.
#define INLINE_LAMBDA __attribute__((always_inline))

namespace bertkern::BERTKERN_ISA {

constexpr int64_t padded(int64_t cols) { return (cols + 15) / 16 * 16 + 16; }

// Calls body(turn, column, left, mask) for every vector of a row: turn counts 0 to kTurns − 1 over
// and over (accumulators that do not wait for each other), left is at most the columns that there
// still are, and kWidth, a constant, in all but the last vector; mask clears what is past the end.
template <int kTurns, typename Body>
BERTKERN_INLINE void for_columns(int64_t cols, Body body) {
  static_assert(kTurns == 1 || kTurns == 4, "unrolled by hand");
  int64_t c = 0;
  if constexpr (kTurns == 4) {
    for (; c + 4 * kWidth <= cols; c += 4 * kWidth) {
      body(0, c, kWidth, ~Vi{});
      body(1, c + kWidth, kWidth, ~Vi{});
      body(2, c + 2 * kWidth, kWidth, ~Vi{});
      body(3, c + 3 * kWidth, kWidth, ~Vi{});
    }
  }
  for (; c + kWidth <= cols; c += kWidth) body(0, c, kWidth, ~Vi{});
  if (c < cols) {
    int32_t lane[kWidth];
    for (int i = 0; i < kWidth; ++i) lane[i] = c + i < cols ? -1 : 0;
    Vi mask;
    std::memcpy(&mask, lane, sizeof(mask));
    body(0, c, cols - c, mask);
  }
}

BERTKERN_INLINE float sum_turns(const Vf (&turn)[4]) {
  return sum_lanes((turn[0] + turn[1]) + (turn[2] + turn[3]));
}

// Column sums: rows are added up plainly in runs of kRunRows, and runs with compensation, so that
// the error does not grow with the rows.
constexpr int64_t kRunRows = 16;

// (sum, lost) += run, run = 0. Two-sum (Knuth): the rounding error of sum is kept in `lost`, unless
// it is NaN, which is what an infinite sum gives.
BERTKERN_INLINE void add_run(float* run, float* sum, float* lost, int64_t cols) {
  for (int64_t c = 0; c < cols; c += kWidth) {
    const Vf before = load(sum + c), added = load(run + c) + load(lost + c);
    const Vf after = before + added;
    const Vf virtual_added = after - before;
    const Vf error = (before - (after - virtual_added)) + (added - virtual_added);
    store(sum + c, after);
    store(lost + c, select(error == error, error, Vf{}));
    store(run + c, Vf{});
  }
}

// Dropout of hidden states: keys of each row of a matrix.
struct HiddenDropout {
  DropoutStream stream;
  const int64_t* rows;
  uint32_t threshold;
  float scale;

  HiddenDropout(const Dropout& dropout, const int64_t* dropout_rows)
      : stream(dropout_stream(dropout.seed, 0, kHiddenHead)),
        rows(dropout_rows),
        threshold(dropout.threshold),
        scale(dropout.scale) {}

  // Columns [first, first + count) of a row, in place; first is a multiple of 16.
  BERTKERN_INLINE void apply(float* values, int64_t row, int64_t first, int64_t count) const {
    if (threshold == 0) return;
    const int64_t place = rows != nullptr ? rows[row] : row;
    drop(values, first, count, dropout_row(stream, static_cast<uint32_t>(place)), threshold, scale);
  }
};

template <typename T>
BERTKERN_INLINE const T* row_of(const void* data, int64_t row, int64_t stride) {
  return static_cast<const T*>(data) + row * stride;
}
template <typename T>
BERTKERN_INLINE T* row_of(void* data, int64_t row, int64_t stride) {
  return static_cast<T*>(data) + row * stride;
}

void layer_norm_fwd(const NormArguments&, const float* weight, const float* bias, int64_t first,
                    int64_t last, float* scratch);
void embedding_layer_norm_fwd(const EmbeddingArguments&, const float* weight, const float* bias,
                              int64_t first, int64_t last, float* scratch);
void layer_norm_bwd(const NormGradArguments&, const float* weight, float* dweight, float* dbias,
                    int64_t first, int64_t last, float* scratch);
void bias_act_fwd(const ActArguments&, const float* bias, int64_t first, int64_t last);
void act_bwd(const ActGradArguments&, float* dbias, int64_t first, int64_t last);
int64_t linear_pack_scratch(int64_t rows, int64_t depth);
void linear_pack(const LinearArguments&, float* panels);
void linear_fwd(const LinearArguments&, const float* panels, int64_t first, int64_t last);

}  // namespace bertkern::BERTKERN_ISA
