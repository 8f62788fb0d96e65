// What the forward and the backward of CPU attention share: block sizes, the mask, reading rows.
// Compiled once per instruction set (see params.h).
#pragma once

#include "gemm.h"
#include "vec_math.h"

namespace bertkern::BERTKERN_ISA {

constexpr int64_t kKeyBlock = 512;          // a multiple of 16, which drop() relies on
constexpr int64_t kQueryBlock = 4 * kRows;  // scores of a block: at most 48 or 96 KB

// Scores of a row take whole panels, and the 16 columns that drop() works on.
constexpr int64_t key_columns(int64_t keys) {
  return round_up(keys < kKeyBlock ? keys : kKeyBlock, kPanel < 16 ? 16 : kPanel);
}

// Keys that query i sees are [0, allowed_keys); may be negative.
BERTKERN_INLINE int64_t allowed_keys(const AttentionHead& h, int64_t i) {
  if (!h.causal) return h.len_k;
  const int64_t seen = i + h.causal_offset + 1;
  return seen < h.len_k ? seen : h.len_k;
}

BERTKERN_INLINE int64_t clamp_keys(int64_t n, int64_t keys) {
  return n < 0 ? 0 : (n < keys ? n : keys);
}

// Reads `count` rows of `cols` elements, times `scale`, into fp32 rows of `width` floats, zeros
// where nothing is.
template <typename T>
BERTKERN_INLINE void read_rows(const T* source, int64_t row, int64_t count, int64_t cols,
                               float scale, float* target, int64_t width) {
  for (int64_t i = 0; i < round_up(count, kRows); ++i) {
    float* to = target + i * width;
    int64_t c = 0;
    if (i < count) {
      const T* from = source + i * row;
      for (; c < cols; c += kWidth) store(to + c, load_columns(from + c, cols - c) * scale);
    }
    for (; c < width; c += kWidth) store(to + c, Vf{});
  }
}

// Clears row[from, to); `to` is a multiple of kWidth.
BERTKERN_INLINE void clear(float* row, int64_t from, int64_t to) {
  for (; from < to && from % kWidth != 0; ++from) row[from] = 0.0f;
  for (; from < to; from += kWidth) store(row + from, Vf{});
}

int64_t attention_fwd_scratch(int64_t max_queries, int64_t max_keys, int head_dim);
void attention_fwd(const AttentionHead& head, DType dtype, int64_t first, int64_t last,
                   float* scratch);
int64_t attention_bwd_scratch(int64_t max_queries, int64_t max_keys, int head_dim);
void attention_bwd(const AttentionHead& head, DType dtype, float* scratch);

}  // namespace bertkern::BERTKERN_ISA
