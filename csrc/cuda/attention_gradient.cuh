// Gradients of scores in the fragments of a product: rows are queries, or keys.
//
//   forward: out_i = Σ_j p_ij m_ij v_j, p = exp(s - lse), m the dropout mask, so
//   ds_ij = p_ij (m_ij dout_i·v_j - delta_i), delta_i = Σ_j p_ij m_ij dout_i·v_j - dlse_i
#pragma once

#include "cuda/attention_score.cuh"

namespace bertkern::cuda {

// What a block keeps of each query of a tile: lse, delta, keys of its dropout.
struct QueryFacts {
  float lse, delta;
  uint32_t dropout_a, dropout_b;
};

// Scores of a tile whose rows are keys. A thread holds rows g and g + 8 and columns 2t, 2t + 1 of
// each fragment, g and t its lane's; first_k is the warp's first key, first_q the tile's first
// query.
template <typename T, AttentionVariant kVariant>
struct KeyScores {
  static constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  static constexpr bool kMayDrop = kVariant != AttentionVariant::kPlain;
  const AttentionKernelArguments& a;
  const Sequence& s;
  const uint8_t* kept;
  bool whole;  // every score counts
  const ScoreOptions& options;
  const QueryFacts* fact;  // of the tile's queries
  int first_q, first_k;

  // Of 16 queries from `part` on, the fragments `first` and first + 1: from the products k qᵀ in
  // `weights` and v doutᵀ in `dp` weights = p · cap', dp with its mask, p with its mask (for dv,
  // without dropout's scale), and Σ p dp over the thread's two keys, [fragment][query's bit 0]. The
  // queries of the second fragment are those of the first + 8.
  template <int kTiles>
  BERTKERN_DEVICE void weigh(int part, int first, float (&weights)[kTiles][4],
                             float (&dp)[kTiles][4], float (&p)[2][4], float (&sums)[2][2]) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const float to_log2 = kGeneral ? kLog2e : a.scale * kLog2e;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      bool keep[2][2] = {{true, true}, {true, true}};  // [query's bit 3][key's bit 3]
      if (kMayDrop && a.dropout_threshold != 0) {
        const QueryFacts& f = fact[part + 2 * t + e];
        kept_scores({f.dropout_a, f.dropout_b, 0}, first_k + g, a.dropout_threshold, keep);
      }
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int query = part + 8 * next + 2 * t + e;
        const float lse = fact[query].lse;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float &w = weights[first + next][2 * half + e], &y = dp[first + next][2 * half + e];
          const int i = first_q + query, j = first_k + g + 8 * half;
          bool seen = true;
          float derivative = 1.0f, exponent;
          if (kGeneral || !whole) seen = i < s.len_q && (whole || sees(s, kept, i, j));
          if (kGeneral) {
            const float score = seen ? score_of<T>(options, w, i, j, derivative) : -kInfinity;
            seen = seen && score != -kInfinity;
            exponent = (score - lse) * to_log2;
          } else {
            exponent = ptx::fma(w, to_log2, -lse);
          }
          // Chosen, not multiplied by 0: what is not seen may be NaN.
          const float p_ij = seen ? ptx::exp2(exponent) : 0.0f;
          if (kMayDrop) y *= a.dropout_scale;
          if (!seen || !keep[next][half]) y = 0.0f;
          p[next][2 * half + e] = keep[next][half] ? p_ij : 0.0f;
          w = p_ij * derivative;
          sums[next][e] = half == 0 ? p_ij * y : ptx::fma(p_ij, y, sums[next][e]);
        }
      }
    }
  }

  // Of the same: dp becomes ds = weights · (dp - delta).
  template <int kTiles>
  BERTKERN_DEVICE void differentiate(int part, int first, const float (&weights)[kTiles][4],
                                     float (&dp)[kTiles][4]) const {
    const int t = lane_index() % 4;
#pragma unroll
    for (int next = 0; next < 2; ++next) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float weight = weights[first + next][e];
        float& x = dp[first + next][e];
        const float ds = weight * (x - fact[part + 8 * next + 2 * t + e % 2].delta);
        // delta may be NaN where dout is: it must not reach what is not seen, whose weight is 0.
        x = (kGeneral || !whole) && weight == 0.0f ? 0.0f : ds;
      }
    }
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
  if (kVariant != AttentionVariant::kPlain && a.dropout_threshold != 0) {
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
  const float to_log2 = kGeneral ? kLog2e : a.scale * kLog2e;
  float sums[2] = {};
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      bool seen = true;
      float derivative = 1.0f, exponent;
      const int i = first_q + g + 8 * (e / 2), j = first_k + 8 * n + 2 * t + e % 2;
      if (kGeneral || !whole) seen = i < s.len_q && (whole || sees(s, kept, i, j));
      if (kGeneral) {
        const float score = seen ? score_of<T>(options, p[n][e], i, j, derivative) : -kInfinity;
        seen = seen && score != -kInfinity;
        exponent = (score - rows.lse[e / 2]) * to_log2;
      } else {
        exponent = ptx::fma(p[n][e], to_log2, -rows.lse[e / 2]);
      }
      if (!kCapped) derivative = 1.0f;
      // Chosen, not multiplied by 0: what is not seen may be NaN.
      const float p_ij = seen ? ptx::exp2(exponent) : 0.0f;
      if (!seen) dp[n][e] = 0.0f;
      sums[e / 2] = ptx::fma(p_ij, dp[n][e], sums[e / 2]);
      p[n][e] = p_ij * derivative;
    }
  }
  if (all_keys) {
    rows.delta[0] += sum_of_row(sums[0]);
    rows.delta[1] += sum_of_row(sums[1]);
  }
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float ds = p[n][e] * (dp[n][e] - rows.delta[e / 2]);
      // delta may be NaN where dout is: it must not reach what is not seen, whose p is 0.
      p[n][e] = (kGeneral || !whole) && p[n][e] == 0.0f ? 0.0f : ds;
    }
  }
}

}  // namespace bertkern::cuda
