// Attention of one (sequence, head) on the CPU, backward.
//
//   forward:  s = (scale · q) kᵀ,  p = exp(s − lse),  out = (p · mask) v,  mask = keep · scale
//   backward: dv = (p · mask)ᵀ dout,  dp = mask · dout vᵀ,  ds = p · (dp − delta),
//             dq = scale · ds k,  dk = dsᵀ (scale · q),
//             delta = Σ_keys p · dp − dlse = Σ_D dout · out − dlse
//
// kOptions: s goes through the cap, bias and masks of attention_score.h before p, dbias is the sum
// of ds, and ds is multiplied by ds/dx before it makes dq and dk.
//
// Where a query sees few keys, dp and delta are almost equal: delta is then the sum over the keys
// of the very dp that it is taken from, and for a single key ds is exactly 0. That needs all keys
// of the head in one block; with more of them it is the sum over D.
//
// Key blocks outside, query blocks inside: dk and dv of a block are complete when its last query
// block is done, dq is added up over key blocks. One caller does all of a head, so there is one
// order of additions. Compiled once per instruction set (see params.h).
#include "attention_score.h"

namespace bertkern::BERTKERN_ISA {
namespace {

// Scratch memory of one head, cut into its buffers.
struct Buffers {
  int64_t width, key_room;
  float *k_transposed, *v_transposed, *k_panels;       // [key_room, width]
  float *q_rows, *dout_rows, *q_panels, *dout_panels;  // [kQueryBlock, width]
  float *scores, *dscores;                             // [kQueryBlock, key_room] and kRows more
  float *dk, *dv;                                      // [key_room + kRows, width]
  float* row;                                          // 4 · (width + kWidth), or key_room + 16
  float *dq, *delta;                                   // [queries, width], [queries]
  float *slopes, *dbias, *gain;  // [kQueryBlock, key_room], [key_room + 16], [queries]
  float* end;

  Buffers(float* scratch, int64_t max_queries, int64_t max_keys, int head_dim) {
    width = round_up(head_dim, kPanel);
    key_room = key_columns(max_keys);
    end = scratch;
    k_transposed = take(key_room * width);
    v_transposed = take(key_room * width);
    k_panels = take(key_room * width);
    q_rows = take(kQueryBlock * width);
    dout_rows = take(kQueryBlock * width);
    q_panels = take(kQueryBlock * width);
    dout_panels = take(kQueryBlock * width);
    scores = take(kQueryBlock * key_room + 16);
    dscores = take(kQueryBlock * key_room + 16);
    dk = take((key_room + 16) * width);
    dv = take((key_room + 16) * width);
    row = take(4 * (width + kWidth) + key_room + 16);
    const int64_t queries = round_up(max_queries, kQueryBlock);
    dq = take(queries * width);
    delta = take(queries);
    slopes = take(kQueryBlock * key_room);
    dbias = take(key_room + 16);
    gain = take(queries);
  }

 private:
  float* take(int64_t floats) {
    float* part = end;
    end += round_up(floats, 16);
    return part;
  }
};

static_assert(kRows <= 16, "scores, dk and dv have 16 more rows or floats than are used");

// scores := p and dscores := dp = mask · dout vᵀ for the first `allowed` keys, and perhaps some
// more; returns their sums. `factors` is the mask, null without dropout.
struct RowSums {
  float p, weighted;  // Σ p, Σ p · dp
};

RowSums probabilities(float* scores, float* dscores, const float* factors, int64_t allowed,
                      float lse) {
  for (int64_t j = 0; j < allowed; j += kWidth) {
    store(scores + j, vexp(load(scores + j) - lse));
    if (factors != nullptr) store(dscores + j, load(dscores + j) * load(factors + j));
  }
  Vf weighted[2] = {}, weight[2] = {};
  int64_t j = 0;
  for (; j + 2 * kWidth <= allowed; j += 2 * kWidth) {
    for (int i = 0; i < 2; ++i) {
      const Vf p = load(scores + j + i * kWidth);
      weighted[i] += p * load(dscores + j + i * kWidth);
      weight[i] += p;
    }
  }
  float sum = sum_lanes(weighted[0] + weighted[1]), all = sum_lanes(weight[0] + weight[1]);
  for (; j < allowed; ++j) {
    sum += scores[j] * dscores[j];
    all += scores[j];
  }
  return {all, sum};
}

// scores := p · gain · mask and dscores := p · gain · (dp − delta) for the first `allowed` keys, 0
// up to `end`.
void grad_row(float* scores, float* dscores, const float* factors, int64_t allowed, int64_t end,
              float gain, float delta) {
  for (int64_t j = 0; j < allowed; j += kWidth) {
    const Vf p = load(scores + j) * gain;
    store(dscores + j, p * (load(dscores + j) - delta));
    store(scores + j, factors != nullptr ? p * load(factors + j) : p);
  }
  clear(scores, allowed, end);
  clear(dscores, allowed, end);
}

// Σ_D dout · out − dlse of every query.
template <typename T>
void compute_delta(const AttentionHead& h, Buffers& at) {
  for (int64_t start = 0; start < h.len_q; start += kRows) {
    const int64_t count = h.len_q - start < kRows ? h.len_q - start : kRows;
    read_rows(static_cast<const T*>(h.dout) + start * h.dout_row, h.dout_row, count, h.head_dim,
              1.0f, at.dout_rows, at.width);
    read_rows(static_cast<const T*>(h.out) + start * h.out_row, h.out_row, count, h.head_dim, 1.0f,
              at.q_rows, at.width);
    float sum[kRows] = {};
    for (int d = 0; d < h.head_dim; ++d) {
      for (int r = 0; r < kRows; ++r) {
        sum[r] += at.dout_rows[r * at.width + d] * at.q_rows[r * at.width + d];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      at.delta[start + i] = sum[i] - (h.dlse != nullptr ? h.dlse[start + i] : 0.0f);
    }
  }
}

template <typename T>
void write_scaled(float* rows, int64_t width, int64_t count, float scale, void* target,
                  int64_t stride, int head_dim) {
  for (int64_t i = 0; i < count; ++i) {
    float* row = rows + i * width;
    for (int64_t d = 0; d < width; d += kWidth) store(row + d, load(row + d) * scale);
    write_row(row, static_cast<T*>(target) + i * stride, head_dim);
  }
}

// dk or dv of a block of keys; exactly 0 where a key is padding, even beside NaN.
template <typename T>
void write_keys(const AttentionHead& h, float* rows, int64_t width, int64_t block, int64_t keys,
                float scale, void* target, int64_t stride) {
  for (int64_t j = 0; h.kept != nullptr && j < keys; ++j) {
    if (h.kept[block + j] == 0) clear(rows + j * width, 0, width);
  }
  if (h.float_sums) {
    write_scaled<float>(rows, width, keys, scale, static_cast<float*>(target) + block * stride,
                        stride, h.head_dim);
  } else {
    write_scaled<T>(rows, width, keys, scale, static_cast<T*>(target) + block * stride, stride,
                    h.head_dim);
  }
}

template <bool kOptions>
bool sees_nothing(const AttentionHead& h, int64_t query) {
  if (kOptions && masked_by_values(h)) return h.lse[query] == -kInfinity;
  return allowed_keys(h, query) <= (kOptions ? first_allowed(h, query) : 0);
}

// 1 / Σ p of every query. Where lse is so large that fp32 does not hold log Σ beside the maximum (a
// row whose bias is the lowest float), exp(s − lse) has lost it; elsewhere this is taken as 1.
template <typename T>
void compute_gain(const AttentionHead& h, Buffers& at) {
  constexpr float kLarge = 4096.0f;
  const auto is_large = [&h](int64_t i) {
    const float magnitude = h.lse[i] < 0.0f ? -h.lse[i] : h.lse[i];
    return magnitude > kLarge && magnitude < kInfinity;
  };
  bool some = false;
  for (int64_t i = 0; i < h.len_q; ++i) {
    some |= is_large(i);
    at.gain[i] = 0.0f;
  }
  for (int64_t block = 0; some && block < h.len_k; block += kKeyBlock) {
    const int64_t keys = h.len_k - block < kKeyBlock ? h.len_k - block : kKeyBlock;
    pack_transposed(static_cast<const T*>(h.k) + block * h.k_row, h.k_row, keys, h.head_dim,
                    at.k_transposed, at.row);
    clear_columns(h, block, keys, at.k_transposed);
    for (int64_t i = 0; i < h.len_q; i += kRows) {
      const int64_t count = h.len_q - i < kRows ? h.len_q - i : kRows;
      bool wanted = false;
      for (int64_t r = 0; r < count; ++r) wanted |= is_large(i + r);
      if (!wanted) continue;
      read_rows(static_cast<const T*>(h.q) + i * h.q_row, h.q_row, count, h.head_dim,
                product_scale(h), at.q_rows, at.width);
      multiply<false>(at.q_rows, at.width, 1, at.k_transposed, count, keys, h.head_dim, h.head_dim,
                      at.scores, at.key_room);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t allowed = clamp_keys(allowed_keys(h, i + r) - block, keys);
        if (!is_large(i + r) || allowed <= 0) continue;
        float* s = at.scores + r * at.key_room;
        finish_scores<T>(h, i + r, block, 0, allowed, s, nullptr);
        for (int64_t j = allowed; j < round_up(allowed, kWidth); ++j) s[j] = -kInfinity;
        Vf sum{};
        for (int64_t j = 0; j < allowed; j += kWidth) sum += vexp(load(s + j) - h.lse[i + r]);
        at.gain[i + r] += sum_lanes(sum);
      }
    }
  }
  for (int64_t i = 0; i < h.len_q; ++i) at.gain[i] = at.gain[i] > 0.0f ? 1.0f / at.gain[i] : 1.0f;
}

// target[column · stride] += ds, columns [from, to); stride 0: their sum. `from` is a multiple of
// kWidth, and the columns up to one after `to` are 0.
void add_to_bias_grad(const float* ds, int64_t from, int64_t to, float* target, int64_t stride) {
  if (stride == 0) {
    Vf sum{};
    for (int64_t j = from; j < to; j += kWidth) sum += load(ds + j);
    target[0] += sum_lanes(sum);
    return;
  }
  for (int64_t j = from; j < to; j += kWidth) {
    store_columns(target + j, load_columns(target + j, to - j) + load(ds + j), to - j);
  }
}

template <typename T, bool kOptions>
void bwd(const AttentionHead& h, float* scratch) {
  Buffers at(scratch, h.len_q, h.len_k, h.head_dim);
  const int64_t width = at.width;
  const bool one_block = h.len_k <= kKeyBlock;
  const float q_scale = kOptions ? product_scale(h) : h.scale;
  const float dk_scale = kOptions && h.softcap != 0.0f ? h.softcap : 1.0f;
  const bool sums_queries = kOptions && h.dbias != nullptr && h.dbias_row == 0;
  if (!one_block) compute_delta<T>(h, at);
  if (kOptions && !one_block) compute_gain<T>(h, at);
  clear(at.dq, 0, round_up(h.len_q, kQueryBlock) * width);
  for (int64_t block = 0; block < h.len_k; block += kKeyBlock) {
    const int64_t keys = h.len_k - block < kKeyBlock ? h.len_k - block : kKeyBlock;
    const T* k = static_cast<const T*>(h.k) + block * h.k_row;
    const T* v = static_cast<const T*>(h.v) + block * h.v_row;
    clear(at.dk, 0, round_up(keys, kRows) * width);
    clear(at.dv, 0, round_up(keys, kRows) * width);
    pack_transposed(k, h.k_row, keys, h.head_dim, at.k_transposed, at.row);
    pack_transposed(v, h.v_row, keys, h.head_dim, at.v_transposed, at.row);
    pack(k, h.k_row, keys, h.head_dim, at.key_room, at.k_panels);
    if constexpr (kOptions) {
      clear_columns(h, block, keys, at.k_transposed);
      clear_columns(h, block, keys, at.v_transposed);
      clear_rows(h, block, keys, at.key_room, at.k_panels);
    }
    for (int64_t start = 0; start < h.len_q; start += kQueryBlock) {
      const int64_t count = h.len_q - start < kQueryBlock ? h.len_q - start : kQueryBlock;
      // Later queries see at least as many keys as earlier ones.
      const int64_t seen = clamp_keys(allowed_keys(h, start + count - 1) - block, keys);
      // Keys of the block that some of these queries see: [from, seen).
      const int64_t from = kOptions ? first_column(h, start, block) : 0;
      if (seen <= from) continue;
      read_rows(static_cast<const T*>(h.q) + start * h.q_row, h.q_row, count, h.head_dim, q_scale,
                at.q_rows, width);
      read_rows(static_cast<const T*>(h.dout) + start * h.dout_row, h.dout_row, count, h.head_dim,
                1.0f, at.dout_rows, width);
      for (int64_t i = 0; i < count; ++i) {
        if (!sees_nothing<kOptions>(h, start + i)) continue;
        clear(at.q_rows + i * width, 0, width);  // an empty row's NaN must not meet a zero
        clear(at.dout_rows + i * width, 0, width);
      }
      multiply<false>(at.q_rows, width, 1, at.k_transposed + from * h.head_dim, count, seen - from,
                      h.head_dim, h.head_dim, at.scores + from, at.key_room);
      multiply<false>(at.dout_rows, width, 1, at.v_transposed + from * h.head_dim, count,
                      seen - from, h.head_dim, h.head_dim, at.dscores + from, at.key_room);
      // Columns are read in groups of kRows below: all of those are cleared.
      const int64_t filled = round_up(from + round_up(seen - from, kRows), kWidth);
      const int64_t end = filled < at.key_room ? filled : at.key_room;
      if (sums_queries) clear(at.dbias, 0, at.key_room);
      for (int64_t i = 0; i < round_up(count, kRows); ++i) {
        const int64_t query = start + i;
        int64_t allowed = i < count ? clamp_keys(allowed_keys(h, query) - block, keys) : 0;
        if (kOptions && i < count && sees_nothing<kOptions>(h, query)) allowed = 0;
        const int64_t first = kOptions ? first_allowed(h, query) - block : 0;
        const bool sees = allowed > (kOptions && first > from ? first : from);
        float* scores = at.scores + i * at.key_room + from;
        float* dscores = at.dscores + i * at.key_room + from;
        if (!sees) {
          clear(scores, 0, end - from);
          clear(dscores, 0, end - from);
          continue;
        }
        float* factors = nullptr;
        if (h.dropout_threshold != 0) {
          factors = at.row;
          for (int64_t j = 0; j < allowed - from; j += kWidth) store(factors + j, splat(1.0f));
          drop_keys(h, query, block + from, allowed - from, factors);
        }
        float* slopes = at.slopes + i * at.key_room;
        if constexpr (kOptions) {
          finish_scores<T>(h, query, block, from, allowed, scores - from, slopes);
        }
        float gain = 1.0f, delta = 0.0f;
        const RowSums sums = probabilities(scores, dscores, factors, allowed - from, h.lse[query]);
        if (one_block) {
          // Σ p is 1 but for the rounding of lse, which this takes away.
          gain = sums.p > 0.0f ? 1.0f / sums.p : 1.0f;
          delta = sums.weighted * gain - (h.dlse != nullptr ? h.dlse[query] : 0.0f);
        } else {
          gain = kOptions ? at.gain[query] : 1.0f;
          delta = at.delta[query];
        }
        grad_row(scores, dscores, factors, allowed - from, end - from, gain, delta);
        if constexpr (kOptions) {
          if (h.dbias != nullptr) {
            float* target = sums_queries ? at.dbias : h.dbias + query * h.dbias_row;
            if (!sums_queries) target += (block + h.first_key) * h.dbias_key;
            add_to_bias_grad(dscores - from, from, allowed, target, h.dbias_key);
          }
          for (int64_t j = 0; h.softcap != 0.0f && j < allowed - from; j += kWidth) {
            store(dscores + j, load(dscores + j) * load(slopes + from + j));
          }
          clear(dscores, allowed - from, end - from);
        }
      }
      if (sums_queries) {
        add_to_bias_grad(at.dbias, 0, h.dbias_key == 0 ? 1 : seen,
                         h.dbias + (block + h.first_key) * h.dbias_key, 1);
      }
      pack(at.dout_rows, width, count, width, kQueryBlock, at.dout_panels);
      pack(at.q_rows, width, count, width, kQueryBlock, at.q_panels);
      multiply<true>(at.scores + from, 1, at.key_room, at.dout_panels, seen - from, h.head_dim,
                     count, kQueryBlock, at.dv + from * width, width);
      multiply<true>(at.dscores + from, 1, at.key_room, at.q_panels, seen - from, h.head_dim, count,
                     kQueryBlock, at.dk + from * width, width);
      multiply<true>(at.dscores + from, at.key_room, 1, at.k_panels + from * kPanel, count,
                     h.head_dim, seen - from, at.key_room, at.dq + start * width, width);
    }
    write_keys<T>(h, at.dk, width, block, keys, dk_scale, h.dk, h.dk_row);
    write_keys<T>(h, at.dv, width, block, keys, 1.0f, h.dv, h.dv_row);
  }
  for (int64_t i = 0; i < h.len_q; ++i) {
    if (sees_nothing<kOptions>(h, i)) clear(at.dq + i * width, 0, width);
  }
  const float dq_scale = kOptions ? h.scale : q_scale;
  write_scaled<T>(at.dq, width, h.len_q, dq_scale, h.dq, h.dq_row, h.head_dim);
}

template <typename T>
void choose_bwd(const AttentionHead& h, float* scratch) {
  for (int64_t i = 0; h.dbias != nullptr && i < h.dbias_floats; ++i) h.dbias[i] = 0.0f;
  if (has_options(h)) return bwd<T, true>(h, scratch);
  bwd<T, false>(h, scratch);
}

}  // namespace

int64_t attention_bwd_scratch(int64_t max_queries, int64_t max_keys, int head_dim) {
  return Buffers(nullptr, max_queries, max_keys, head_dim).end - static_cast<float*>(nullptr);
}

void attention_bwd(const AttentionHead& head, DType dtype, float* scratch) {
  if (dtype == DType::kFloat32) return choose_bwd<float>(head, scratch);
  if (dtype == DType::kFloat16) return choose_bwd<Half>(head, scratch);
  return choose_bwd<BFloat16>(head, scratch);
}

}  // namespace bertkern::BERTKERN_ISA
