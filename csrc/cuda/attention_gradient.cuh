// Gradients of scores in the fragments of a product: rows are queries, or keys.
//
//   forward: out_i = Σ_j p_ij m_ij v_j, p = exp(s - lse), m the dropout mask, so
//   ds_ij = p_ij (m_ij dout_i·v_j - delta_i), delta_i = Σ_j p_ij m_ij dout_i·v_j - dlse_i
//
// What is not seen may be NaN, and so may delta be where dout is: there p, dp and ds are chosen 0.
// Tiles in which every score counts are spared the question.
#pragma once

#include "cuda/attention_score.cuh"

namespace bertkern::cuda {

// Two numbers that lie side by side.
struct alignas(8) TwoFloats {
  float value[2];
};

// What a block keeps of each query of a tile: lse, delta, keys of its dropout.
template <int kQueries>
struct QueryFacts {
  float lse[kQueries], delta[kQueries];
  uint32_t dropout_a[kQueries], dropout_b[kQueries];
};

// Of queries n and n + 1, n even.
BERTKERN_DEVICE TwoFloats two(const float* facts, int n) {
  return *reinterpret_cast<const TwoFloats*>(facts + n);
}

// Scores of a tile whose rows are keys. A thread holds rows g and g + 8 and columns 2t, 2t + 1 of
// each fragment, g and t its lane's; first_k is the warp's first key, first_q the tile's first
// query.
template <typename T, AttentionVariant kVariant, int kQueries>
struct KeyScores {
  static constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  const AttentionKernelArguments& a;
  const Sequence& s;
  const uint8_t* kept;
  bool whole;  // every score counts
  const ScoreOptions& options;
  const QueryFacts<kQueries>& facts;  // of the tile
  int first_q, first_k;

  // Of 16 queries from `part` on, the fragments `first` and first + 1: from the products k qᵀ in
  // `weights` and v doutᵀ in `dp` weights = p · cap', dp with its mask, p with its mask (for dv,
  // without dropout's scale), and Σ p dp over the thread's two keys, [fragment][query's bit 0]. The
  // queries of the second fragment are those of the first + 8.
  template <int kTiles>
  BERTKERN_DEVICE void weigh(int part, int first, float (&weights)[kTiles][4],
                             float (&dp)[kTiles][4], float (&p)[2][4], float (&terms)[2][2]) const {
    if constexpr (kGeneral) {
      to_probabilities(part, first, weights, dp, p);
    } else {
      const int t = lane_index() % 4;
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const TwoFloats lse = two(facts.lse, part + 8 * next + 2 * t);
#pragma unroll
        for (int at = 0; at < 4; ++at) {
          float& w = weights[first + next][at];
          w = ptx::exp2(ptx::fma(w, a.scale * kLog2e, -lse.value[at % 2]));
        }
      }
      if (!whole) mask(part, first, weights, dp);
#pragma unroll
      for (int next = 0; next < 2; ++next) {
#pragma unroll
        for (int at = 0; at < 4; ++at) p[next][at] = weights[first + next][at];
      }
    }
    const bool drops = has_dropout<kVariant>(a);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      bool keep[2][2];  // [query's bit 3][key's bit 3]
      if (drops) keep_of(part, e, keep);
#pragma unroll
      for (int next = 0; next < 2; ++next) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float &y = dp[first + next][2 * half + e], &x = p[next][2 * half + e];
          if (drops) y = keep[next][half] ? y * a.dropout_scale : 0.0f;
          terms[next][e] = half == 0 ? x * y : ptx::fma(x, y, terms[next][e]);
          if (drops && !keep[next][half]) x = 0.0f;
        }
      }
    }
  }

  // Of the same: dp becomes ds = weights · (dp - delta).
  template <int kTiles>
  BERTKERN_DEVICE void differentiate(int part, int first, const float (&weights)[kTiles][4],
                                     float (&dp)[kTiles][4]) const {
    const int t = lane_index() % 4;
    const bool chooses = kGeneral || !whole;
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      const TwoFloats delta = two(facts.delta, part + 8 * next + 2 * t);
#pragma unroll
      for (int at = 0; at < 4; ++at) dp[first + next][at] -= delta.value[at % 2];
      if (chooses) {
#pragma unroll
        for (int at = 0; at < 4; ++at) {
          if (weights[first + next][at] == 0.0f) dp[first + next][at] = 0.0f;
        }
      }
#pragma unroll
      for (int at = 0; at < 4; ++at) dp[first + next][at] *= weights[first + next][at];
    }
  }

 private:
  BERTKERN_DEVICE bool is_seen(int part, int next, int at) const {
    const int i = first_q + part + 8 * next + 2 * (lane_index() % 4) + at % 2;
    const int j = first_k + lane_index() / 4 + 8 * (at / 2);
    return i < s.len_q && (whole || sees(s, kept, i, j));
  }

  // Chosen, not multiplied by 0: what is not seen may be NaN.
  template <int kTiles>
  BERTKERN_DEVICE void mask(int part, int first, float (&weights)[kTiles][4],
                            float (&dp)[kTiles][4]) const {
#pragma unroll
    for (int next = 0; next < 2; ++next) {
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        if (is_seen(part, next, at)) continue;
        weights[first + next][at] = dp[first + next][at] = 0.0f;
      }
    }
  }

  // With bias and cap: p, and p · cap' in `weights`.
  template <int kTiles>
  BERTKERN_DEVICE void to_probabilities(int part, int first, float (&weights)[kTiles][4],
                                        float (&dp)[kTiles][4], float (&p)[2][4]) const {
    const int t = lane_index() % 4;
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      const TwoFloats lse = two(facts.lse, part + 8 * next + 2 * t);
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        float& w = weights[first + next][at];
        const int i = first_q + part + 8 * next + 2 * t + at % 2;
        const int j = first_k + lane_index() / 4 + 8 * (at / 2);
        bool seen = is_seen(part, next, at);
        float derivative = 1.0f;
        const float score = seen ? score_of<T>(options, w, i, j, derivative) : -kInfinity;
        seen = seen && score != -kInfinity;
        // The difference comes first: the lowest float times log2(e) is -Inf.
        p[next][at] = seen ? ptx::exp2((score - lse.value[at % 2]) * kLog2e) : 0.0f;
        if (!seen) dp[first + next][at] = 0.0f;
        w = p[next][at] * derivative;
      }
    }
  }

  BERTKERN_DEVICE void keep_of(int part, int e, bool (&keep)[2][2]) const {
    const int query = part + 2 * (lane_index() % 4) + e;
    kept_scores({facts.dropout_a[query], facts.dropout_b[query], 0}, first_k + lane_index() / 4,
                a.dropout_threshold, keep);
  }
};

// Of the queries that a thread's fragment holds, rows g and g + 8.
struct QueryRows {
  float lse[2], delta[2];
  DropoutRow keys;

  // A query that sees nothing, or is none, has p = exp(s - Inf) = 0. `lse_factor`: log2(e) on the
  // plain path, 1 on the general one.
  BERTKERN_DEVICE void set(int half, bool inside, float row_lse, float row_delta,
                           float lse_factor) {
    lse[half] = inside && row_lse != -kInfinity ? row_lse * lse_factor : kInfinity;
    delta[half] = lse[half] != kInfinity ? row_delta : 0.0f;
  }
};

// delta + dlse of query i, whose keys are in several tiles: Σ_d dout · out, the four lanes of its
// row a quarter each; dout(chunk) is dout's 8 elements from column 8 · chunk on, `keys` are those
// of the row's dropout. Where the query sees one key p is 1 and out the rounded m v: v itself is
// summed, since dp - delta, which is 0, would be that rounding.
template <typename T, int kHeadDim, AttentionVariant kVariant, typename Chunk>
BERTKERN_DEVICE float delta_of_row(const AttentionKernelArguments& a, const QueryTile& own, int i,
                                   DropoutRow keys, Chunk dout) {
  const T* row = head_rows<const T>(a.out, own.index, own.s.first_q, own.head) + i * a.out.token;
  float factor = 1.0f;
  const int j = has_dropout<kVariant>(a) ? only_key(own.s, i) : -1;
  if (j >= 0) {
    row =
        head_rows<const T>(a.v, own.index, own.s.first_k, key_head_of(a, own.head)) + j * a.v.token;
    factor = is_kept(keys, i, j, a.dropout_threshold) ? a.dropout_scale : 0.0f;
  }
  float sum = 0.0f;
#pragma unroll
  for (int chunk = lane_index() % 4; chunk < kHeadDim / 8; chunk += 4) {
    if (chunk * 8 >= a.head_dim) continue;
    union {
      ptx::Words4 words;
      T element[8];
    } o, d;
    o.words = ptx::load_global_16(row + chunk * 8);
    d.words = dout(chunk);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += ptx::to_float(o.element[e]) * ptx::to_float(d.element[e]);
  }
  return factor * sum_of_row(sum);
}

// p [16 x kKeyTiles · 8] holds products q kᵀ, dp holds dout vᵀ: p becomes ds, the gradient of the
// scores (kCapped: of the products before the cap, in units of 1 / scale). Its corner is score
// (first_q, first_k); `whole`: every score counts; `all_keys`: no other key is seen, so Σ p dp of
// that very dp is added to delta. Where a query sees few keys dp and delta are almost equal, and a
// sum over the rounded `out` would be all that is left of ds.
template <typename T, AttentionVariant kVariant, bool kCapped, int kKeyTiles>
BERTKERN_DEVICE void gradients_of_scores(float (&p)[kKeyTiles][4], float (&dp)[kKeyTiles][4],
                                         QueryRows& rows, const AttentionKernelArguments& a,
                                         const Sequence& s, const uint8_t* kept, bool whole,
                                         bool all_keys, const ScoreOptions& options, int first_q,
                                         int first_k) {
  constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  const int g = lane_index() / 4, t = lane_index() % 4;
  float sums[2] = {};
  if (has_dropout<kVariant>(a)) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        bool keep[2][2];
        kept_scores(rows.keys, first_k + 8 * n + 2 * t + e, a.dropout_threshold, keep);
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          float &low = dp[n][2 * high + e], &next = dp[n + 1][2 * high + e];
          low = keep[high][0] ? low * a.dropout_scale : 0.0f;
          next = keep[high][1] ? next * a.dropout_scale : 0.0f;
        }
      }
    }
  }
  const auto is_seen = [&](int n, int e) {
    const int i = first_q + g + 8 * (e / 2), j = first_k + 8 * n + 2 * t + e % 2;
    return i < s.len_q && (whole || sees(s, kept, i, j));
  };
  if constexpr (kGeneral) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = first_q + g + 8 * (e / 2), j = first_k + 8 * n + 2 * t + e % 2;
        bool seen = is_seen(n, e);
        float derivative = 1.0f;
        const float score = seen ? score_of<T>(options, p[n][e], i, j, derivative) : -kInfinity;
        seen = seen && score != -kInfinity;
        if (!kCapped) derivative = 1.0f;
        const float p_ij = seen ? ptx::exp2((score - rows.lse[e / 2]) * kLog2e) : 0.0f;
        if (!seen) dp[n][e] = 0.0f;
        if (all_keys) sums[e / 2] = ptx::fma(p_ij, dp[n][e], sums[e / 2]);
        p[n][e] = p_ij * derivative;
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p[n][e] = ptx::exp2(ptx::fma(p[n][e], a.scale * kLog2e, -rows.lse[e / 2]));
      }
    }
    if (!whole) {
      // Chosen, not multiplied by 0: what is not seen may be NaN.
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!is_seen(n, e)) p[n][e] = dp[n][e] = 0.0f;
        }
      }
    }
    if (all_keys) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[e / 2] = ptx::fma(p[n][e], dp[n][e], sums[e / 2]);
      }
    }
  }
  if (all_keys) {
    rows.delta[0] += sum_of_row(sums[0]);
    rows.delta[1] += sum_of_row(sums[1]);
  }
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dp[n][e] -= rows.delta[e / 2];
  }
  if (kGeneral || !whole) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (p[n][e] == 0.0f) dp[n][e] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) p[n][e] *= dp[n][e];
  }
}

}  // namespace bertkern::cuda
