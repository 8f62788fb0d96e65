// Which sequence a block works on, which scores count, and what a score is: bias, cap, dropout.
//
// Query i sees key j when j < len_k, low <= j - i <= high and the key is not padding. Scores come
// in natural units or, on the plain path, as the products themselves: `scale` and log2(e) are one
// factor of the exponent there.
#pragma once

#include "common/dropout.h"
#include "cuda/sm80/attention_tile.cuh"

namespace bertkern::sm80 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// Sequence `index` of the batch: its first rows, its lengths, its band. In varlen the index
// a.batch stands for the rows behind the last sequence, which belong to none.
struct Sequence {
  int64_t first_q, first_k;
  int len_q, len_k;
  int low, high;
};

BERTKERN_DEVICE Sequence sequence_of(const AttentionKernelArguments& a, int index) {
  Sequence s{0, 0, a.seqlen_q, a.seqlen_k, 0, 0};
  if (a.cu_seqlens_q != nullptr) {
    s.first_q = a.cu_seqlens_q[index];
    s.first_k = a.cu_seqlens_k[index];
    if (index == a.batch) {
      s.len_q = static_cast<int>(a.total_q - s.first_q);
      s.len_k = static_cast<int>(a.total_k - s.first_k);
      return s;
    }
    s.len_q = a.cu_seqlens_q[index + 1] - static_cast<int>(s.first_q);
    s.len_k = a.cu_seqlens_k[index + 1] - static_cast<int>(s.first_k);
  }
  // The band is that of the whole matrix; key_lengths only take keys away.
  const int diagonal = a.bottom_right ? s.len_k - s.len_q : 0;
  s.low = a.window_left == kNoWindow ? -kNoWindow : diagonal - a.window_left;
  s.high = a.window_right == kNoWindow ? kNoWindow : diagonal + a.window_right;
  if (a.key_lengths != nullptr) {
    const int length = a.key_lengths[index];
    s.len_k = length < s.len_k ? length : s.len_k;
  }
  return s;
}

// Row 0 of a sequence's head in a tensor.
template <typename T>
BERTKERN_DEVICE T* head_rows(const DeviceTensor& t, int index, int64_t first, int head) {
  return static_cast<T*>(t.data) + index * t.batch + first * t.token + head * t.head;
}

// Where the lse of a sequence's first query is.
BERTKERN_DEVICE int64_t lse_offset(const AttentionKernelArguments& a, int index, int64_t first_q,
                                   int head) {
  return index * a.lse_batch + head * a.lse_head + first_q;
}

BERTKERN_DEVICE const uint8_t* kept_keys(const AttentionKernelArguments& a, int index) {
  return a.key_padding_mask == nullptr
             ? nullptr
             : a.key_padding_mask + static_cast<int64_t>(index) * a.seqlen_k;
}

// Keys that are not padding.
struct KeptKeys {
  const uint8_t* kept;
  BERTKERN_DEVICE bool operator()(int j) const { return kept == nullptr || kept[j] != 0; }
};

BERTKERN_DEVICE bool sees(const Sequence& s, const uint8_t* kept, int i, int j) {
  return j < s.len_k && j >= i + s.low && j <= i + s.high && (kept == nullptr || kept[j] != 0);
}

// Whether every query of [first_q, end_q) sees every key of [first_k, end_k).
BERTKERN_DEVICE bool sees_all(const Sequence& s, const uint8_t* kept, int first_q, int end_q,
                              int first_k, int end_k) {
  return kept == nullptr && end_k <= s.len_k && first_k >= end_q - 1 + s.low &&
         end_k - 1 <= first_q + s.high;
}

// log(x) of a sum of probabilities, 1 <= x < Inf, or NaN: x = 2^e f with f in [sqrt(1/2), sqrt(2)),
// e log(2) in two parts, so that what the logarithm of f rounds is small.
BERTKERN_DEVICE float natural_log(float x) {
  constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860677e-6f;
  union {
    float value;
    uint32_t bits;
  } f{x};
  int e = static_cast<int>(f.bits >> 23) - 127;
  f.bits = (f.bits & 0x007FFFFFu) | 0x3F800000u;
  if (f.value > 1.41421356f) {
    f.value *= 0.5f;
    ++e;
  }
  const float exponent = static_cast<float>(e);
  const float small = ptx::fma(ptx::log2(f.value), kLn2, exponent * kLn2Low);
  return x != x ? x : ptx::fma(exponent, kLn2High, small);
}

// What the general variant adds to a product: a matrix of bias, the cap.
struct ScoreOptions {
  DeviceBias kind;
  const void* bias;  // the head's own matrix
  int64_t query_stride, key_stride;
  float scale, softcap;
};

template <typename T>
BERTKERN_DEVICE ScoreOptions score_options(const AttentionKernelArguments& a, int index, int head) {
  const int64_t offset = index * a.bias_strides[0] + head * a.bias_strides[1];
  const int bytes = a.bias_kind == DeviceBias::kMask      ? 1
                    : a.bias_kind == DeviceBias::kFloat32 ? 4
                                                          : static_cast<int>(sizeof(T));
  return {a.bias_kind,       static_cast<const char*>(a.bias) + offset * bytes,
          a.bias_strides[2], a.bias_strides[3],
          a.scale,           a.softcap};
}

// tanh(x) = sign(x) (1 - 2 / (e^2|x| + 1)); an absolute error of 2^-22, which suits 16-bit scores.
BERTKERN_DEVICE float tanh_of(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float y = 1.0f - 2.0f * ptx::reciprocal(ptx::exp2(2.0f * kLog2e * magnitude) + 1.0f);
  return x < 0.0f ? -y : (x != x ? x : y);
}

// score = softcap · tanh(scale · product / softcap) + bias in natural units, -Inf where a bool bias
// is False. i, j are inside the sequence. `derivative`: of the capped product by scale · product.
template <typename T>
BERTKERN_DEVICE float score_of(const ScoreOptions& o, float product, int i, int j,
                               float& derivative) {
  float x = product * o.scale;
  derivative = 1.0f;
  if (o.softcap != 0.0f) {
    const float tanh = tanh_of(x / o.softcap);
    derivative = 1.0f - tanh * tanh;
    x = tanh * o.softcap;
  }
  if (o.kind == DeviceBias::kNone) return x;
  const int64_t at = i * o.query_stride + j * o.key_stride;
  if (o.kind == DeviceBias::kMask) {
    return static_cast<const uint8_t*>(o.bias)[at] != 0 ? x : -kInfinity;
  }
  const float bias = o.kind == DeviceBias::kFloat32
                         ? static_cast<const float*>(o.bias)[at]
                         : ptx::to_float(static_cast<const T*>(o.bias)[at]);
  return bias == -kInfinity ? bias : x + bias;
}

BERTKERN_DEVICE DropoutStream dropout_stream_of(const AttentionKernelArguments& a, int index,
                                                int head) {
  return dropout_stream(static_cast<uint64_t>(*a.dropout_seed),
                        static_cast<uint32_t>(index + a.sequence_offset),
                        static_cast<uint32_t>(head));
}

// Which of the four scores {i, i ^ 8} x {j, j ^ 8} are kept: kept[bit 3 of i][bit 3 of j]. `row` is
// dropout_row of i or of i ^ 8. A thread holds all four in two neighbouring fragments of 16 x 8,
// whether queries or keys are its rows.
BERTKERN_DEVICE void kept_scores(DropoutRow row, int j, uint32_t threshold, bool (&kept)[2][2]) {
  const uint32_t group = dropout_group(static_cast<uint32_t>(j));
  row.multiplier = kHashMulB;
  const uint32_t low = dropout_pair(row, group);
  row.multiplier = kHashMulC;
  const uint32_t high = dropout_pair(row, group);
  kept[0][0] = (low & 0xFFFFu) >= threshold;
  kept[0][1] = (low >> 16) >= threshold;
  kept[1][0] = (high & 0xFFFFu) >= threshold;
  kept[1][1] = (high >> 16) >= threshold;
}

}  // namespace bertkern::sm80
