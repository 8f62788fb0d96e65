// One tile of scores in a warpgroup's accumulators, from products to probabilities: bias and cap,
// what is not seen, the running softmax, dropout. A thread holds rows g and g + 8 of its warp's 16.
#pragma once

#include "cuda/attention_score.cuh"
#include "cuda/sm90/exponential.cuh"

namespace bertkern::sm90 {

using namespace cuda;

BERTKERN_DEVICE int bits_of(float x) {
  union {
    float value;
    int bits;
  } u{x};
  return u.bits;
}
BERTKERN_DEVICE float float_of(int bits) {
  union {
    int bits;
    float value;
  } u{bits};
  return u.value;
}

// Powers of two by which a row's maximum grows before the row is rescaled.
constexpr float kSlack = 8.0f;

// Of the two rows that a thread holds a part of. `maximum` is what their probabilities are relative
// to, at most kSlack powers of two below the greatest score; in units of the scores.
struct RunningRows {
  float maximum[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.0f, 0.0f};
  float correction[2];  // by the last tile; 1 where the maximum was left as it is
  bool corrected;       // whether it is not 1 for some row of the warp

  template <int kTiles>
  BERTKERN_DEVICE void rescale(float (&acc)[kTiles][4]) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[n][e] *= correction[e / 2];
    }
  }
};

// Whether an exponential is made on the FMA pipe, for both rows alike: one of eight at head dim 32,
// one of sixteen at 64. The other variants are bound by other things.
template <AttentionVariant kVariant, typename Tile>
constexpr bool is_polynomial(int n, int e) {
  constexpr int kPeriod = Tile::kHeadDim <= 32 ? 4 : 8;
  return kVariant == AttentionVariant::kPlain && Tile::kHeadDim <= 64 &&
         ((n % kPeriod == 1 && e == 1) || (n % kPeriod == 1 + kPeriod / 2 && e == 3));
}

// The greatest score of each of a thread's two rows. Floats that are not negative compare as
// integers, and integers three at a time; where a row has negative ones alone, as floats.
template <int kTiles>
BERTKERN_DEVICE void greatest_of_rows(const float (&x)[kTiles][4], float (&greatest)[2]) {
  const auto greater = [](int a, int b) { return a > b ? a : b; };
  bool negative = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int most = bits_of(x[0][2 * half]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      most = greater(greater(most, bits_of(x[n][2 * half])), bits_of(x[n][2 * half + 1]));
    }
    most = greater(most, bits_of(ptx::shuffle_xor(float_of(most), 1)));
    most = greater(most, bits_of(ptx::shuffle_xor(float_of(most), 2)));
    greatest[half] = float_of(most);
    negative |= most < 0;
  }
  if (!ptx::vote_any(negative)) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = x[0][2 * half];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      most = ptx::max(most, ptx::max(x[n][2 * half], x[n][2 * half + 1]));
    }
    greatest[half] = max_of_row(most);
  }
}

// p: scores become probabilities relative to rows.maximum, which follows. `slack` is kSlack in
// units of the scores.
template <AttentionVariant kVariant, typename Tile, int kTiles>
BERTKERN_DEVICE void softmax_tile(float (&p)[kTiles][4], RunningRows& rows, float to_log2,
                                  float slack) {
  constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  float greatest[2], minus_max[2];
  greatest_of_rows(p, greatest);
  bool grown = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Not the other way round: NaN is to be taken over.
    const bool keep = greatest[half] <= rows.maximum[half] + slack;
    const float reference = keep ? rows.maximum[half] : greatest[half];
    rows.correction[half] = keep ? 1.0f : ptx::exp2((rows.maximum[half] - reference) * to_log2);
    grown |= !keep;
    rows.maximum[half] = reference;
    rows.sum[half] *= rows.correction[half];
    // Of a row that has seen nothing yet -Inf - (-Inf) would be NaN.
    const float origin = reference == -kInfinity ? 0.0f : reference;
    minus_max[half] = kGeneral ? -origin : -origin * to_log2;
  }
  rows.corrected = ptx::vote_any(grown);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      // With a bias the difference comes first: the lowest float times log2(e) is -Inf.
      const float exponent = kGeneral ? (p[n][e] + minus_max[e / 2]) * to_log2
                                      : ptx::fma(p[n][e], to_log2, minus_max[e / 2]);
      p[n][e] =
          is_polynomial<kVariant, Tile>(n, e) ? exp2_polynomial(exponent) : ptx::exp2(exponent);
      rows.sum[e / 2] += p[n][e];
    }
  }
}

// What a call's options do to the scores of a warp's 16 rows with a tile of keys.
template <typename T, typename Tile, AttentionVariant kVariant>
class TileOptions {
  static constexpr int kKeys = Tile::kColumns, kTiles = kKeys / 8;
  static constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  static constexpr bool kDrops = kVariant != AttentionVariant::kPlain;

 public:
  BERTKERN_DEVICE TileOptions(const AttentionKernelArguments& a, const QueryTile& queries)
      : a_(&a),
        queries_(queries),
        kept_(kept_keys(a, queries.index)),
        first_row_(queries.first_q + warp_index() * 16),
        to_log2_(kGeneral ? kLog2e : a.scale * kLog2e),
        slack_(kSlack / to_log2_) {
    // Tiles of which all rows see all keys.
    const int low = first_row_ + 15 + queries.s.low, high = first_row_ + queries.s.high + 1;
    const int end = high < queries.s.len_k ? high : queries.s.len_k;
    first_whole_ = low > 0 ? (low + kKeys - 1) / kKeys : 0;
    end_whole_ = kept_ == nullptr && end > 0 ? end / kKeys : 0;
    if (kGeneral) score_ = score_options<T>(a, queries.index, queries.head);
    if (kDrops && a.dropout_threshold != 0) {
      keys_ = dropout_row(dropout_stream_of(a, queries.index, queries.head),
                          static_cast<uint32_t>(first_row_ + lane_index() / 4));
    }
  }

  BERTKERN_DEVICE const QueryTile& queries() const { return queries_; }

  // The factor between a score as apply leaves it and powers of two.
  BERTKERN_DEVICE float to_log2() const { return to_log2_; }

  BERTKERN_DEVICE float slack() const { return slack_; }

  // x: products with the keys of a tile become scores, -Inf where the query does not see the key.
  BERTKERN_DEVICE void apply(float (&x)[kTiles][4], int tile) const {
    const int first_k = tile * kKeys;
    if (kGeneral) to_scores(x, first_k);
    if (tile >= first_whole_ && tile < end_whole_) return;
    const int column = first_k + 2 * (lane_index() % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first_row_ + lane_index() / 4 + 8 * half;
      const int low = i + queries_.s.low > 0 ? i + queries_.s.low : 0;
      const int end =
          i + queries_.s.high < queries_.s.len_k ? i + queries_.s.high + 1 : queries_.s.len_k;
      const uint32_t count = static_cast<uint32_t>(end > low ? end - low : 0);
      const uint32_t start = static_cast<uint32_t>(column - low);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (start + (8 * n + e) >= count) x[n][2 * half + e] = -kInfinity;
        }
      }
    }
    if (kept_ == nullptr) return;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = column + 8 * n + e;
        if (j < queries_.s.len_k && kept_[j] != 0) continue;
        x[n][e] = x[n][2 + e] = -kInfinity;
      }
    }
  }

  // Probabilities that are dropped become 0.
  BERTKERN_DEVICE void drop(float (&p)[kTiles][4], int tile) const {
    if (!kDrops || (kGeneral && a_->dropout_threshold == 0)) return;
    // The group of column j is 8 (j / 16) + j % 8, and a tile begins with one: counted from this
    // thread's first one, groups are constants.
    DropoutRow keys = keys_;
    keys.a += static_cast<uint32_t>(tile * (kKeys / 2) + 2 * (lane_index() % 4)) * kHashAdd;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        bool keep[2][2];
        kept_in_groups(keys, static_cast<uint32_t>(4 * n + e), a_->dropout_threshold, keep);
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          if (!keep[high][0]) p[n][2 * high + e] = 0.0f;
          if (!keep[high][1]) p[n + 1][2 * high + e] = 0.0f;
        }
      }
    }
  }

 private:
  // The options one after the other, so that which of them there are is asked once for a tile.
  BERTKERN_DEVICE void to_scores(float (&x)[kTiles][4], int first_k) const {
    const bool capped = score_.softcap != 0.0f;
    const float factor = capped ? score_.scale / score_.softcap : score_.scale;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] *= factor;
    }
    if (capped) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[n][e] = score_.softcap * tanh_of(x[n][e]);
      }
    }
    const auto each = [&](auto with_bias) {
      const int column = first_k + 2 * (lane_index() % 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = first_row_ + lane_index() / 4 + 8 * half;
        if (i >= queries_.s.len_q) continue;
        const int64_t row = i * score_.query_stride;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int j = column + 8 * n + e;
            float& score = x[n][2 * half + e];
            if (j < queries_.s.len_k) score = with_bias(score, row + j * score_.key_stride);
          }
        }
      }
    };
    if (score_.kind == DeviceBias::kMask) {
      each([&](float score, int64_t at) { return masked(score_, score, at); });
    } else if (score_.kind == DeviceBias::kFloat32) {
      each([&](float score, int64_t at) { return biased<float>(score_, score, at); });
    } else if (score_.kind == DeviceBias::kSame) {
      each([&](float score, int64_t at) { return biased<T>(score_, score, at); });
    }
  }

  const AttentionKernelArguments* a_;
  QueryTile queries_;
  const uint8_t* kept_;
  int first_row_, first_whole_, end_whole_;
  float to_log2_, slack_;
  ScoreOptions score_{};
  DropoutRow keys_{};
};

}  // namespace bertkern::sm90
