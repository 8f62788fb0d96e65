// Attention backward on Hopper, the part that owns keys: dk and dv; and, where a sequence's keys
// fit one tile (kShort), all of it: delta and dq, too, in one launch. As sm80's, with the same sums
// in the same order: no atomics.
//
// A block owns 128 keys of one key head, a warpgroup 64 of them, and walks over the queries of the
// heads that read it. One warp has the copy engine bring tiles of q and dout and writes down what
// the others need to know of each query. Scores are computed transposed, keys as rows: so pᵀ and
// dsᵀ are left operands of the sums for dv and dk as they stand in registers. For dq, dsᵀ goes
// through shared memory.
#pragma once

#include "cuda/sm90/attention_bwd.cuh"

namespace bertkern::sm90 {

// The block's shared memory. Tiles start on multiples of 1024, as the swizzle asks for.
template <typename Tile, bool kShort>
struct BwdKeysMemory {
  static constexpr int kQueries = Tile::kColumns, kWarps = 4 * Tile::kWarpgroups;
  static constexpr int kV = Tile::kRowsBytes;
  static constexpr int kQ = kV + Tile::kRowsBytes;
  static constexpr int kDout = kQ + Tile::kStages * Tile::kColumnsBytes;
  static constexpr int kDs = kDout + Tile::kStages * Tile::kColumnsBytes;
  static constexpr int kDq = kDs + (kShort ? Tile::kRows * kQueries * 2 : 0);
  static constexpr int kFacts = kDq + (kShort ? Tile::kColumnsBytes : 0);
  static constexpr int kSums =
      kFacts + Tile::kStages * static_cast<int>(sizeof(QueryFacts<kQueries>));
  static constexpr int kSignals = kSums + (kShort ? kWarps * kQueries * 4 : 0);
  static constexpr int kBytes = kSignals + static_cast<int>(sizeof(AttentionBwdSignals<Tile>));
  static_assert(kBytes <= kHopperSharedLimit, "more shared memory than a block can have");

  char *k, *v, *q, *dout;
  char *ds, *dq;                // short
  QueryFacts<kQueries>* facts;  // by stage
  float* sums;                  // short: [warp][query]
  AttentionBwdSignals<Tile>* signals;

  BERTKERN_DEVICE static BwdKeysMemory get() {
    char* start = ptx::shared_memory();
    return {start,
            start + kV,
            start + kQ,
            start + kDout,
            start + kDs,
            start + kDq,
            reinterpret_cast<QueryFacts<kQueries>*>(start + kFacts),
            reinterpret_cast<float*>(start + kSums),
            reinterpret_cast<AttentionBwdSignals<Tile>*>(start + kSignals)};
  }
};

// A block's own keys, and the tiles of queries that it walks over.
struct KeyTile {
  Sequence s;
  int index, key_head;
  const uint8_t* kept;
  int first_k, end_k;
  int first_tile, tiles;  // of queries
  // A query that sees nothing has ds 0 and may hold NaN: it is left out as a row of no sequence is.
  bool some_see_nothing;

  // A step is one tile of queries of one of the heads that read the key head.
  BERTKERN_DEVICE int head(int step, int group) const { return key_head * group + step / tiles; }
  BERTKERN_DEVICE int first_query(int step, int queries) const {
    return (first_tile + step % tiles) * queries;
  }
};

// `all`: every tile of queries, also those that see none of the keys.
template <typename Tile>
BERTKERN_DEVICE KeyTile key_tile(const AttentionKernelArguments& a, const Sequence& s, int index,
                                 int key_head, int block, bool all, bool general) {
  KeyTile own{s, index, key_head, kept_keys(a, index), 0, 0, 0, 0, false};
  own.first_k = block * Tile::kRows;
  own.end_k = own.first_k + Tile::kRows < s.len_k ? own.first_k + Tile::kRows : s.len_k;
  const int first_query = all || own.first_k - s.high < 0 ? 0 : own.first_k - s.high;
  const int last_query = all || own.end_k - s.low > s.len_q ? s.len_q : own.end_k - s.low;
  own.first_tile = first_query / Tile::kColumns;
  own.tiles = last_query > first_query
                  ? (last_query + Tile::kColumns - 1) / Tile::kColumns - own.first_tile
                  : 0;
  own.some_see_nothing =
      general || own.kept != nullptr || s.high < 0 || s.len_q - 1 + s.low >= s.len_k;
  return own;
}

template <typename T, typename Tile, AttentionVariant kVariant, bool kShort>
BERTKERN_DEVICE void produce_queries(const AttentionBwdArguments& arguments, const KeyTile& own,
                                     const BwdKeysMemory<Tile, kShort>& memory) {
  constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  constexpr int kQueries = Tile::kColumns;
  const AttentionKernelArguments& a = arguments.a;
  const Sequence& s = own.s;
  AttentionBwdSignals<Tile>& signals = *memory.signals;
  const int batch = a.cu_seqlens_q != nullptr ? 0 : own.index;
  const ptx::CachePolicy once = ptx::cache_briefly(), again = ptx::cache_normally();
  int landed = 0;  // parity

  // dq sums over all keys.
  const bool clear_keys = kShort && has_foreign_keys(a, s.len_k, own.first_k + Tile::kRows);
  if (ptx::elect_one()) {
    ptx::Barrier* full = clear_keys ? &signals.landed : &signals.own_full;
    const int first = static_cast<int>(s.first_k) + own.first_k;
    ptx::barrier_arrive_expect_bytes(full, 2 * Tile::kRowsBytes);
    load_tile<Tile, Tile::kRows>(memory.k, arguments.k, own.key_head, first, batch, full, once);
    load_tile<Tile, Tile::kRows>(memory.v, arguments.v, own.key_head, first, batch, full, once);
  }
  if (clear_keys) {
    ptx::barrier_wait(&signals.landed, landed);
    landed ^= 1;
    clear_foreign_keys<Tile, Tile::kRows>(memory.k, own.kept, s.len_k, own.first_k);
    arrive_as_warp(&signals.own_full);
  }

  Stage<Tile::kStages> stage;
  for (int step = 0; step < own.tiles * a.group; ++step, stage.advance()) {
    const int head = own.head(step, a.group), first_q = own.first_query(step, kQueries);
    const float* lse = a.lse + lse_offset(a, own.index, s.first_q, head);
    const float* delta = a.delta + lse_offset(a, own.index, s.first_q, head);
    char* q = memory.q + stage.index * Tile::kColumnsBytes;
    char* dout = memory.dout + stage.index * Tile::kColumnsBytes;
    QueryFacts<kQueries>& fact = memory.facts[stage.index];
    const bool clear =
        own.some_see_nothing || (a.cu_seqlens_q != nullptr && first_q + kQueries > s.len_q);
    ptx::barrier_wait(&signals.empty[stage.index], stage.parity ^ 1);
    if (ptx::elect_one()) {
      ptx::Barrier* counts = clear ? &signals.landed : &signals.full[stage.index];
      const int first = static_cast<int>(s.first_q) + first_q;
      ptx::barrier_expect_bytes(counts, 2 * Tile::kColumnsBytes);
      if (clear) ptx::barrier_arrive(counts);
      load_tile<Tile, kQueries>(q, arguments.q, head, first, batch, counts, again);
      load_tile<Tile, kQueries>(dout, arguments.dout, head, first, batch, counts, again);
    }
#pragma unroll 1  // more at a time would take more registers than the producer has
    for (int n = lane_index(); n < kQueries; n += ptx::kWarpThreads) {
      const int i = first_q + n;
      // A query that sees nothing, or is none, has p = exp(s - Inf) = 0.
      float x = i < s.len_q ? lse[i] : kInfinity;
      if (x == -kInfinity) x = kInfinity;
      fact.lse[n] = kGeneral ? x : x * kLog2e;
      if (!kShort) fact.delta[n] = i < s.len_q ? delta[i] : 0.0f;
      if (has_dropout<kVariant>(a)) {
        const DropoutRow keys =
            dropout_row(dropout_stream_of(a, own.index, head), static_cast<uint32_t>(i));
        fact.dropout_a[n] = keys.a;
        fact.dropout_b[n] = keys.b;
      }
    }
    if (clear) {
      ptx::barrier_wait(&signals.landed, landed);
      landed ^= 1;
      const auto clears = [&](int row) {
        const int i = first_q + row;
        return i >= s.len_q || lse[i] == -kInfinity;
      };
      clear_rows<Tile, kQueries>(q, clears);
      clear_rows<Tile, kQueries>(dout, clears);
    }
    arrive_as_warp(&signals.full[stage.index]);
  }
}

// Σ over the warp's 16 keys of p dp for the 16 queries of two fragments, to sums[query]. terms:
// over the thread's two keys, [fragment][query's bit 0]. Lanes 4g + t for all g hold terms of the
// same four queries: each passes on what is not its own, until it has one query's sum.
BERTKERN_DEVICE void sum_over_warp(const float (&terms)[2][2], float* sums) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const bool next = (g & 4) != 0, odd = (g & 2) != 0;
  float of_fragment[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float passed = next ? terms[0][e] : terms[1][e];
    of_fragment[e] = (next ? terms[1][e] : terms[0][e]) + ptx::shuffle_xor(passed, 16);
  }
  const float passed = odd ? of_fragment[0] : of_fragment[1];
  float sum = (odd ? of_fragment[1] : of_fragment[0]) + ptx::shuffle_xor(passed, 8);
  sum += ptx::shuffle_xor(sum, 4);
  if ((g & 1) == 0) sums[(next ? 8 : 0) + 2 * t + (odd ? 1 : 0)] = sum;
}

// delta of the tile's queries, into `fact` and into memory: all keys are here, so delta = Σ_j p dp
// of that very dp. Where a query sees few keys the two are almost equal, and a sum over the rounded
// `out` would be all that is left of ds. sums: [warp][query].
template <typename Tile>
BERTKERN_DEVICE void sum_over_block(const float* sums, QueryFacts<Tile::kColumns>& fact,
                                    float* delta, const float* dlse, int queries) {
  constexpr int kQueries = Tile::kColumns;
  ptx::named_barrier_sync(kConsumersBarrier, 128 * Tile::kWarpgroups);
  const int n = ptx::thread_index();
  if (n < kQueries) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < 4 * Tile::kWarpgroups; ++warp) total += sums[warp * kQueries + n];
    if (n < queries) {
      if (dlse != nullptr && fact.lse[n] != kInfinity) total -= dlse[n];
      delta[n] = total;
    }
    fact.delta[n] = total;
  }
  ptx::named_barrier_sync(kConsumersBarrier, 128 * Tile::kWarpgroups);
}

// dq of the tile's queries = scale · ds k, of parts of the columns from `part` on: [64 x columns].
template <typename T, typename Tile, int kPartsHere, bool kShort>
BERTKERN_DEVICE void write_dq(const AttentionKernelArguments& a, const KeyTile& own, int head,
                              int first_q, int part, const BwdKeysMemory<Tile, kShort>& memory) {
  constexpr int kTiles = kPartsHere * Tile::kSpan / 8;
  constexpr int kPartBytes = Tile::kRows * Tile::kSpanBytes;
  float dq[kTiles][4];
  MatrixDescriptor ds = ptx::describe_tile<Swizzle::k128, 0, 1024>(memory.ds);
  MatrixDescriptor k = advance(describe_transposed<Tile, Tile::kRows>(memory.k), part * kPartBytes);
  ptx::wgmma_fence(dq);
#pragma unroll
  for (int step = 0; step < Tile::kRows / 16; ++step) {
    ptx::wgmma<true, true>(dq, advance(ds, step * 16 * 128),
                           advance(k, step * 16 * Tile::kSpanBytes), step > 0, T{});
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(dq);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dq[n][e] *= a.scale;
  }
  const int row = warp_index() % 4 * 16, column = part * Tile::kSpan;
  store_rows<T, Tile, Tile::kColumns>(dq, memory.dq + part * Tile::kColumns * Tile::kSpanBytes, row,
                                      head_rows<T>(a.dq, own.index, own.s.first_q, head) + column,
                                      a.dq.token, first_q + row, own.s.len_q, a.head_dim - column);
}

template <typename T, typename Tile, AttentionVariant kVariant, bool kShort>
BERTKERN_DEVICE void consume_queries(const AttentionKernelArguments& a, const KeyTile& own,
                                     const BwdKeysMemory<Tile, kShort>& memory) {
  constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  constexpr int kQueries = Tile::kColumns, kTiles = kQueries / 8, kHeadTiles = Tile::kHeadDim / 8;
  // Accumulators of dk and dv leave few registers: products take them piece by piece, and give them
  // back as soon as they can.
  constexpr bool kTight = kQueries > 64 || Tile::kHeadDim > 96 || (kGeneral && Tile::kHeadDim > 64);
  const Sequence& s = own.s;
  AttentionBwdSignals<Tile>& signals = *memory.signals;
  const int warp = of_warp(warp_index()), group = warp / 4, row = warp * 16;  // first key
  MatrixDescriptor k = describe_rows<Tile>(memory.k + group * 64 * Tile::kSpanBytes);
  MatrixDescriptor v = describe_rows<Tile>(memory.v + group * 64 * Tile::kSpanBytes);
  float dk_acc[kHeadTiles][4] = {}, dv_acc[kHeadTiles][4] = {};
  ptx::barrier_wait(&signals.own_full, 0);

  Stage<Tile::kStages> stage;
  for (int step = 0; step < own.tiles * a.group; ++step, stage.advance()) {
    const int head = own.head(step, a.group), first_q = own.first_query(step, kQueries);
    const int end_q = first_q + kQueries < s.len_q ? first_q + kQueries : s.len_q;
    const char* q = memory.q + stage.index * Tile::kColumnsBytes;
    const char* dout = memory.dout + stage.index * Tile::kColumnsBytes;
    QueryFacts<kQueries>& fact = memory.facts[stage.index];
    float weights[kTiles][4], dp[kTiles][4];
    ptx::barrier_wait(&signals.full[stage.index], stage.parity);
    ptx::wgmma_fence(weights, dp);
    multiply_transposed<T, Tile, Tile::kRows>(weights, k, describe_rows<Tile>(q));
    multiply_transposed<T, Tile, Tile::kRows>(dp, v, describe_rows<Tile>(dout));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(weights, dp);

    // Rows behind the last query are zeros: against an infinite key they would give NaN.
    const bool whole =
        first_q + kQueries <= s.len_q &&
        sees_all(s, own.kept, first_q, end_q, own.first_k, own.first_k + Tile::kRows);
    const ScoreOptions options = kGeneral ? score_options<T>(a, own.index, head) : ScoreOptions{};
    const KeyScores<T, kVariant, kQueries> scores{a,       s,    own.kept, whole,
                                                  options, fact, first_q,  own.first_k + row};
    constexpr int kPieces = kTight ? 2 : 1, kPieceTiles = kTiles / kPieces;
    uint32_t p[kPieceTiles / 2][4];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int n = piece * kPieceTiles; n < (piece + 1) * kPieceTiles; n += 2) {
        float p_part[2][4], terms[2][2];
        scores.weigh(8 * n, n, weights, dp, p_part, terms);
        to_left<T>(p[n % kPieceTiles / 2], p_part[0], p_part[1]);
        if (kShort) sum_over_warp(terms, memory.sums + warp_index() * kQueries + 8 * n);
      }
      ptx::wgmma_fence(dv_acc, p);
      multiply<T, Tile>(dv_acc, p,
                        advance(describe_transposed<Tile, kQueries>(dout),
                                piece * kPieceTiles * 8 * Tile::kSpanBytes));
      ptx::wgmma_commit();
      if constexpr (kTight) ptx::wgmma_wait<0>(dv_acc, p);
    }
    if constexpr (kShort) {
      const int64_t at = lse_offset(a, own.index, s.first_q, head) + first_q;
      sum_over_block<Tile>(memory.sums, fact, a.delta + at,
                           a.dlse == nullptr ? nullptr : a.dlse + at, end_q - first_q);
    }
    uint32_t ds[kPieceTiles / 2][4];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int n = piece * kPieceTiles; n < (piece + 1) * kPieceTiles; n += 2) {
        scores.differentiate(8 * n, n, weights, dp);
        to_left<T>(ds[n % kPieceTiles / 2], dp[n], dp[n + 1]);
        if (kShort) {
          static_assert(!kShort || kQueries == 64, "a row of dsᵀ is one span of the swizzle");
          const int key = row + lane_index() % 16, chunk = n + lane_index() / 16;
          ptx::store_matrix_4(memory.ds + swizzled(key * 128 + chunk * 16, Swizzle::k128),
                              ds[n % kPieceTiles / 2]);
        }
      }
      ptx::wgmma_fence(dk_acc, ds);
      multiply<T, Tile>(dk_acc, ds,
                        advance(describe_transposed<Tile, kQueries>(q),
                                piece * kPieceTiles * 8 * Tile::kSpanBytes));
      ptx::wgmma_commit();
      if constexpr (kTight) ptx::wgmma_wait<0>(dk_acc, ds);
    }
    if constexpr (kShort) {
      ptx::fence_async_shared();
      ptx::named_barrier_sync(kConsumersBarrier, 128 * Tile::kWarpgroups);
      // The warpgroups share out the columns of dq; where they have unlike parts they take turns.
      static_assert(Tile::kWarpgroups <= 2, "two shares");
      constexpr int kNarrow = Tile::kWarpgroups == 1 ? 0 : Tile::kParts / 2;
      constexpr int kWide = Tile::kParts - kNarrow;
      const bool wide = Tile::kWarpgroups == 1 || group == (kWide == kNarrow ? 0 : step % 2);
      if (wide) {
        write_dq<T, Tile, kWide>(a, own, head, first_q, 0, memory);
      } else if constexpr (kNarrow > 0) {
        write_dq<T, Tile, kNarrow>(a, own, head, first_q, kWide, memory);
      }
    }
    ptx::wgmma_wait<0>(dk_acc, dv_acc, p, ds);
    arrive_as_warp(&signals.empty[stage.index]);
  }

  // Nobody reads the tiles of k and v any more.
  ptx::named_barrier_sync(kConsumersBarrier, 128 * Tile::kWarpgroups);
  const float dv_scale = kVariant == AttentionVariant::kPlain ? 1.0f : a.dropout_scale;
#pragma unroll
  for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      dk_acc[n][e] *= a.scale;
      dv_acc[n][e] *= dv_scale;
    }
  }
  store_rows<T, Tile, Tile::kRows>(dk_acc, memory.k, row,
                                   head_rows<T>(a.dk, own.index, s.first_k, own.key_head),
                                   a.dk.token, own.first_k + row, s.len_k, a.head_dim);
  store_rows<T, Tile, Tile::kRows>(dv_acc, memory.v, row,
                                   head_rows<T>(a.dv, own.index, s.first_k, own.key_head),
                                   a.dv.token, own.first_k + row, s.len_k, a.head_dim);
}

template <typename T, typename Tile, AttentionVariant kVariant, bool kShort>
BERTKERN_KERNEL(Tile::kThreads)
attention_bwd_keys_kernel(BERTKERN_GRID_CONSTANT AttentionBwdArguments arguments) {
  const AttentionKernelArguments& a = arguments.a;
  const int block = kShort ? 0 : ptx::block_index() % a.blocks;
  const int pair = kShort ? ptx::block_index() : ptx::block_index() / a.blocks;
  const int key_head = pair % a.key_heads, index = sequence_in_turn(a, pair / a.key_heads);
  const Sequence s = sequence_of(a, index);
  const auto zero_keys = [&](int64_t first, int64_t end) {
    zero_rows<T, Tile::kThreads>(head_rows<T>(a.dk, index, s.first_k, key_head), a.dk.token, first,
                                 end, a.head_dim, block, a.blocks);
    zero_rows<T, Tile::kThreads>(head_rows<T>(a.dv, index, s.first_k, key_head), a.dv.token, first,
                                 end, a.head_dim, block, a.blocks);
  };
  const auto zero_queries = [&](int h) {
    zero_rows<T, Tile::kThreads>(head_rows<T>(a.dq, index, s.first_q, key_head * a.group + h),
                                 a.dq.token, 0, s.len_q, a.head_dim, block, a.blocks);
  };
  if (index == a.batch) {  // rows behind the last sequence of a varlen batch
    zero_keys(0, s.len_k);
    for (int h = 0; kShort && h < a.group; ++h) zero_queries(h);
    return;
  }
  if (s.len_k < a.least_keys || s.len_k > a.most_keys) return;
  if (a.cu_seqlens_k == nullptr) zero_keys(s.len_k, a.seqlen_k);
  if (kShort && s.len_k == 0) {
    for (int h = 0; h < a.group; ++h) zero_queries(h);
    return;
  }
  if (!kShort && block * Tile::kRows >= s.len_k) return;

  const auto memory = BwdKeysMemory<Tile, kShort>::get();
  memory.signals->begin();
  const KeyTile own = key_tile<Tile>(a, sequence_of(a, index), index, key_head, block, kShort,
                                     kVariant == AttentionVariant::kGeneral);
  const int warp = warp_index() - 4 * Tile::kWarpgroups;
  if (warp < 0) {
    ptx::raise_registers<Tile::kConsumerRegisters>();
    consume_queries<T, Tile, kVariant, kShort>(a, own, memory);
  } else {
    ptx::lower_registers<Tile::kProducerRegisters>();
    if (warp == 0) produce_queries<T, Tile, kVariant, kShort>(arguments, own, memory);
  }
}

}  // namespace bertkern::sm90
