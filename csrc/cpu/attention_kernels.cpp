// Attention of one (sequence, head) on the CPU, forward; attention_bwd_kernels.cpp has the
// backward.
//
//   s = (scale · q) kᵀ,  p = exp(s − m),  l = Σ p,  out = dropout(p) v / l,  lse = m + log l
//
// kOptions: s goes through the cap, bias and masks of attention_score.h first.
//
// Keys come in blocks of kKeyBlock with the running maximum m and sum l of the online softmax
// (Milakov and Gimelshein 2018); a sequence of up to kKeyBlock keys is one block, and nothing is
// ever rescaled. Inside a block, queries come in groups of kQueryBlock whose scores stay in the
// cache. Compiled once per instruction set (see params.h).
#include "attention_score.h"

namespace bertkern::BERTKERN_ISA {

int64_t attention_fwd_scratch(int64_t max_queries, int64_t max_keys, int head_dim) {
  const int64_t keys = key_columns(max_keys);
  const int64_t width = round_up(head_dim, kPanel);
  const int64_t queries = round_up(max_queries, kQueryBlock);
  return 2 * keys * width + 4 * (width + kWidth) + kQueryBlock * (width + keys) +
         queries * (width + 2) + 64;
}

namespace {

// Softmax of one block of scores s in place: p = exp(s − m) for the first `allowed` > 0 keys, 0 up
// to `end`, a multiple of kWidth. m becomes the larger of itself and the block's maximum, l the sum
// so far. Returns exp(m_before − m): what earlier results are worth.
float softmax_row(float* s, int64_t allowed, int64_t end, float& m, float& l) {
  const int64_t used = round_up(allowed, kWidth);
  if (allowed < used) {  // by a whole vector: the loads below would wait for parts of one
    float* last = s + used - kWidth;
    store(last, select(first_lanes(allowed - used + kWidth), load(last), splat(-kInfinity)));
  }
  Vf most[2] = {splat(-kInfinity), splat(-kInfinity)};
  int64_t j = 0;
  for (; j + 2 * kWidth <= used; j += 2 * kWidth) {
    most[0] = vmax(load(s + j), most[0]);
    most[1] = vmax(load(s + j + kWidth), most[1]);
  }
  if (j < used) most[0] = vmax(load(s + j), most[0]);
  const float m_before = m;
  const float block_most = max_lanes(vmax(most[0], most[1]));
  m = block_most > m ? block_most : m;
  // Every score −inf so far: exp(−inf − 0) = 0 where −inf − (−inf) would be NaN.
  const float origin = m == -kInfinity ? 0.0f : m;
  for (j = 0; j < used; j += kWidth) store(s + j, vexp(load(s + j) - origin));
  // A loop of its own: beside the constants of vexp no register is left for the sum.
  Vf sum[2] = {};
  for (j = 0; j + 2 * kWidth <= used; j += 2 * kWidth) {
    sum[0] += load(s + j);
    sum[1] += load(s + j + kWidth);
  }
  if (j < used) sum[0] += load(s + j);
  clear(s, used, end);
  const float alpha = m_before == m ? 1.0f : __builtin_expf(m_before - origin);
  l = l * alpha + sum_lanes(sum[0] + sum[1]);
  return alpha;
}

template <typename T, bool kOptions>
void fwd(const AttentionHead& h, int64_t first, int64_t last, float* scratch) {
  const int64_t width = round_up(h.head_dim, kPanel);
  const int64_t key_room = key_columns(h.len_k);
  float* k_panels = scratch;
  float* v_panels = k_panels + key_room * width;
  float* row_scratch = v_panels + key_room * width;
  float* q_rows = row_scratch + 4 * (width + kWidth);  // [kQueryBlock, width]
  float* scores = q_rows + kQueryBlock * width;        // [kQueryBlock, key_room]
  float* acc = scores + kQueryBlock * key_room;        // [queries, width]
  const int64_t queries = round_up(last - first, kQueryBlock);
  float* m = acc + queries * width;  // [queries]
  float* l = m + queries;            // [queries]
  for (int64_t i = 0; i < queries; ++i) {
    m[i] = -kInfinity;
    l[i] = 0.0f;
  }
  const T* q = static_cast<const T*>(h.q);
  for (int64_t block = 0; block < h.len_k; block += kKeyBlock) {
    const int64_t keys = h.len_k - block < kKeyBlock ? h.len_k - block : kKeyBlock;
    if (allowed_keys(h, last - 1) <= block) break;
    if (kOptions && first_allowed(h, first) >= block + keys) continue;
    pack_transposed(static_cast<const T*>(h.k) + block * h.k_row, h.k_row, keys, h.head_dim,
                    k_panels, row_scratch);
    pack(static_cast<const T*>(h.v) + block * h.v_row, h.v_row, keys, h.head_dim, key_room,
         v_panels);
    if constexpr (kOptions) {
      clear_columns(h, block, keys, k_panels);
      clear_rows(h, block, keys, key_room, v_panels);
    }
    for (int64_t start = first; start < last; start += kQueryBlock) {
      const int64_t count = last - start < kQueryBlock ? last - start : kQueryBlock;
      // Later queries see at least as many keys as earlier ones.
      const int64_t seen = clamp_keys(allowed_keys(h, start + count - 1) - block, keys);
      // Keys of the block that some of these queries see: [from, seen).
      const int64_t from = kOptions ? first_column(h, start, block) : 0;
      if (seen <= from) continue;
      const bool first_block =
          kOptions ? block == first_allowed(h, start) / kKeyBlock * kKeyBlock : block == 0;
      const int64_t end = round_up(seen, kWidth);
      read_rows(q + start * h.q_row, h.q_row, count, h.head_dim,
                kOptions ? product_scale(h) : h.scale, q_rows, width);
      multiply<false>(q_rows, width, 1, k_panels + from * h.head_dim, count, seen - from,
                      h.head_dim, h.head_dim, scores + from, key_room);
      float* out_rows = acc + (start - first) * width;
      for (int64_t i = 0; i < round_up(count, kRows); ++i) {
        const int64_t row = start - first + i;
        float* s = scores + i * key_room;
        const int64_t allowed =
            i < count ? clamp_keys(allowed_keys(h, start + i) - block, keys) : 0;
        const bool sees = allowed > (kOptions ? first_allowed(h, start + i) - block : 0);
        float alpha = 1.0f;
        if (sees) {
          if constexpr (kOptions) finish_scores<T>(h, start + i, block, from, allowed, s, nullptr);
          alpha = softmax_row(s + from, allowed - from, end - from, m[row], l[row]);
        } else {
          clear(s, from, end);
        }
        if (h.dropout_threshold != 0 && sees) {
          drop_keys(h, start + i, block + from, allowed - from, s + from);
        }
        if (first_block) continue;
        for (int64_t d = 0; alpha != 1.0f && d < width; d += kWidth) {
          store(out_rows + i * width + d, load(out_rows + i * width + d) * alpha);
        }
      }
      if (first_block) {
        multiply<false>(scores + from, key_room, 1, v_panels + from * kPanel, count, h.head_dim,
                        seen - from, key_room, out_rows, width);
      } else {
        multiply<true>(scores + from, key_room, 1, v_panels + from * kPanel, count, h.head_dim,
                       seen - from, key_room, out_rows, width);
      }
    }
  }
  for (int64_t i = first; i < last; ++i) {
    T* out = static_cast<T*>(h.out) + i * h.out_row;
    float* row = acc + (i - first) * width;
    // Without a mask of values, scores that are all −inf must give NaN, as torch has it.
    bool empty = allowed_keys(h, i) <= (kOptions ? first_allowed(h, i) : 0);
    if (kOptions && masked_by_values(h)) empty = l[i - first] == 0.0f;
    const float inverse = 1.0f / l[i - first];
    for (int64_t d = 0; d < width; d += kWidth) {
      store(row + d, empty ? Vf{} : load(row + d) * inverse);
    }
    write_row(row, out, h.head_dim);
    h.lse[i] = empty ? -kInfinity : m[i - first] + __builtin_logf(l[i - first]);
  }
}

template <typename T>
void choose_fwd(const AttentionHead& h, int64_t first, int64_t last, float* scratch) {
  if (has_options(h)) return fwd<T, true>(h, first, last, scratch);
  fwd<T, false>(h, first, last, scratch);
}

}  // namespace

void attention_fwd(const AttentionHead& head, DType dtype, int64_t first, int64_t last,
                   float* scratch) {
  if (dtype == DType::kFloat32) return choose_fwd<float>(head, first, last, scratch);
  if (dtype == DType::kFloat16) return choose_fwd<Half>(head, first, last, scratch);
  return choose_fwd<BFloat16>(head, first, last, scratch);
}

}  // namespace bertkern::BERTKERN_ISA
