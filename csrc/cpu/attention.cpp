// CPU attention: from tensors to work items (sequence, head, range of queries).
//
// B batch, S sequence, T total tokens, H heads, D head dim. How queries are cut into items depends
// on the number of threads, but no result does: a query's arithmetic is the same in every item
// (gemm.h).
#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "parallel.h"

namespace bertkern::cpu {
namespace {

// First token and length of one sequence, in q and in k.
struct Sequence {
  int64_t batch;  // its index; in the batched layout also that of the tensors' first dimension
  int64_t start_q, len_q, start_k, len_k;
};

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

std::vector<Sequence> find_sequences(const AttentionArguments& a) {
  std::vector<Sequence> sequences;
  sequences.reserve(a.batch);
  if (a.cu_seqlens_q != nullptr) {
    check_cu_seqlens(a.cu_seqlens_q, a.batch, a.seqlen_q, "cu_seqlens_q");
    check_cu_seqlens(a.cu_seqlens_k, a.batch, a.seqlen_k, "cu_seqlens_k");
  }
  for (int64_t b = 0; b < a.batch; ++b) {
    if (a.cu_seqlens_q != nullptr) {
      sequences.push_back({b, a.cu_seqlens_q[b], a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b],
                           a.cu_seqlens_k[b], a.cu_seqlens_k[b + 1] - a.cu_seqlens_k[b]});
      continue;
    }
    const int64_t len_k = a.key_lengths != nullptr ? a.key_lengths[b] : a.seqlen_k;
    if (len_k < 0 || len_k > a.seqlen_k) {
      throw std::invalid_argument("key_lengths[" + std::to_string(b) + "] is " +
                                  std::to_string(len_k) + "; allowed are 0 to " +
                                  std::to_string(a.seqlen_k));
    }
    sequences.push_back({b, 0, a.seqlen_q, 0, len_k});
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
  h.q = row_address(a.q, a, s.batch, s.start_q, head);
  h.k = row_address(a.k, a, s.batch, s.start_k, head);
  h.v = row_address(a.v, a, s.batch, s.start_k, head);
  h.out = row_address(a.out, a, s.batch, s.start_q, head);
  h.q_row = a.q.seq;
  h.k_row = a.k.seq;
  h.v_row = a.v.seq;
  h.out_row = a.out.seq;
  if (a.dq.data != nullptr || a.dk.data != nullptr) {  // an empty one has the address null
    h.dout = row_address(a.dout, a, s.batch, s.start_q, head);
    h.dq = row_address(a.dq, a, s.batch, s.start_q, head);
    h.dk = row_address(a.dk, a, s.batch, s.start_k, head);
    h.dv = row_address(a.dv, a, s.batch, s.start_k, head);
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
  h.causal = a.causal != 0;
  // In the batched layout the diagonal is that of the whole matrix: key_lengths mean padding,
  // nothing else.
  if (a.causal == 1) {
    h.causal_offset = a.cu_seqlens_q != nullptr ? s.len_k - s.len_q : a.seqlen_k - a.seqlen_q;
  }
  h.head_dim = static_cast<int>(a.head_dim);
  h.scale = a.scale;
  h.dropout_threshold = a.dropout.threshold;
  h.dropout_scale = a.dropout.scale;
  h.stream = dropout_stream(a.dropout.seed, static_cast<uint32_t>(s.batch + a.sequence_offset),
                            static_cast<uint32_t>(head));
  return h;
}

// Zeros tokens [first, last) of one sequence's index in a tensor.
void clear_tokens(const Strided& t, const AttentionArguments& a, int64_t batch, int64_t first,
                  int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    for (int64_t head = 0; head < a.heads; ++head) {
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

}  // namespace

void attention_fwd(const AttentionArguments& a, int threads) {
  std::vector<Sequence> sequences = find_sequences(a);
  if (a.cu_seqlens_q != nullptr) {  // a fixed token budget has tokens of no sequence
    const int64_t used = a.cu_seqlens_q[a.batch];
    clear_tokens(a.out, a, 0, used, a.seqlen_q);
    for (int64_t head = 0; head < a.heads; ++head) {
      std::fill(a.lse + head * a.seqlen_q + used, a.lse + (head + 1) * a.seqlen_q,
                -std::numeric_limits<float>::infinity());
    }
  }
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
  if (a.cu_seqlens_q != nullptr) {
    clear_tokens(a.dq, a, 0, a.cu_seqlens_q[a.batch], a.seqlen_q);
    clear_tokens(a.dk, a, 0, a.cu_seqlens_k[a.batch], a.seqlen_k);
    clear_tokens(a.dv, a, 0, a.cu_seqlens_k[a.batch], a.seqlen_k);
  } else {
    for (const Sequence& s : sequences) {
      clear_tokens(a.dk, a, s.batch, s.len_k, a.seqlen_k);
      clear_tokens(a.dv, a, s.batch, s.len_k, a.seqlen_k);
    }
  }
  sort_by_work(sequences);
  const Kernels& table = kernels();
  const int64_t items = static_cast<int64_t>(sequences.size()) * a.heads;
  parallel_for(items, threads, [&](int64_t i) {
    const AttentionHead h = head_of(a, sequences[i / a.heads], i % a.heads);
    float* scratch = thread_scratch(table.attention_bwd_scratch(h.len_q, h.len_k, h.head_dim));
    table.attention_bwd(h, a.dtype, scratch);
  });
}

}  // namespace bertkern::cpu
