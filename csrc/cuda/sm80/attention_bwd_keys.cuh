// Attention backward, the part that owns keys: dk and dv; and, where a sequence's keys fit one tile
// (kShort), all of it: delta and dq, too, in one launch. No atomics: sums run in the order of query
// heads and queries.
//
//   forward: out_i = Σ_j p_ij m_ij v_j, p = exp(s - lse), m the dropout mask, so
//   dv_j = Σ_i p_ij m_ij dout_i,
//   delta_i = Σ_d dout_id out_id - dlse_i = Σ_j p_ij m_ij dout_i·v_j - dlse_i,
//   ds_ij = p_ij (m_ij dout_i·v_j - delta_i),  dk_j = scale Σ_i ds_ij cap'_ij q_i,
//   dq_i = scale Σ_j ds_ij cap'_ij k_j
//
// A block owns kRows keys of one key head, a warp 16 of them, and walks over the queries of the
// heads that read it, tiles of q and dout arriving one ahead. Scores are computed transposed, keys
// as rows: so pᵀ and dsᵀ are left operands of the sums for dv and dk as they stand in registers.
// For dq, dsᵀ goes through shared memory.
#pragma once

#include "cuda/attention_gradient.cuh"
#include "cuda/sm80/attention_tile.cuh"

namespace bertkern::sm80 {

template <typename Tile, bool kShort>
constexpr int attention_bwd_keys_shared_bytes() {
  return 2 * Tile::kRowsBytes + 2 * Tile::kStages * Tile::kColumnsBytes +
         Tile::kStages * static_cast<int>(sizeof(QueryFacts<Tile::kColumns>)) +
         (kShort ? Tile::kRows * Tile::kColumns * 2 + Tile::kWarps * Tile::kColumns * 4 : 0);
}

template <typename T, typename Tile, AttentionVariant kVariant, bool kShort>
BERTKERN_KERNEL(Tile::kThreads)
attention_bwd_keys_kernel(const AttentionKernelArguments a) {
  constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  constexpr bool kMayDrop = kVariant != AttentionVariant::kPlain;
  constexpr int kHeadDim = Tile::kHeadDim, kQueries = Tile::kColumns;
  static_assert(Tile::kRowTiles == 1, "a warp owns 16 keys");
  const int block = kShort ? 0 : ptx::block_index() % a.blocks;
  const int key_head = ptx::block_index() / a.blocks % a.key_heads;
  const int index = ptx::block_index() / a.blocks / a.key_heads;
  const int group = a.group;
  const Sequence s = sequence_of(a, index);
  T* dk = head_rows<T>(a.dk, index, s.first_k, key_head);
  T* dv = head_rows<T>(a.dv, index, s.first_k, key_head);
  const auto zero_keys = [&](int64_t first, int64_t end) {
    zero_rows<T, Tile::kThreads>(dk, a.dk.token, first, end, a.head_dim, block, a.blocks);
    zero_rows<T, Tile::kThreads>(dv, a.dv.token, first, end, a.head_dim, block, a.blocks);
  };
  const auto zero_queries = [&](int h) {
    zero_rows<T, Tile::kThreads>(head_rows<T>(a.dq, index, s.first_q, key_head * group + h),
                                 a.dq.token, 0, s.len_q, a.head_dim, block, a.blocks);
  };
  if (index == a.batch) {  // rows behind the last sequence of a varlen batch
    zero_keys(0, s.len_k);
    for (int h = 0; kShort && h < group; ++h) zero_queries(h);
    return;
  }
  if (s.len_k < a.least_keys || s.len_k > a.most_keys) return;
  if (a.cu_seqlens_k == nullptr) zero_keys(s.len_k, a.seqlen_k);
  if (kShort && s.len_k == 0) {
    for (int h = 0; h < group; ++h) zero_queries(h);
    return;
  }
  const int first_k = block * Tile::kRows;
  if (!kShort && first_k >= s.len_k) return;
  const int end_k = first_k + Tile::kRows < s.len_k ? first_k + Tile::kRows : s.len_k;
  const uint8_t* kept = kept_keys(a, index);

  char* k_tile = ptx::shared_memory();
  char* v_tile = k_tile + Tile::kRowsBytes;
  char* q_tiles = v_tile + Tile::kRowsBytes;
  char* dout_tiles = q_tiles + Tile::kStages * Tile::kColumnsBytes;
  auto* facts =
      reinterpret_cast<QueryFacts<kQueries>*>(dout_tiles + Tile::kStages * Tile::kColumnsBytes);
  char* ds_tile = reinterpret_cast<char*>(facts + Tile::kStages);
  auto* sums_of_warps = reinterpret_cast<float*>(ds_tile + Tile::kRows * kQueries * 2);

  // Tiles of queries that see some key of the block; dq of a short sequence wants all of them.
  const int first_query = kShort || first_k - s.high < 0 ? 0 : first_k - s.high;
  const int last_query = kShort || end_k - s.low > s.len_q ? s.len_q : end_k - s.low;
  const int first_tile = first_query / kQueries;
  const int tiles =
      last_query > first_query ? (last_query + kQueries - 1) / kQueries - first_tile : 0;
  // A step is one tile of queries of one of the heads that read this key head.
  const int steps = tiles * group;
  // A query that sees nothing has ds 0 and may hold NaN: it is left out as a row of no sequence is.
  const bool some_see_nothing =
      kGeneral || kept != nullptr || s.high < 0 || s.len_q - 1 + s.low >= s.len_k;
  const auto copy_queries = [&](int step) {
    const int head = key_head * group + step / tiles;
    const int first = (first_tile + step % tiles) * kQueries, stage = step % Tile::kStages;
    const float* lse = a.lse + lse_offset(a, index, s.first_q, head);
    const auto sees_some = [&](int i) { return !some_see_nothing || lse[i] != -kInfinity; };
    copy_rows<T, kQueries, kHeadDim, Tile::kThreads>(
        q_tiles + stage * Tile::kColumnsBytes, head_rows<const T>(a.q, index, s.first_q, head),
        a.q.token, first, s.len_q, a.head_dim, sees_some);
    copy_rows<T, kQueries, kHeadDim, Tile::kThreads>(
        dout_tiles + stage * Tile::kColumnsBytes,
        head_rows<const T>(a.dout, index, s.first_q, head), a.dout.token, first, s.len_q,
        a.head_dim, sees_some);
  };

  if (steps > 0) {
    copy_rows<T, Tile::kRows, kHeadDim, Tile::kThreads>(
        k_tile, head_rows<const T>(a.k, index, s.first_k, key_head), a.k.token, first_k, s.len_k,
        a.head_dim, KeptKeys{kept});
    copy_rows<T, Tile::kRows, kHeadDim, Tile::kThreads>(
        v_tile, head_rows<const T>(a.v, index, s.first_k, key_head), a.v.token, first_k, s.len_k,
        a.head_dim, KeptKeys{kept});
    copy_queries(0);
    ptx::copy_async_commit();
  }

  const int row = warp_index() * 16;  // the warp's first key of the tile
  const int g = lane_index() / 4, t = lane_index() % 4;
  OwnRows<kHeadDim> k_rows{k_tile, row, {}}, v_rows{v_tile, row, {}};
  float dk_acc[kHeadDim / 8][4] = {}, dv_acc[kHeadDim / 8][4] = {};

  for (int step = 0; step < steps; ++step) {
    const int head = key_head * group + step / tiles;
    const int first_q = (first_tile + step % tiles) * kQueries, stage = step % Tile::kStages;
    const int end_q = first_q + kQueries < s.len_q ? first_q + kQueries : s.len_q;
    const char* q_tile = q_tiles + stage * Tile::kColumnsBytes;
    const char* dout_tile = dout_tiles + stage * Tile::kColumnsBytes;
    QueryFacts<kQueries>& fact = facts[stage];
    const int64_t at_lse = lse_offset(a, index, s.first_q, head);
    for (int n = ptx::thread_index(); n < kQueries; n += Tile::kThreads) {
      const int i = first_q + n;
      // A query that sees nothing, or is none, has p = exp(s - Inf) = 0.
      float lse = i < s.len_q ? a.lse[at_lse + i] : kInfinity;
      if (lse == -kInfinity) lse = kInfinity;
      fact.lse[n] = kGeneral ? lse : lse * kLog2e;
      if (!kShort) fact.delta[n] = i < s.len_q ? a.delta[at_lse + i] : 0.0f;
      if (has_dropout<kVariant>(a)) {
        const DropoutRow keys =
            dropout_row(dropout_stream_of(a, index, head), static_cast<uint32_t>(i));
        fact.dropout_a[n] = keys.a;
        fact.dropout_b[n] = keys.b;
      }
    }
    ptx::copy_async_wait<0>();
    ptx::block_barrier();  // the tiles are there, and nobody reads the stage that is filled next
    if (step + 1 < steps) {
      copy_queries(step + 1);
      ptx::copy_async_commit();
    }
    if (step == 0) {
      k_rows.hold();
      v_rows.hold();
    }
    // Rows behind the last query are zeros: against an infinite key they would give NaN.
    const bool whole = first_q + kQueries <= s.len_q &&
                       sees_all(s, kept, first_q, end_q, first_k, first_k + Tile::kRows);
    const ScoreOptions options = kGeneral ? score_options<T>(a, index, head) : ScoreOptions{};

    const KeyScores<T, kVariant, kQueries> scores{a,       s,    kept,    whole,
                                                  options, fact, first_q, first_k + row};

    // Of 16 queries from `part` on: weights, dp and the sums of KeyScores; adds to dv.
    const auto scores_of_part = [&](int part, float (&weights)[2][4], float (&dp)[2][4],
                                    float (&sums)[2][2]) {
      float p[2][4];
      k_rows.multiply_transposed(weights, q_tile, part, T{});
      v_rows.multiply_transposed(dp, dout_tile, part, T{});
      scores.weigh(part, 0, weights, dp, p, sums);
      uint32_t left[4];
      to_left<T>(left, p[0], p[1]);
      multiply_step<T, kHeadDim>(dv_acc, left, dout_tile, part, 0);
    };
    // ds as the left operand of dk, to which it adds.
    const auto gradients_of_part = [&](int part, const float (&weights)[2][4], float (&dp)[2][4],
                                       uint32_t (&left)[4]) {
      scores.differentiate(part, 0, weights, dp);
      to_left<T>(left, dp[0], dp[1]);
      multiply_step<T, kHeadDim>(dk_acc, left, q_tile, part, 0);
    };

    if constexpr (!kShort) {
#pragma unroll 1
      for (int part = 0; part < kQueries; part += 16) {
        float weights[2][4] = {}, dp[2][4] = {}, sums[2][2];
        uint32_t ds[4];
        scores_of_part(part, weights, dp, sums);
        gradients_of_part(part, weights, dp, ds);
      }
    } else {
      // All keys are here, so delta = Σ_j p dp of that very dp: where a query sees few keys the two
      // are almost equal, and a sum over the rounded `out` would be all that is left of ds.
      float weights[kQueries / 16][2][4] = {}, dp[kQueries / 16][2][4] = {};
#pragma unroll
      for (int n = 0; n < kQueries / 16; ++n) {
        float sums[2][2];
        scores_of_part(16 * n, weights[n], dp[n], sums);
#pragma unroll
        for (int next = 0; next < 2; ++next) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float sum = sums[next][e];
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
            const int query = 16 * n + 8 * next + 2 * t + e;
            if (g == 0) sums_of_warps[warp_index() * kQueries + query] = sum;
          }
        }
      }
      ptx::block_barrier();  // the sums of all warps are there
      for (int n = ptx::thread_index(); n < kQueries; n += Tile::kThreads) {
        const int i = first_q + n;
        float delta = 0.0f;
#pragma unroll
        for (int warp = 0; warp < Tile::kWarps; ++warp) {
          delta += sums_of_warps[warp * kQueries + n];
        }
        if (a.dlse != nullptr && fact.lse[n] != kInfinity) delta -= a.dlse[at_lse + i];
        if (i < s.len_q) a.delta[at_lse + i] = delta;
        fact.delta[n] = delta;
      }
      ptx::block_barrier();  // delta is there
#pragma unroll
      for (int n = 0; n < kQueries / 16; ++n) {
        uint32_t ds[4];
        gradients_of_part(16 * n, weights[n], dp[n], ds);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const int key = row + g + 8 * (word % 2), chunk = 2 * n + word / 2;
          *reinterpret_cast<uint32_t*>(ds_tile + chunk_offset<kQueries>(key, chunk) + 4 * t) =
              ds[word];
        }
      }
      ptx::block_barrier();  // dsᵀ of all keys is there, and nobody reads the tile of q any more
      // The warps share out dq [kQueries x kHeadDim]: 16 queries and a part of the columns each.
      constexpr int kParts = Tile::kWarps / (kQueries / 16);
      constexpr int kPartTiles = (kHeadDim / 8 + kParts - 1) / kParts;
      static_assert(Tile::kWarps % (kQueries / 16) == 0 && kHeadDim / 8 % kPartTiles == 0,
                    "each warp has whole parts of dq, or none");
      const int query = warp_index() % (kQueries / 16) * 16;
      const int chunk = warp_index() / (kQueries / 16) * kPartTiles;
      if (chunk >= kHeadDim / 8) continue;
      float dq[kPartTiles][4] = {};
      // At 128 columns dk and dv leave no registers for the addresses of unrolled loops.
      constexpr int kUnroll = kHeadDim > 96 ? 1 : Tile::kRows / 16;
#pragma unroll kUnroll
      for (int k = 0; k < Tile::kRows / 16; ++k) {
        uint32_t left[4];
        load_left_transposed<kQueries>(left, ds_tile, 16 * k, query / 8);
        multiply_step<T, kHeadDim>(dq, left, k_tile, 16 * k, chunk);
      }
#pragma unroll
      for (int n = 0; n < kPartTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dq[n][e] *= a.scale;
      }
      store_rows<T, kHeadDim>(dq, q_tiles + stage * Tile::kColumnsBytes, query, chunk,
                              head_rows<T>(a.dq, index, s.first_q, head), a.dq.token,
                              first_q + query, s.len_q, a.head_dim);
    }
  }

  if constexpr (kShort) ptx::block_barrier();  // nobody reads the tile of k any more
  const float dv_scale = kMayDrop ? a.dropout_scale : 1.0f;
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      dk_acc[n][e] *= a.scale;
      dv_acc[n][e] *= dv_scale;
    }
  }
  store_rows<T, kHeadDim>(dk_acc, k_tile, row, 0, dk, a.dk.token, first_k + row, s.len_k,
                          a.head_dim);
  store_rows<T, kHeadDim>(dv_acc, v_tile, row, 0, dv, a.dv.token, first_k + row, s.len_k,
                          a.head_dim);
}

}  // namespace bertkern::sm80
