// Attention backward, the part that owns queries: dq and delta, for sequences whose keys do not fit
// one tile. No atomics: each dq is summed by one warp in the order of the keys.
//
//   forward: out_i = Σ_j p_ij m_ij v_j, p = exp(s - lse), m the dropout mask, so
//   delta_i = Σ_d dout_id out_id - dlse_i,  ds_ij = p_ij (m_ij dout_i·v_j - delta_i),
//   dq_i = scale Σ_j ds_ij cap'_ij k_j
#pragma once

#include "cuda/attention_gradient.cuh"
#include "cuda/sm80/attention_tile.cuh"

namespace bertkern::sm80 {

template <typename Tile>
constexpr int attention_bwd_queries_shared_bytes() {
  return 2 * Tile::kRowsBytes + 2 * Tile::kStages * Tile::kColumnsBytes;
}

template <typename T, typename Tile, AttentionVariant kVariant>
BERTKERN_KERNEL(Tile::kThreads)
attention_bwd_queries_kernel(const AttentionKernelArguments a) {
  constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  constexpr int kHeadDim = Tile::kHeadDim, kRowTiles = Tile::kRowTiles;
  constexpr int kKeys = Tile::kColumns, kKeyTiles = kKeys / 8;
  const QueryTile own = own_query_tile<Tile>(a);
  const Sequence s = own.s;
  const int index = own.index, head = own.head, first_q = own.first_q, end_q = own.end_q;
  const int first_tile = own.first_tile, end_tile = own.end_tile;
  if (index == a.batch) {
    zero_rows<T, Tile::kThreads>(head_rows<T>(a.dq, 0, s.first_q, head), a.dq.token, 0, s.len_q,
                                 a.head_dim, first_q / Tile::kRows, a.blocks);
    return;
  }
  if (first_q >= end_q || s.len_k < a.least_keys) return;
  const int key_head = key_head_of(a, head);
  const uint8_t* kept = kept_keys(a, index);

  char* q_tile = ptx::shared_memory();
  char* dout_tile = q_tile + Tile::kRowsBytes;
  char* k_tiles = dout_tile + Tile::kRowsBytes;
  char* v_tiles = k_tiles + Tile::kStages * Tile::kColumnsBytes;
  const T* q = head_rows<const T>(a.q, index, s.first_q, head);
  const T* dout = head_rows<const T>(a.dout, index, s.first_q, head);
  const T* k = head_rows<const T>(a.k, index, s.first_k, key_head);
  const T* v = head_rows<const T>(a.v, index, s.first_k, key_head);
  const auto copy_keys = [&](int tile) {
    char* k_tile = k_tiles + tile % Tile::kStages * Tile::kColumnsBytes;
    char* v_tile = v_tiles + tile % Tile::kStages * Tile::kColumnsBytes;
    copy_rows<T, kKeys, kHeadDim, Tile::kThreads>(k_tile, k, a.k.token, tile * kKeys, s.len_k,
                                                  a.head_dim, KeptKeys{kept});
    copy_rows<T, kKeys, kHeadDim, Tile::kThreads>(v_tile, v, a.v.token, tile * kKeys, s.len_k,
                                                  a.head_dim, KeptKeys{kept});
  };

  copy_rows<T, Tile::kRows, kHeadDim, Tile::kThreads>(q_tile, q, a.q.token, first_q, s.len_q,
                                                      a.head_dim, AllRows{});
  copy_rows<T, Tile::kRows, kHeadDim, Tile::kThreads>(dout_tile, dout, a.dout.token, first_q,
                                                      s.len_q, a.head_dim, AllRows{});
  if (first_tile < end_tile) copy_keys(first_tile);
  ptx::copy_async_commit();

  const int row = warp_index() * Tile::kWarpRows;
  const int g = lane_index() / 4, t = lane_index() % 4;
  float dq[kRowTiles][kHeadDim / 8][4] = {};
  const bool all_keys = end_tile - first_tile == 1;
  QueryRows rows[kRowTiles];
  const int64_t at_lse = lse_offset(a, index, s.first_q, head);
  ptx::copy_async_wait<0>();
  ptx::block_barrier();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    if (has_dropout<kVariant>(a)) {
      rows[r].keys = dropout_row(dropout_stream_of(a, index, head),
                                 static_cast<uint32_t>(first_q + row + 16 * r + g));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile_row = row + 16 * r + g + 8 * half, i = first_q + tile_row;
      const int inside = i < s.len_q ? i : s.len_q - 1;  // all lanes take part in the sum
      float delta = 0.0f;
      if (!all_keys) {
        delta = delta_of_row<T, kHeadDim, kVariant>(a, own, inside, rows[r].keys, [&](int chunk) {
          const ptx::Words4 words = *reinterpret_cast<const ptx::Words4*>(
              dout_tile + chunk_offset<kHeadDim>(tile_row, chunk));
          return words;
        });
      }
      if (a.dlse != nullptr) delta -= a.dlse[at_lse + inside];
      rows[r].set(half, i < s.len_q, a.lse[at_lse + inside], delta, kGeneral ? 1.0f : kLog2e);
    }
  }
  const ScoreOptions options = kGeneral ? score_options<T>(a, index, head) : ScoreOptions{};

  for (int tile = first_tile; tile < end_tile; ++tile) {
    if (tile > first_tile) {
      ptx::copy_async_wait<0>();
      ptx::block_barrier();  // the tile is there, and nobody reads the stage that is filled next
    }
    if (tile + 1 < end_tile) copy_keys(tile + 1);
    ptx::copy_async_commit();
    const int stage = tile % Tile::kStages, first_k = tile * kKeys;
    const char* k_tile = k_tiles + stage * Tile::kColumnsBytes;
    const char* v_tile = v_tiles + stage * Tile::kColumnsBytes;

    float p[kRowTiles][kKeyTiles][4] = {}, dp[kRowTiles][kKeyTiles][4] = {};
    multiply_transposed<T, kHeadDim>(p, q_tile, row, k_tile);
    multiply_transposed<T, kHeadDim>(dp, dout_tile, row, v_tile);

    const bool whole = sees_all(s, kept, first_q, end_q, first_k, first_k + kKeys);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      gradients_of_scores<T, kVariant, true>(p[r], dp[r], rows[r], a, s, kept, whole, all_keys,
                                             options, first_q + row + 16 * r, first_k);
    }
    multiply_accumulators<T, kHeadDim>(dq, p, k_tile);
  }

  T* target = head_rows<T>(a.dq, index, s.first_q, head);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first_q + row + 16 * r + g + 8 * half;
      if (t == 0 && i < s.len_q) a.delta[at_lse + i] = rows[r].delta[half];
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dq[r][n][e] *= a.scale;
    }
    store_rows<T, kHeadDim>(dq[r], q_tile, row + 16 * r, 0, target, a.dq.token,
                            first_q + row + 16 * r, s.len_q, a.head_dim);
  }
}

}  // namespace bertkern::sm80
