// What the forward and the backward of CPU attention share: block sizes, the mask, reading rows.
// Compiled once per instruction set (see params.h).
#pragma once

#include "gemm.h"
#include "vec_math.h"

namespace bertkern::BERTKERN_ISA {

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kKeyBlock = 512;          // a multiple of 16, which drop() relies on
constexpr int64_t kQueryBlock = 4 * kRows;  // scores of a block: at most 48 or 96 KB

// Scores of a row take whole panels, and the 16 columns that drop() works on.
constexpr int64_t kColumnStep = kPanel < 16 ? 16 : kPanel;

constexpr int64_t key_columns(int64_t keys) {
  return round_up(keys < kKeyBlock ? keys : kKeyBlock, kColumnStep);
}

// Keys that query i sees are [first_allowed, allowed_keys), less what masks take away. The first is
// not negative, the other may be, and may be less than the first.
BERTKERN_INLINE int64_t first_allowed(const AttentionHead& h, int64_t i) {
  return i + h.low > 0 ? i + h.low : 0;
}
BERTKERN_INLINE int64_t allowed_keys(const AttentionHead& h, int64_t i) {
  const int64_t seen = i + h.high + 1;
  return seen < h.len_k ? seen : h.len_k;
}

// Whether what a query sees is decided by values; else its index decides alone.
BERTKERN_INLINE bool masked_by_values(const AttentionHead& h) {
  return h.bias_kind != BiasKind::kNone || h.kept != nullptr;
}

// Whether scores are more than scaled products, cut at allowed_keys.
BERTKERN_INLINE bool has_options(const AttentionHead& h) {
  return masked_by_values(h) || h.softcap != 0.0f || first_allowed(h, h.len_q - 1) > 0;
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

// Lanes [0, n): all ones; the others: 0.
BERTKERN_INLINE Vi first_lanes(int64_t n) {
  Vi lane{};
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n);
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
