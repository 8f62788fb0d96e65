// CPU attention: from tensors to work items (sequence, head, range of queries).
//
// B batch, S sequence, T total tokens, H heads, Hk key heads, D head dim. How queries are cut into
// items depends on the number of threads, but no result does: a query's arithmetic is the same in
// every item (gemm.h), and what several heads add up to is added in their order (attention_sums.h).
#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_sums.h"
#include "cpu.h"
#include "parallel.h"

namespace bertkern::cpu {
namespace {

// First token and length of one sequence, in q and in k. Its keys are those that may count: from
// the first that some query sees, and that is not padding, to the last that is not padding.
struct Sequence {
  int64_t batch;  // its index; in the batched layout also that of the tensors' first dimension
  int64_t start_q, len_q, start_k, len_k;
  int64_t first_key, all_keys;  // keys taken off at the front; the sequence's own length
  bool holes;                   // some of its keys are padding
};

// In the batched layout the diagonal is that of the whole matrix: key_lengths mean padding, nothing
// else.
int64_t diagonal_of(const AttentionArguments& a, const Sequence& s) {
  return a.cu_seqlens_q != nullptr ? s.all_keys - s.len_q : a.seqlen_k - a.seqlen_q;
}

// Query i sees no key before i + this: the window's left side.
int64_t low_of(const AttentionArguments& a, const Sequence& s) {
  return a.window_left < 0 ? -kNoLimit : diagonal_of(a, s) - std::min(a.window_left, kNoLimit);
}

int64_t high_of(const AttentionArguments& a, const Sequence& s) {
  if (a.causal == 2) return 0;
  if (a.causal == 1) return diagonal_of(a, s);
  return a.window_right < 0 ? kNoLimit : diagonal_of(a, s) + std::min(a.window_right, kNoLimit);
}

// Takes keys that cannot count off a sequence's ends.
void trim_keys(const AttentionArguments& a, Sequence& s) {
  int64_t first = std::clamp<int64_t>(low_of(a, s), 0, s.len_k), last = s.len_k;
  if (a.key_padding_mask != nullptr) {
    const uint8_t* kept = a.key_padding_mask + s.batch * a.seqlen_k;
    while (first < last && kept[first] == 0) ++first;
    while (first < last && kept[last - 1] == 0) --last;
    s.holes = std::find(kept + first, kept + last, uint8_t{0}) != kept + last;
  }
  s.first_key = first;
  s.start_k += first;
  s.len_k = last - first;
}

void check_cu_seqlens(const int32_t* cu_seqlens, int64_t batch, int64_t tokens, const char* name) {
  if (cu_seqlens[0] != 0) {
    throw std::invalid_argument(std::string(name) + "[0] is " + std::to_string(cu_seqlens[0]) +
                                "; it must be 0");
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (cu_seqlens[b + 1] < cu_seqlens[b]) {
      throw std::invalid_argument(std::string(name) + " decreases at " + std::to_string(b + 1) +
                                  ": " + std::to_string(cu_seqlens[b]) + ", " +
                                  std::to_string(cu_seqlens[b + 1]));
    }
  }
  if (cu_seqlens[batch] > tokens) {
    throw std::invalid_argument(std::string(name) + " ends at " +
                                std::to_string(cu_seqlens[batch]) + ", past the " +
                                std::to_string(tokens) + " tokens there are");
  }
}

void check_bias_holds(const AttentionArguments& a, int64_t batch, int64_t len_q, int64_t len_k) {
  const int64_t* sizes = a.bias.sizes;
  if (a.bias.kind == BiasKind::kNone) return;
  if ((sizes[2] == 1 || len_q <= sizes[2]) && (sizes[3] == 1 || len_k <= sizes[3])) return;
  throw std::invalid_argument("sequence " + std::to_string(batch) + " has " +
                              std::to_string(len_q) + " queries and " + std::to_string(len_k) +
                              " keys, more than the bias, " + std::to_string(sizes[2]) + " x " +
                              std::to_string(sizes[3]));
}

std::vector<Sequence> find_sequences(const AttentionArguments& a) {
  std::vector<Sequence> sequences;
  sequences.reserve(a.batch);
  if (a.cu_seqlens_q != nullptr) {
    check_cu_seqlens(a.cu_seqlens_q, a.batch, a.seqlen_q, "cu_seqlens_q");
    check_cu_seqlens(a.cu_seqlens_k, a.batch, a.seqlen_k, "cu_seqlens_k");
  }
  for (int64_t b = 0; b < a.batch; ++b) {
    if (a.cu_seqlens_q != nullptr) {
      const int64_t len_q = a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b];
      const int64_t len_k = a.cu_seqlens_k[b + 1] - a.cu_seqlens_k[b];
      check_bias_holds(a, b, len_q, len_k);
      sequences.push_back({b, a.cu_seqlens_q[b], len_q, a.cu_seqlens_k[b], len_k, 0, len_k, false});
    } else {
      const int64_t len_k = a.key_lengths != nullptr ? a.key_lengths[b] : a.seqlen_k;
      if (len_k < 0 || len_k > a.seqlen_k) {
        throw std::invalid_argument("key_lengths[" + std::to_string(b) + "] is " +
                                    std::to_string(len_k) + "; allowed are 0 to " +
                                    std::to_string(a.seqlen_k));
      }
      sequences.push_back({b, 0, a.seqlen_q, 0, len_k, 0, len_k, false});
    }
    trim_keys(a, sequences.back());
  }
  return sequences;
}

char* row_address(const Strided& t, const AttentionArguments& a, int64_t batch, int64_t token,
                  int64_t head) {
  const int64_t sequence = a.cu_seqlens_q != nullptr ? 0 : batch * t.batch;
  return static_cast<char*>(t.data) +
         (sequence + token * t.seq + head * t.head) * element_bytes(a.dtype);
}

AttentionHead head_of(const AttentionArguments& a, const Sequence& s, int64_t head) {
  AttentionHead h{};
  const int64_t key_head = head / (a.heads / a.key_heads);
  h.q = row_address(a.q, a, s.batch, s.start_q, head);
  h.k = row_address(a.k, a, s.batch, s.start_k, key_head);
  h.v = row_address(a.v, a, s.batch, s.start_k, key_head);
  h.out = row_address(a.out, a, s.batch, s.start_q, head);
  h.q_row = a.q.seq;
  h.k_row = a.k.seq;
  h.v_row = a.v.seq;
  h.out_row = a.out.seq;
  if (a.dq.data != nullptr || a.dk.data != nullptr) {  // an empty one has the address null
    h.dout = row_address(a.dout, a, s.batch, s.start_q, head);
    h.dq = row_address(a.dq, a, s.batch, s.start_q, head);
    h.dk = row_address(a.dk, a, s.batch, s.start_k, key_head);
    h.dv = row_address(a.dv, a, s.batch, s.start_k, key_head);
    h.dout_row = a.dout.seq;
    h.dq_row = a.dq.seq;
    h.dk_row = a.dk.seq;
    h.dv_row = a.dv.seq;
  }
  const int64_t lse_at = a.cu_seqlens_q != nullptr ? head * a.seqlen_q + s.start_q
                                                   : (s.batch * a.heads + head) * a.seqlen_q;
  h.lse = a.lse + lse_at;
  h.dlse = a.dlse != nullptr ? a.dlse + lse_at : nullptr;
  h.len_q = s.len_q;
  h.len_k = s.len_k;
  h.first_key = s.first_key;
  h.low = low_of(a, s) - s.first_key;
  h.high = high_of(a, s) - s.first_key;
  if (s.holes) h.kept = a.key_padding_mask + s.batch * a.seqlen_k + s.first_key;
  h.bias_kind = a.bias.kind;
  if (h.bias_kind != BiasKind::kNone) {
    const int64_t* stride = a.bias.strides;
    const int64_t bytes = h.bias_kind == BiasKind::kMask      ? 1
                          : h.bias_kind == BiasKind::kFloat32 ? 4
                                                              : element_bytes(a.dtype);
    const int64_t at = s.batch * stride[0] + head * stride[1] + s.first_key * stride[3];
    h.bias = static_cast<const char*>(a.bias.data) + at * bytes;
    h.bias_row = stride[2];
    h.bias_key = stride[3];
  }
  h.softcap = a.softcap;
  h.head_dim = static_cast<int>(a.head_dim);
  h.scale = a.scale;
  h.dropout_threshold = a.dropout.threshold;
  h.dropout_scale = a.dropout.scale;
  h.stream = dropout_stream(a.dropout.seed, static_cast<uint32_t>(s.batch + a.sequence_offset),
                            static_cast<uint32_t>(head));
  return h;
}

// Zeros tokens [first, last) of one sequence's index in a tensor of `heads` heads.
void clear_tokens(const Strided& t, int64_t heads, const AttentionArguments& a, int64_t batch,
                  int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    for (int64_t head = 0; head < heads; ++head) {
      std::memset(row_address(t, a, batch, token, head), 0, a.head_dim * element_bytes(a.dtype));
    }
  }
}

// Sequences with the most work first, so that the last items to run are small ones.
void sort_by_work(std::vector<Sequence>& sequences) {
  std::stable_sort(sequences.begin(), sequences.end(), [](const Sequence& x, const Sequence& y) {
    return x.len_q * x.len_k > y.len_q * y.len_k;
  });
}

// Multiply-adds of the two products of all heads.
int64_t forward_work(const AttentionArguments& a, const std::vector<Sequence>& sequences) {
  int64_t scores = 0;
  for (const Sequence& s : sequences) scores += s.len_q * s.len_k;
  return scores * a.heads * 2 * a.head_dim;
}

}  // namespace

void attention_fwd(const AttentionArguments& a, int threads) {
  std::vector<Sequence> sequences = find_sequences(a);
  if (a.cu_seqlens_q != nullptr) {  // a fixed token budget has tokens of no sequence
    const int64_t used = a.cu_seqlens_q[a.batch];
    clear_tokens(a.out, a.heads, a, 0, used, a.seqlen_q);
    for (int64_t head = 0; head < a.heads; ++head) {
      std::fill(a.lse + head * a.seqlen_q + used, a.lse + (head + 1) * a.seqlen_q,
                -std::numeric_limits<float>::infinity());
    }
  }
  threads = threads_for(forward_work(a, sequences), threads);
  sort_by_work(sequences);
  // Keys and values are packed once per item, so items are as long as keeps all threads busy.
  constexpr int64_t kLongItem = 576, kShortItem = 96;  // multiples of every kQueryBlock
  const int64_t heads_of_all = static_cast<int64_t>(sequences.size()) * a.heads;
  const int64_t queries = heads_of_all >= 2 * threads || threads <= 1 ? kLongItem : kShortItem;
  struct Item {
    int sequence, head;
    int64_t first, last;
  };
  std::vector<Item> items;
  for (size_t i = 0; i < sequences.size(); ++i) {
    for (int head = 0; head < a.heads; ++head) {
      for (int64_t first = 0; first < sequences[i].len_q; first += queries) {
        items.push_back(
            {static_cast<int>(i), head, first, std::min(first + queries, sequences[i].len_q)});
      }
    }
  }
  const Kernels& table = kernels();
  parallel_for(static_cast<int64_t>(items.size()), threads, [&](int64_t i) {
    const Item& item = items[i];
    const AttentionHead h = head_of(a, sequences[item.sequence], item.head);
    float* scratch =
        thread_scratch(table.attention_fwd_scratch(item.last - item.first, h.len_k, h.head_dim));
    table.attention_fwd(h, a.dtype, item.first, item.last, scratch);
  });
}

void attention_bwd(const AttentionArguments& a, int threads) {
  std::vector<Sequence> sequences = find_sequences(a);
  const bool varlen = a.cu_seqlens_q != nullptr;
  if (varlen) clear_tokens(a.dq, a.heads, a, 0, a.cu_seqlens_q[a.batch], a.seqlen_q);
  for (const Strided* t : {&a.dk, &a.dv}) {
    if (varlen) clear_tokens(*t, a.key_heads, a, 0, a.cu_seqlens_k[a.batch], a.seqlen_k);
    for (const Sequence& s : sequences) {
      const int64_t first = s.start_k - s.first_key;
      const int64_t behind = a.heads == 0 ? s.start_k : s.start_k + s.len_k;
      clear_tokens(*t, a.key_heads, a, s.batch, first, s.start_k);
      clear_tokens(*t, a.key_heads, a, s.batch, behind, varlen ? first + s.all_keys : a.seqlen_k);
    }
  }
  const Kernels& table = kernels();
  const auto run = [&](AttentionHead& h) {
    float* scratch = thread_scratch(table.attention_bwd_scratch(h.len_q, h.len_k, h.head_dim));
    table.attention_bwd(h, a.dtype, scratch);
  };
  const int64_t heads_of_all = static_cast<int64_t>(sequences.size()) * a.heads;
  int64_t most_keys = 0;
  for (const Sequence& s : sequences) most_keys = std::max(most_keys, s.len_k);
  BiasGrad bias_grad(a);
  GroupSums group_sums(a, most_keys);
  if (!bias_grad.is_buffered() && !group_sums.wanted()) {
    sort_by_work(sequences);
    parallel_for(heads_of_all, threads, [&](int64_t i) {
      const Sequence& s = sequences[i / a.heads];
      AttentionHead h = head_of(a, s, i % a.heads);
      bias_grad.own_part(s.batch, i % a.heads, h);
      run(h);
    });
    return;
  }
  // A wave is whole groups of heads: several for every thread, and more as long as their buffers
  // are small, since each wave ends with threads that wait.
  constexpr int64_t kSmallBuffers = int64_t{1} << 21;
  const int64_t floats = bias_grad.floats_of_head() + group_sums.floats_of_head();
  const int64_t least =
      std::max<int64_t>(8 * threads, kSmallBuffers / std::max<int64_t>(floats, 1));
  const int64_t group = std::max<int64_t>(1, group_sums.group());  // 0 without query heads
  const int64_t wave = std::min(heads_of_all, (least + group - 1) / group * group);
  bias_grad.reserve(wave);
  group_sums.reserve(wave);
  for (int64_t first = 0; first < heads_of_all; first += wave) {
    const int64_t count = std::min(wave, heads_of_all - first);
    parallel_for(count, threads, [&](int64_t i) {
      const int64_t at = first + i;
      AttentionHead h = head_of(a, sequences[at / a.heads], at % a.heads);
      bias_grad.part(i, h);
      group_sums.part(i, h);
      run(h);
    });
    bias_grad.add(first, count, threads);
    group_sums.add(count, threads, [&](int64_t i) {
      return head_of(a, sequences[(first + i) / a.heads], (first + i) % a.heads);
    });
  }
  bias_grad.write(threads);
}

}  // namespace bertkern::cpu
