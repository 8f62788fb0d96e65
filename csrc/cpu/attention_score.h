// From products to scores and back: what the options of attention do to a row of a block.
//
//   x = scale · q kᵀ,  t = tanh(x / c),  s = c · t + bias,  ds/dx = 1 − t²
//   c: softcap; 0 is none, s = x + bias
//
// q was multiplied by scale / c already (product_scale). s is −inf where the bias is False or −inf,
// whatever the product is, where the key is padding, and outside the window. Keys that are padding
// are zeros in the packed panels: they may hold NaN, and 0 · NaN = NaN. A column is a key counted
// from the start of its block. Compiled once per instruction set (see params.h).
#pragma once

#include "attention_kernels.h"

namespace bertkern::BERTKERN_ISA {

BERTKERN_INLINE float product_scale(const AttentionHead& h) {
  return h.softcap != 0.0f ? h.scale / h.softcap : h.scale;
}

// The first column of a block that query `start` or a later one sees, or one a little before it,
// where a panel and the columns of drop() begin.
BERTKERN_INLINE int64_t first_column(const AttentionHead& h, int64_t start, int64_t block) {
  const int64_t first = first_allowed(h, start) - block;
  return first > 0 ? first / kColumnStep * kColumnStep : 0;
}

// tanh to 3 ulp, as kernels/tanh.py has it: x + x·z·P(z), z = x², for |x| < 0.7, and beyond 1 − 2u
// / (1 + u), u = exp(−2|x|), which loses the value to cancellation as x goes to 0. NaN propagates.
BERTKERN_INLINE Vf vtanh(Vf x) {
  constexpr float kP[] = {-0.005138660315424204f, 0.020091967657208443f, -0.05355885997414589f,
                          0.1332911103963852f, -0.3333319127559662f};
  const Vf magnitude = bit_cast<Vf>(bit_cast<Vi>(x) & INT32_MAX);
  const Vf z = x * x;
  const Vf small = x + x * (z * polynomial(kP, z));
  const Vf u = vexp(-2.0f * magnitude);
  const Vf large = 1.0f - 2.0f * u / (1.0f + u);
  const Vf signed_large = bit_cast<Vf>(bit_cast<Vi>(large) | (bit_cast<Vi>(x) & INT32_MIN));
  return select(magnitude < 0.7f, small, signed_large);
}

// s += bias for the first `count` columns; −inf in the bias is −inf, whatever s is.
template <typename T>
inline void add_bias(float* s, const T* bias, int64_t stride, int64_t count) {
  const auto add = [s](int64_t j, Vf b) {
    store(s + j, select(b == -kInfinity, b, load(s + j) + b));
  };
  if (stride == 1) {
    for (int64_t j = 0; j < count; j += kWidth) add(j, load_columns(bias + j, count - j));
  } else if (stride == 0) {
    const T one[1] = {bias[0]};
    float value[kWidth];
    store(value, load_as_float(one, 1));
    for (int64_t j = 0; j < count; j += kWidth) add(j, splat(value[0]));
  } else {
    for (int64_t j = 0; j < count; j += kWidth) {
      T part[kWidth] = {};
      for (int i = 0; i < kWidth && j + i < count; ++i) part[i] = bias[(j + i) * stride];
      add(j, load_as_float(part));
    }
  }
}

// s := −inf in those of the first `count` columns where `kept` is 0.
inline void keep_where(float* s, const uint8_t* kept, int64_t stride, int64_t count) {
  typedef uint8_t Vb __attribute__((vector_size(kWidth)));
  if (stride != 1) {
    for (int64_t j = 0; j < count; ++j) {
      if (kept[j * stride] == 0) s[j] = -kInfinity;
    }
    return;
  }
  for (int64_t j = 0; j < count; j += kWidth) {
    Vb part{};
    if (count - j >= kWidth) {
      std::memcpy(&part, kept + j, sizeof(part));
    } else {
      std::memcpy(&part, kept + j, count - j);
    }
    // By way of 16 bits: GCC knows no single step from 8 to 32.
    const Vu bytes = __builtin_convertvector(__builtin_convertvector(part, Vh), Vu);
    const Vi keep = bytes != 0u;
    store(s + j, select(keep, load(s + j), splat(-kInfinity)));
  }
}

// Products of query `query` with the keys of a block := its scores, in columns [from, to), and
// perhaps some more. slopes := 1 − t² where there is a cap; or null.
template <typename T>
inline void finish_scores(const AttentionHead& h, int64_t query, int64_t block, int64_t from,
                          int64_t to, float* s, float* slopes) {
  if (h.softcap != 0.0f) {
    for (int64_t j = from; j < to; j += kWidth) {
      const Vf t = vtanh(load(s + j));
      store(s + j, t * h.softcap);
      if (slopes != nullptr) store(slopes + j, 1.0f - t * t);
    }
  }
  const int64_t at = query * h.bias_row + (block + from) * h.bias_key;
  if (h.bias_kind == BiasKind::kFloat32) {
    add_bias(s + from, static_cast<const float*>(h.bias) + at, h.bias_key, to - from);
  } else if (h.bias_kind == BiasKind::kSame) {
    add_bias(s + from, static_cast<const T*>(h.bias) + at, h.bias_key, to - from);
  } else if (h.bias_kind == BiasKind::kMask) {
    keep_where(s + from, static_cast<const uint8_t*>(h.bias) + at, h.bias_key, to - from);
  }
  if (h.kept != nullptr) keep_where(s + from, h.kept + block + from, 1, to - from);
  const int64_t first = first_allowed(h, query) - block;
  for (int64_t j = from; j < first && j < to; j += kWidth) {
    const Vi out = first_lanes(first - j < kWidth ? first - j : kWidth);
    store(s + j, select(out, splat(-kInfinity), load(s + j)));
  }
}

// drop() for query `query` and `count` keys from `first` on, which need not be a multiple of 16 in
// the sequence: what stands around the row comes back.
BERTKERN_INLINE void drop_keys(const AttentionHead& h, int64_t query, int64_t first, int64_t count,
                               float* row) {
  const DropoutRow keys = dropout_row(h.stream, static_cast<uint32_t>(query));
  const int64_t lead = (h.first_key + first) % 16;
  if (lead == 0) {
    drop(row, h.first_key + first, count, keys, h.dropout_threshold, h.dropout_scale);
    return;
  }
  float before[16], behind[16];
  std::memcpy(before, row - lead, lead * sizeof(float));
  std::memcpy(behind, row + count, sizeof(behind));
  drop(row - lead, h.first_key + first - lead, lead + count, keys, h.dropout_threshold,
       h.dropout_scale);
  std::memcpy(row - lead, before, lead * sizeof(float));
  std::memcpy(row + count, behind, sizeof(behind));
}

// Keys that are padding := 0 in what pack_transposed made of a block …
inline void clear_columns(const AttentionHead& h, int64_t block, int64_t keys, float* panels) {
  for (int64_t j = 0; h.kept != nullptr && j < keys; ++j) {
    if (h.kept[block + j] != 0) continue;
    float* column = panels + j / kPanel * kPanel * h.head_dim + j % kPanel;
    for (int64_t d = 0; d < h.head_dim; ++d) column[d * kPanel] = 0.0f;
  }
}

// … and in what pack made of it.
inline void clear_rows(const AttentionHead& h, int64_t block, int64_t keys, int64_t panel_depth,
                       float* panels) {
  for (int64_t j = 0; h.kept != nullptr && j < keys; ++j) {
    if (h.kept[block + j] != 0) continue;
    for (int64_t d = 0; d < h.head_dim; d += kPanel) {
      clear(panels + d * panel_depth + j * kPanel, 0, kPanel);
    }
  }
}

}  // namespace bertkern::BERTKERN_ISA
