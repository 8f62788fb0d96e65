// Attention forward: out = dropout(softmax(score(q kᵀ))) v and lse, one read of each tile
// (Dao 2023, FlashAttention-2; the running softmax is Milakov & Gimelshein's, 2018).
//
// A block owns kRows queries of one head, a warp kWarpRows of them, and walks over the keys, tiles
// of k and v arriving by cp.async one ahead of the tile at work:
//
//   m' = max(m, max_j s_ij),  p_ij = exp(s_ij - m'),  sum' = sum · exp(m - m') + Σ_j p_ij,
//   acc' = acc · exp(m - m') + p v,   at the end out = acc / sum, lse = m + log(sum)
#pragma once

#include "cuda/sm80/attention_tile.cuh"

namespace bertkern::sm80 {

template <typename Tile>
constexpr int attention_fwd_shared_bytes() {
  return Tile::kRowsBytes + 2 * Tile::kStages * Tile::kColumnsBytes;
}

// Rows behind the last sequence of a varlen batch: out 0, lse -Inf.
template <typename T, typename Tile>
BERTKERN_DEVICE void attention_fwd_nothing(const AttentionKernelArguments& a, const Sequence& s,
                                           int head, int block) {
  zero_rows<T, Tile::kThreads>(head_rows<T>(a.out, 0, s.first_q, head), a.out.token, 0, s.len_q,
                               a.head_dim, block, a.blocks);
  for (int64_t i = block * Tile::kThreads + ptx::thread_index(); i < s.len_q;
       i += static_cast<int64_t>(a.blocks) * Tile::kThreads) {
    a.lse[lse_offset(a, 0, s.first_q, head) + i] = -kInfinity;
  }
}

template <typename T, typename Tile, AttentionVariant kVariant>
BERTKERN_KERNEL(Tile::kThreads)
attention_fwd_kernel(const AttentionKernelArguments a) {
  constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  constexpr int kHeadDim = Tile::kHeadDim, kRowTiles = Tile::kRowTiles;
  constexpr int kKeys = Tile::kColumns, kKeyTiles = kKeys / 8;
  const QueryTile own = own_query_tile<Tile>(a);
  const Sequence s = own.s;
  const int index = own.index, head = own.head, first_q = own.first_q, end_q = own.end_q;
  const int first_tile = own.first_tile, end_tile = own.end_tile;
  if (index == a.batch) return attention_fwd_nothing<T, Tile>(a, s, head, first_q / Tile::kRows);
  if (first_q >= end_q) return;
  const int key_head = key_head_of(a, head);
  const uint8_t* kept = kept_keys(a, index);

  char* q_tile = ptx::shared_memory();
  char* k_tiles = q_tile + Tile::kRowsBytes;
  char* v_tiles = k_tiles + Tile::kStages * Tile::kColumnsBytes;
  const T* q = head_rows<const T>(a.q, index, s.first_q, head);
  const T* k = head_rows<const T>(a.k, index, s.first_k, key_head);
  const T* v = head_rows<const T>(a.v, index, s.first_k, key_head);
  const auto copy_keys = [&](int tile) {
    char* k_tile = k_tiles + tile % Tile::kStages * Tile::kColumnsBytes;
    char* v_tile = v_tiles + tile % Tile::kStages * Tile::kColumnsBytes;
    copy_rows<T, kKeys, kHeadDim, Tile::kThreads>(k_tile, k, a.k.token, tile * kKeys, s.len_k,
                                                  a.head_dim, KeptKeys{kept});
    copy_rows<T, kKeys, kHeadDim, Tile::kThreads>(v_tile, v, a.v.token, tile * kKeys, s.len_k,
                                                  a.head_dim, KeptKeys{kept});
    ptx::copy_async_commit();
  };

  if (first_tile < end_tile) {
    copy_rows<T, Tile::kRows, kHeadDim, Tile::kThreads>(q_tile, q, a.q.token, first_q, s.len_q,
                                                        a.head_dim, AllRows{});
    copy_keys(first_tile);
  }

  const int row = warp_index() * Tile::kWarpRows;  // the warp's first row of the tile
  const int g = lane_index() / 4, t = lane_index() % 4;
  float acc[kRowTiles][kHeadDim / 8][4] = {};
  float maximum[kRowTiles][2], sum[kRowTiles][2] = {};
  DropoutRow keys[kRowTiles] = {};
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    maximum[r][0] = maximum[r][1] = -kInfinity;
    if (has_dropout<kVariant>(a)) {
      keys[r] = dropout_row(dropout_stream_of(a, index, head),
                            static_cast<uint32_t>(first_q + row + 16 * r + g));
    }
  }
  const ScoreOptions options = kGeneral ? score_options<T>(a, index, head) : ScoreOptions{};
  const float to_log2 = kGeneral ? kLog2e : a.scale * kLog2e;  // of a score as it stands in `p`

  for (int tile = first_tile; tile < end_tile; ++tile) {
    ptx::copy_async_wait<0>();
    ptx::block_barrier();  // the tile is there, and nobody reads the stage that is filled next
    if (tile + 1 < end_tile) copy_keys(tile + 1);
    const int stage = tile % Tile::kStages, first_k = tile * kKeys;

    float p[kRowTiles][kKeyTiles][4] = {};
    multiply_transposed<T, kHeadDim>(p, q_tile, row, k_tiles + stage * Tile::kColumnsBytes);

    const bool whole = sees_all(s, kept, first_q, end_q, first_k, first_k + kKeys);
    if (kGeneral || !whole) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = first_q + row + 16 * r + g + 8 * (e / 2);
            const int j = first_k + 8 * n + 2 * t + e % 2;
            const bool seen = whole ? i < s.len_q : i < s.len_q && sees(s, kept, i, j);
            float& x = p[r][n][e];
            float derivative;
            if (kGeneral && seen) x = score_of<T>(options, x, i, j, derivative);
            if (!seen) x = -kInfinity;
          }
        }
      }
    }

#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float minus_max[2], correction[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float greatest = maximum[r][half];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          greatest = ptx::max(greatest, ptx::max(p[r][n][2 * half], p[r][n][2 * half + 1]));
        }
        greatest = max_of_row(greatest);
        // A row that has seen nothing yet: -Inf - (-Inf) would be NaN.
        const float reference = greatest == -kInfinity ? 0.0f : greatest;
        correction[half] = ptx::exp2((maximum[r][half] - reference) * to_log2);
        maximum[r][half] = greatest;
        minus_max[half] = kGeneral ? -reference : -reference * to_log2;
        sum[r][half] *= correction[half];
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          // With a bias the difference comes first: the lowest float times log2(e) is -Inf.
          const float exponent = kGeneral ? (p[r][n][e] + minus_max[e / 2]) * to_log2
                                          : ptx::fma(p[r][n][e], to_log2, minus_max[e / 2]);
          p[r][n][e] = ptx::exp2(exponent);
          sum[r][e / 2] += p[r][n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[r][n][e] *= correction[e / 2];
      }
      if (has_dropout<kVariant>(a)) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += 2) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            bool keep[2][2];
            kept_scores(keys[r], first_k + 8 * n + 2 * t + e, a.dropout_threshold, keep);
#pragma unroll
            for (int high = 0; high < 2; ++high) {
              if (!keep[high][0]) p[r][n][2 * high + e] = 0.0f;
              if (!keep[high][1]) p[r][n + 1][2 * high + e] = 0.0f;
            }
          }
        }
      }
    }
    multiply_accumulators<T, kHeadDim>(acc, p, v_tiles + stage * Tile::kColumnsBytes);
  }

  T* out = head_rows<T>(a.out, index, s.first_q, head);
  float* lse = a.lse + lse_offset(a, index, s.first_q, head);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = sum_of_row(sum[r][half]);
      const int i = first_q + row + 16 * r + g + 8 * half;
      if (t == 0 && i < s.len_q) {
        const float scale = kGeneral ? 1.0f : a.scale;
        const float lse_i = ptx::fma(maximum[r][half], scale, natural_log(total));
        lse[i] = total == 0.0f ? -kInfinity : lse_i;
      }
      float factor = total == 0.0f ? 0.0f : 1.0f / total;
      if (kVariant != AttentionVariant::kPlain) factor *= a.dropout_scale;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        acc[r][n][2 * half] *= factor;
        acc[r][n][2 * half + 1] *= factor;
      }
    }
    store_rows<T, kHeadDim>(acc[r], q_tile, row + 16 * r, 0, out, a.out.token,
                            first_q + row + 16 * r, s.len_q, a.head_dim);
  }
}

}  // namespace bertkern::sm80
