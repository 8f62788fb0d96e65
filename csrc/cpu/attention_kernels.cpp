// Attention of one (sequence, head) on the CPU, forward; attention_bwd_kernels.cpp has the
// backward.
//
//   s = (scale · q) kᵀ,  p = exp(s − m),  l = Σ p,  out = dropout(p) v / l,  lse = m + log l
//
// Keys come in blocks of kKeyBlock with the running maximum m and sum l of the online softmax
// (Milakov and Gimelshein 2018); a sequence of up to kKeyBlock keys is one block, and nothing is
// ever rescaled. Inside a block, queries come in groups of kQueryBlock whose scores stay in the
// cache. Compiled once per instruction set (see params.h).
#include "attention_kernels.h"

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
  constexpr float kInfinity = __builtin_inff();
  const int64_t used = round_up(allowed, kWidth);
  for (int64_t j = allowed; j < used; ++j) s[j] = -kInfinity;
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

template <typename T>
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
    m[i] = -__builtin_inff();
    l[i] = 0.0f;
  }
  const T* q = static_cast<const T*>(h.q);
  for (int64_t block = 0; block < h.len_k; block += kKeyBlock) {
    const int64_t keys = h.len_k - block < kKeyBlock ? h.len_k - block : kKeyBlock;
    if (allowed_keys(h, last - 1) <= block) break;
    pack_transposed(static_cast<const T*>(h.k) + block * h.k_row, h.k_row, keys, h.head_dim,
                    k_panels, row_scratch);
    pack(static_cast<const T*>(h.v) + block * h.v_row, h.v_row, keys, h.head_dim, key_room,
         v_panels);
    for (int64_t start = first; start < last; start += kQueryBlock) {
      const int64_t count = last - start < kQueryBlock ? last - start : kQueryBlock;
      // Later queries see at least as many keys as earlier ones.
      const int64_t seen = clamp_keys(allowed_keys(h, start + count - 1) - block, keys);
      if (seen <= 0) continue;
      read_rows(q + start * h.q_row, h.q_row, count, h.head_dim, h.scale, q_rows, width);
      multiply<false>(q_rows, width, 1, k_panels, count, seen, h.head_dim, h.head_dim, scores,
                      key_room);
      float* out_rows = acc + (start - first) * width;
      for (int64_t i = 0; i < round_up(count, kRows); ++i) {
        const int64_t row = start - first + i;
        float* s = scores + i * key_room;
        const int64_t allowed =
            i < count ? clamp_keys(allowed_keys(h, start + i) - block, keys) : 0;
        float alpha = 1.0f;
        if (allowed > 0) {
          alpha = softmax_row(s, allowed, round_up(seen, kWidth), m[row], l[row]);
        } else {
          clear(s, 0, round_up(seen, kWidth));
        }
        if (h.dropout_threshold != 0 && allowed > 0) {
          drop(s, block, allowed, dropout_row(h.stream, static_cast<uint32_t>(start + i)),
               h.dropout_threshold, h.dropout_scale);
        }
        if (block == 0) continue;
        for (int64_t d = 0; alpha != 1.0f && d < width; d += kWidth) {
          store(out_rows + i * width + d, load(out_rows + i * width + d) * alpha);
        }
      }
      if (block == 0) {
        multiply<false>(scores, key_room, 1, v_panels, count, h.head_dim, seen, key_room, out_rows,
                        width);
      } else {
        multiply<true>(scores, key_room, 1, v_panels, count, h.head_dim, seen, key_room, out_rows,
                       width);
      }
    }
  }
  for (int64_t i = first; i < last; ++i) {
    T* out = static_cast<T*>(h.out) + i * h.out_row;
    float* row = acc + (i - first) * width;
    const bool empty = allowed_keys(h, i) <= 0;
    const float inverse = 1.0f / l[i - first];
    for (int64_t d = 0; d < width; d += kWidth) {
      store(row + d, empty ? Vf{} : load(row + d) * inverse);
    }
    write_row(row, out, h.head_dim);
    h.lse[i] = empty ? -__builtin_inff() : m[i - first] + __builtin_logf(l[i - first]);
  }
}

}  // namespace

void attention_fwd(const AttentionHead& head, DType dtype, int64_t first, int64_t last,
                   float* scratch) {
  if (dtype == DType::kFloat32) return fwd<float>(head, first, last, scratch);
  if (dtype == DType::kFloat16) return fwd<Half>(head, first, last, scratch);
  return fwd<BFloat16>(head, first, last, scratch);
}

}  // namespace bertkern::BERTKERN_ISA
