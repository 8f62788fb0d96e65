// What the attention kernels of all architectures share: which sequence, head and tile a block
// works on, which scores count, and what a score is: bias, cap, dropout.
//
// Query i sees key j when j < len_k, low <= j - i <= high and the key is not padding. Scores come
// in natural units or, on the plain path, as the products themselves: `scale` and log2(e) are one
// factor of the exponent there. A score's fragment is that of ptx/mma.cuh and ptx/wgmma.cuh: lane
// 4g + t holds rows g and g + 8, columns 2t and 2t + 1.
#pragma once

#include "common/attention_params.h"
#include "common/dropout.h"
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/thread.cuh"

namespace bertkern::cuda {

// Unsigned inside: the compiler then knows of each bit, and divides by powers of two in one step.
BERTKERN_DEVICE int lane_index() {
  return static_cast<int>(static_cast<uint32_t>(ptx::thread_index()) % ptx::kWarpThreads);
}
BERTKERN_DEVICE int warp_index() {
  return static_cast<int>(static_cast<uint32_t>(ptx::thread_index()) / ptx::kWarpThreads);
}

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

// The sequence whose turn it is. In varlen the rows behind the last sequence come last.
BERTKERN_DEVICE int sequence_in_turn(const AttentionKernelArguments& a, int turn) {
  return a.order != nullptr && turn < a.batch ? a.order[turn] : turn;
}

// A tile of queries of a head, and the tiles of keys that some of them see.
struct QueryTile {
  Sequence s;
  int index, head;           // of the sequence in the batch
  int first_q, end_q;        // none where first_q >= end_q
  int first_tile, end_tile;  // of keys
};

template <int kRows, int kKeys>
BERTKERN_DEVICE QueryTile query_tile(const AttentionKernelArguments& a, int index, int head,
                                     int tile) {
  const Sequence s = sequence_of(a, index);
  const int first_q = tile * kRows;
  const int end_q = first_q + kRows < s.len_q ? first_q + kRows : s.len_q;
  const int first_key = first_q + s.low > 0 ? first_q + s.low : 0;
  const int end_key = end_q + s.high < s.len_k ? end_q + s.high : s.len_k;
  const int first_tile = first_key / kKeys;
  const int end_tile = end_key > first_key ? (end_key + kKeys - 1) / kKeys : first_tile;
  return {s, index, head, first_q, end_q, first_tile, end_tile};
}

// The head of k and v that a head of q reads.
BERTKERN_DEVICE int key_head_of(const AttentionKernelArguments& a, int head) {
  return head / a.group;
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

// The key that query i sees where band and length leave it one alone, else -1.
BERTKERN_DEVICE int only_key(const Sequence& s, int i) {
  const int first = i + s.low > 0 ? i + s.low : 0;
  const int last = i + s.high < s.len_k ? i + s.high : s.len_k - 1;
  return first == last ? first : -1;
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

// What a bias makes of a score in natural units; `at` is its element.
BERTKERN_DEVICE float masked(const ScoreOptions& o, float score, int64_t at) {
  return static_cast<const uint8_t*>(o.bias)[at] != 0 ? score : -kInfinity;
}
template <typename Bias>
BERTKERN_DEVICE float biased(const ScoreOptions& o, float score, int64_t at) {
  const float bias = ptx::to_float(static_cast<const Bias*>(o.bias)[at]);
  return bias == -kInfinity ? bias : score + bias;
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
  if (o.kind == DeviceBias::kMask) return masked(o, x, at);
  return o.kind == DeviceBias::kFloat32 ? biased<float>(o, x, at) : biased<T>(o, x, at);
}

// Whether dropout is on. Only the general variant has to look.
template <AttentionVariant kVariant>
BERTKERN_DEVICE bool has_dropout(const AttentionKernelArguments& a) {
  return kVariant == AttentionVariant::kDropout ||
         (kVariant == AttentionVariant::kGeneral && a.dropout_threshold != 0);
}

BERTKERN_DEVICE DropoutStream dropout_stream_of(const AttentionKernelArguments& a, int index,
                                                int head) {
  return dropout_stream(static_cast<uint64_t>(*a.dropout_seed),
                        static_cast<uint32_t>(index + a.sequence_offset),
                        static_cast<uint32_t>(head));
}

// Which of four scores are kept, {i, i ^ 8} x the two columns of a group: kept[bit 3 of i][bit 3 of
// j]. `row` is dropout_row of i or of i ^ 8. A thread holds all four in two neighbouring fragments
// of 16 x 8, whether queries or keys are its rows.
BERTKERN_DEVICE void kept_in_groups(DropoutRow row, uint32_t group, uint32_t threshold,
                                    bool (&kept)[2][2]) {
  // dropout_pair's halves, each at the top of a word and compared there: bits >= threshold where
  // the word is greater than this, whatever stands below.
  const uint32_t below = (threshold << 16) - 1;
  const uint32_t state = dropout_state(row, group);
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const uint32_t product = state * (high ? kHashMulC : kHashMulB);
    kept[high][0] = ((product << 16) ^ product) > below;
    kept[high][1] = product > below;
  }
}

// The same for the group of column j.
BERTKERN_DEVICE void kept_scores(DropoutRow row, int j, uint32_t threshold, bool (&kept)[2][2]) {
  kept_in_groups(row, dropout_group(static_cast<uint32_t>(j)), threshold, kept);
}

// Whether dropout keeps score (i, j). `row` as there.
BERTKERN_DEVICE bool is_kept(DropoutRow row, int i, int j, uint32_t threshold) {
  bool kept[2][2];
  kept_scores(row, j, threshold, kept);
  const bool of_low = (j & 8) != 0 ? kept[0][1] : kept[0][0];
  const bool of_high = (j & 8) != 0 ? kept[1][1] : kept[1][0];
  return (i & 8) != 0 ? of_high : of_low;
}

// The sum over the four lanes that hold one row of a fragment, and the maximum.
BERTKERN_DEVICE float sum_of_row(float x) {
  x += ptx::shuffle_xor(x, 1);
  return x + ptx::shuffle_xor(x, 2);
}
BERTKERN_DEVICE float max_of_row(float x) {
  x = ptx::max(x, ptx::shuffle_xor(x, 1));
  return ptx::max(x, ptx::shuffle_xor(x, 2));
}

// Zeros in rows [first, end) of a matrix: the share of thread `thread` of `threads`, which are at
// least as many as a row has chunks.
template <typename T>
BERTKERN_DEVICE void zero_share(T* rows, int64_t stride, int64_t first, int64_t end, int width,
                                int64_t thread, int64_t threads) {
  const int chunks = width / 8;
  const int64_t at_once = threads / chunks, row = thread / chunks;
  if (row >= at_once) return;
  const int64_t column = thread % chunks * 8;
  for (int64_t i = first + row; i < end; i += at_once) {
    ptx::store_global_16(rows + i * stride + column, {{0, 0, 0, 0}});
  }
}

// The same by all threads of the blocks `block` of `blocks`.
template <typename T, int kThreads>
BERTKERN_DEVICE void zero_rows(T* rows, int64_t stride, int64_t first, int64_t end, int width,
                               int block, int blocks) {
  zero_share(rows, stride, first, end, width,
             static_cast<int64_t>(block) * kThreads + ptx::thread_index(),
             static_cast<int64_t>(blocks) * kThreads);
}

}  // namespace bertkern::cuda
