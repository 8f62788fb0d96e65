// Attention backward on Hopper for sequences whose keys fit one tile: dq, dk and dv in one launch,
// without atomics and without a sum in memory. For head dims whose sums of dk and dv leave room for
// square tiles of scores; for others, and with bias or cap, attention_bwd_keys.cuh does the same by
// fewer queries at a time.
//
// A block takes one (sequence, key head) after the other, and of each the queries of the heads that
// read it, as many at a time as there are keys. The scores of a warpgroup are 64 queries by all
// keys, so delta is a sum over a row that a warp has, and ds the left operand of dq as it stands in
// registers. For dv and dk, of which a warpgroup has 64 keys, p and ds pass through shared memory.
//
//   producer   a warp that has the copy engine bring the tiles, those of the next keys as well
//   cleaner    a warp that zeroes padding, rows of other sequences, and queries that see nothing:
//              what stands there may be NaN, and 0 · NaN would not be 0
//   consumers  warpgroups
//   others     two warps that write zeros where there is nothing to sum
#pragma once

#include "cuda/sm90/attention_bwd.cuh"
#include "cuda/sm90/attention_schedule.cuh"

namespace bertkern::sm90 {

// A tile of queries of a head, as the producer tells the consumers of it.
struct ShortStep {
  Sequence s;
  int index, head, first_q;  // head < 0: no more come
  bool is_first, is_last;    // of those that read the same keys
};

template <typename Tile>
struct BwdShortSignals {
  ptx::Barrier keys_full[Tile::kStages], keys_empty[Tile::kStages];
  ptx::Barrier full[Tile::kStages], empty[Tile::kStages];
  // What has come, but is to be cleaned before it is full.
  ptx::Barrier keys_landed[Tile::kStages], landed[Tile::kStages];
  ShortStep steps[Tile::kStages];  // comes with the queries

  // By all threads of the block, before any of them is one of a role.
  BERTKERN_DEVICE void begin() {
    if (ptx::thread_index() == 0) {
      for (int i = 0; i < Tile::kStages; ++i) {
        ptx::barrier_init(&keys_full[i], 1);
        ptx::barrier_init(&keys_empty[i], 4 * Tile::kWarpgroups);
        ptx::barrier_init(&keys_landed[i], 1);
        ptx::barrier_init(&full[i], 1);
        ptx::barrier_init(&empty[i], 4 * Tile::kWarpgroups);
        ptx::barrier_init(&landed[i], 1);
      }
      ptx::barrier_init_fence();
    }
    ptx::block_barrier();
  }
};

// The block's shared memory. Tiles start on multiples of 1024, as the swizzle asks for.
template <typename Tile>
struct BwdShortMemory {
  static_assert(Tile::kRows == Tile::kColumns, "a warpgroup has as many keys as queries");
  // p and ds: a row of 64 keys, those of one warpgroup, is one span of the swizzle.
  static constexpr int kScoresPart = Tile::kRows * 128;
  static constexpr int kScores = Tile::kWarpgroups * kScoresPart;
  static constexpr int kV = Tile::kStages * Tile::kRowsBytes;
  static constexpr int kQ = kV + Tile::kStages * Tile::kRowsBytes;
  static constexpr int kDout = kQ + Tile::kStages * Tile::kRowsBytes;
  static constexpr int kP = kDout + Tile::kStages * Tile::kRowsBytes;
  static constexpr int kDs = kP + kScores;
  static constexpr int kOut = kDs + kScores;
  static constexpr int kSignals = kOut + Tile::kRowsBytes;
  static constexpr int kBytes = kSignals + static_cast<int>(sizeof(BwdShortSignals<Tile>));
  static_assert(kBytes <= kHopperSharedLimit, "more shared memory than a block can have");

  char *k, *v, *q, *dout;
  char *p, *ds;
  char* out;  // what a warp stores passes through its 16 rows
  BwdShortSignals<Tile>* signals;

  BERTKERN_DEVICE static BwdShortMemory get() {
    char* start = ptx::shared_memory();
    return {start,        start + kV,
            start + kQ,   start + kDout,
            start + kP,   start + kDs,
            start + kOut, reinterpret_cast<BwdShortSignals<Tile>*>(start + kSignals)};
  }
};

// The (sequence, key head) that a block takes, and its tiles of queries.
template <typename Tile>
struct ShortKeys {
  Sequence s;
  int index, key_head;
  int tiles, steps;  // of one head, of all that read the key head

  BERTKERN_DEVICE ShortKeys(const AttentionKernelArguments& a, int number)
      : index(sequence_in_turn(a, number / a.key_heads)), key_head(number % a.key_heads) {
    s = sequence_of(a, index);
    const bool any = is_own(a) && s.len_k > 0;
    tiles = any ? (s.len_q + Tile::kRows - 1) / Tile::kRows : 0;
    steps = tiles * a.group;
  }
  // Whether it is this launch's, and no rows behind the last sequence. A length below 0, which no
  // call should have, is nobody's: what lies before the sequence stays as it is.
  BERTKERN_DEVICE bool is_own(const AttentionKernelArguments& a) const {
    return index < a.batch && s.len_k >= 0 && s.len_k <= a.most_keys;
  }
  BERTKERN_DEVICE int head(const AttentionKernelArguments& a, int step) const {
    return key_head * a.group + step / tiles;
  }
  BERTKERN_DEVICE int first_query(int step) const { return step % tiles * Tile::kRows; }
  // Whether rows of k are to be zeroed: dq sums over all keys.
  BERTKERN_DEVICE bool clears_keys(const AttentionKernelArguments& a) const {
    return has_foreign_keys(a, s.len_k, Tile::kRows);
  }
  // Whether rows of queries are: dk and dv sum over all of a tile. A query that sees nothing has ds
  // 0 and may hold NaN; it is left out as a row of no sequence is.
  BERTKERN_DEVICE bool clears_queries(const AttentionKernelArguments& a, int first_q) const {
    return a.key_padding_mask != nullptr || s.high < 0 || s.len_q - 1 + s.low >= s.len_k ||
           (a.cu_seqlens_q != nullptr && first_q + Tile::kRows > s.len_q);
  }
};

// How many of them there are. The rows behind the last sequence of a varlen batch are one more,
// unless a launch for longer sequences sees to them.
template <typename Tile>
BERTKERN_DEVICE int short_keys(const AttentionKernelArguments& a) {
  const bool behind = a.cu_seqlens_q != nullptr && a.seqlen_k <= Tile::kRows;
  return (a.batch + (behind ? 1 : 0)) * a.key_heads;
}

template <typename Tile>
BERTKERN_DEVICE void produce_short(const AttentionBwdArguments& arguments,
                                   const BwdShortMemory<Tile>& memory) {
  constexpr int kRows = Tile::kRows;
  const AttentionKernelArguments& a = arguments.a;
  BwdShortSignals<Tile>& signals = *memory.signals;
  const ptx::CachePolicy once = ptx::cache_briefly();
  Stage<Tile::kStages> keys_stage, stage;
  for (int round = 0; number_in_round(round) < short_keys<Tile>(a); ++round) {
    const ShortKeys<Tile> own(a, number_in_round(round));
    if (own.steps <= 0) continue;
    const Sequence& s = own.s;
    const int batch = a.cu_seqlens_q != nullptr ? 0 : own.index;
    ptx::barrier_wait(&signals.keys_empty[keys_stage.index], keys_stage.parity ^ 1);
    if (ptx::elect_one()) {
      ptx::Barrier* full = own.clears_keys(a) ? &signals.keys_landed[keys_stage.index]
                                              : &signals.keys_full[keys_stage.index];
      const int first = static_cast<int>(s.first_k), at = keys_stage.index * Tile::kRowsBytes;
      ptx::barrier_arrive_expect_bytes(full, 2 * Tile::kRowsBytes);
      load_tile<Tile, kRows>(memory.k + at, arguments.k, own.key_head, first, batch, full, once);
      load_tile<Tile, kRows>(memory.v + at, arguments.v, own.key_head, first, batch, full, once);
    }
    keys_stage.advance();
#pragma unroll 1
    for (int step = 0; step < own.steps; ++step, stage.advance()) {
      const int head = own.head(a, step), first_q = own.first_query(step);
      ptx::barrier_wait(&signals.empty[stage.index], stage.parity ^ 1);
      if (ptx::elect_one()) {
        ptx::Barrier* full = own.clears_queries(a, first_q) ? &signals.landed[stage.index]
                                                            : &signals.full[stage.index];
        const int first = static_cast<int>(s.first_q) + first_q;
        const int at = stage.index * Tile::kRowsBytes;
        signals.steps[stage.index] = {s,       own.index, head,
                                      first_q, step == 0, step == own.steps - 1};
        ptx::barrier_arrive_expect_bytes(full, 2 * Tile::kRowsBytes);
        load_tile<Tile, kRows>(memory.q + at, arguments.q, head, first, batch, full, once);
        load_tile<Tile, kRows>(memory.dout + at, arguments.dout, head, first, batch, full, once);
      }
    }
  }
  ptx::barrier_wait(&signals.empty[stage.index], stage.parity ^ 1);
  if (ptx::elect_one()) {
    signals.steps[stage.index].head = -1;
    ptx::barrier_arrive(&signals.full[stage.index]);
  }
}

template <typename Tile>
BERTKERN_DEVICE void clean_short(const AttentionKernelArguments& a,
                                 const BwdShortMemory<Tile>& memory) {
  constexpr int kRows = Tile::kRows;
  BwdShortSignals<Tile>& signals = *memory.signals;
  Stage<Tile::kStages> keys_stage, stage;
  uint32_t keys_parities = 0, parities = 0;  // of what has landed, a bit for each stage
  for (int round = 0; number_in_round(round) < short_keys<Tile>(a); ++round) {
    const ShortKeys<Tile> own(a, number_in_round(round));
    if (own.steps <= 0) continue;
    const Sequence& s = own.s;
    if (own.clears_keys(a)) {
      ptx::barrier_wait(&signals.keys_landed[keys_stage.index],
                        (keys_parities >> keys_stage.index) & 1);
      keys_parities ^= 1u << keys_stage.index;
      clear_foreign_keys<Tile, kRows>(memory.k + keys_stage.index * Tile::kRowsBytes,
                                      kept_keys(a, own.index), s.len_k, 0);
      arrive_as_warp(&signals.keys_full[keys_stage.index]);
    }
    keys_stage.advance();
#pragma unroll 1
    for (int step = 0; step < own.steps; ++step, stage.advance()) {
      const int first_q = own.first_query(step);
      if (!own.clears_queries(a, first_q)) continue;
      const float* lse = a.lse + lse_offset(a, own.index, s.first_q, own.head(a, step));
      ptx::barrier_wait(&signals.landed[stage.index], (parities >> stage.index) & 1);
      parities ^= 1u << stage.index;
      const auto clears = [&](int row) {
        const int i = first_q + row;
        return i >= s.len_q || lse[i] == -kInfinity;
      };
      clear_rows<Tile, kRows>(memory.q + stage.index * Tile::kRowsBytes, clears);
      clear_rows<Tile, kRows>(memory.dout + stage.index * Tile::kRowsBytes, clears);
      arrive_as_warp(&signals.full[stage.index]);
    }
  }
}

// Gradients where there is nothing to sum, by warp `warp` of `warps`.
template <typename T, typename Tile>
BERTKERN_DEVICE void zero_short(const AttentionKernelArguments& a, int warp, int warps) {
  const int thread = warp * ptx::kWarpThreads + lane_index(), threads = warps * ptx::kWarpThreads;
  for (int round = 0; number_in_round(round) < short_keys<Tile>(a); ++round) {
    const ShortKeys<Tile> own(a, number_in_round(round));
    const Sequence& s = own.s;
    const bool behind = own.index == a.batch;
    if (!behind && !own.is_own(a)) continue;
    const auto zero_keys = [&](int64_t first, int64_t end) {
      zero_share(head_rows<T>(a.dk, own.index, s.first_k, own.key_head), a.dk.token, first, end,
                 a.head_dim, thread, threads);
      zero_share(head_rows<T>(a.dv, own.index, s.first_k, own.key_head), a.dv.token, first, end,
                 a.head_dim, thread, threads);
    };
    if (behind || s.len_q == 0) zero_keys(0, s.len_k);
    if (!behind && a.cu_seqlens_k == nullptr) zero_keys(s.len_k, a.seqlen_k);
    for (int h = 0; (behind || s.len_k == 0) && h < a.group; ++h) {
      zero_share(head_rows<T>(a.dq, own.index, s.first_q, own.key_head * a.group + h), a.dq.token,
                 0, s.len_q, a.head_dim, thread, threads);
    }
  }
}

// A warp's 16 queries by all keys: of the products q kᵀ in `p` and dout vᵀ in `dp`, p with its mask
// is stored, rounded to T (for dv, without dropout's scale), and dp becomes ds. rows.delta comes as
// -dlse; Σ p dp of that very dp is added: where a query sees few keys the two are almost equal, and
// a sum over the rounded `out` would be all that is left of ds. store(n, words): of the fragments n
// and n + 1.
template <typename T, AttentionVariant kVariant, int kTiles, typename Store>
BERTKERN_DEVICE void weigh_rows(float (&p)[kTiles][4], float (&dp)[kTiles][4], QueryRows& rows,
                                const AttentionKernelArguments& a, const Sequence& s,
                                const uint8_t* kept, bool whole, int first_q, Store store) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      p[n][e] = ptx::exp2(ptx::fma(p[n][e], a.scale * kLog2e, -rows.lse[e / 2]));
    }
  }
  if (!whole) {
    // Chosen, not multiplied by 0: what is not seen may be NaN.
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = first_q + g + 8 * (e / 2), j = 8 * n + 2 * t + e % 2;
        if (!(i < s.len_q && sees(s, kept, i, j))) p[n][e] = dp[n][e] = 0.0f;
      }
    }
  }
  float sums[2] = {};
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    float kept_p[2][4];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      bool keep[2][2];
      if (has_dropout<kVariant>(a)) {
        kept_scores(rows.keys, 8 * n + 2 * t + e, a.dropout_threshold, keep);
      }
#pragma unroll
      for (int high = 0; high < 2; ++high) {
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const int at = 2 * high + e;
          const float x = p[n + next][at];
          float& y = dp[n + next][at];
          kept_p[next][at] = x;
          if (has_dropout<kVariant>(a)) {
            y = keep[high][next] ? y : 0.0f;
            kept_p[next][at] = keep[high][next] ? x : 0.0f;
          }
          sums[high] = ptx::fma(x, y, sums[high]);
        }
      }
    }
    uint32_t words[4];
    to_left<T>(words, kept_p[0], kept_p[1]);
    store(n, words);
  }
  const float scale = kVariant == AttentionVariant::kPlain ? 1.0f : a.dropout_scale;
  rows.delta[0] += scale * sum_of_row(sums[0]);
  rows.delta[1] += scale * sum_of_row(sums[1]);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dp[n][e] = ptx::fma(dp[n][e], scale, -rows.delta[e / 2]);
  }
  if (!whole) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (p[n][e] == 0.0f) dp[n][e] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dp[n][e] *= p[n][e];
  }
}

// Starts acc [64 keys x kHeadDim] (+)= scoresᵀ · right: the warpgroup's keys of p or ds, and a tile
// of as many rows as they have.
template <typename T, typename Tile, int kTiles>
BERTKERN_DEVICE void multiply_by_key(float (&acc)[kTiles][4], MatrixDescriptor scores,
                                     MatrixDescriptor right, bool accumulate) {
#pragma unroll
  for (int k = 0; k < Tile::kRows / 16; ++k) {
    ptx::wgmma<true, true>(acc, advance(scores, k * 16 * 128),
                           advance(right, k * 16 * Tile::kSpanBytes), accumulate || k > 0, T{});
  }
}

template <typename T, typename Tile, AttentionVariant kVariant>
BERTKERN_DEVICE void consume_short(const AttentionKernelArguments& a,
                                   const BwdShortMemory<Tile>& memory) {
  constexpr int kKeys = Tile::kRows, kTiles = kKeys / 8, kHeadTiles = Tile::kHeadDim / 8;
  constexpr int kThreads = 128 * Tile::kWarpgroups;
  using Memory = BwdShortMemory<Tile>;
  BwdShortSignals<Tile>& signals = *memory.signals;
  const int warp = of_warp(warp_index()), group = warp / 4, row = warp * 16;
  const int lane = lane_index();
  const MatrixDescriptor p_left =
      ptx::describe_tile<Swizzle::k128, 0, 1024>(memory.p + group * Memory::kScoresPart);
  const MatrixDescriptor ds_left =
      ptx::describe_tile<Swizzle::k128, 0, 1024>(memory.ds + group * Memory::kScoresPart);
  // Where the lane's chunk of fragments n and n + 1 is, of p or ds: chunk n + lane / 16 of its row,
  // whose lowest bit is the lane's, so that the others come to it by xor under the swizzle, too.
  const int own_chunk = swizzled((row + lane % 16) * 128 + lane / 16 * 16, Swizzle::k128);
  const auto at_scores = [&](int n) {
    return n / 8 * Memory::kScoresPart + (own_chunk ^ (n % 8 * 16));
  };
  const auto store = [&](const float (&acc)[kHeadTiles][4], const DeviceTensor& tensor, int index,
                         int64_t first, int head, int first_row, int end) {
    store_rows<T, Tile, Tile::kRows>(acc, memory.out, row, head_rows<T>(tensor, index, first, head),
                                     tensor.token, first_row, end, a.head_dim);
  };
  float dk[kHeadTiles][4], dv[kHeadTiles][4];
  Stage<Tile::kStages> keys_stage, stage;
  for (;; stage.advance()) {
    ptx::barrier_wait(&signals.full[stage.index], stage.parity);
    const int head = of_warp(signals.steps[stage.index].head);
    if (head < 0) return;
    const ShortStep step = signals.steps[stage.index];
    const Sequence& s = step.s;
    const uint8_t* kept = kept_keys(a, step.index);
    const int first_row = step.first_q + row, g = lane / 4;
    ptx::barrier_wait(&signals.keys_full[keys_stage.index], keys_stage.parity);
    const char* k = memory.k + keys_stage.index * Tile::kRowsBytes;
    const char* v = memory.v + keys_stage.index * Tile::kRowsBytes;
    const char* q = memory.q + stage.index * Tile::kRowsBytes;
    const char* dout = memory.dout + stage.index * Tile::kRowsBytes;
    float p[kTiles][4], dp[kTiles][4];
    ptx::wgmma_fence(p, dp);
    multiply_transposed<T, Tile, Tile::kRows>(
        p, describe_rows<Tile>(q + group * 64 * Tile::kSpanBytes), describe_rows<Tile>(k));
    multiply_transposed<T, Tile, Tile::kRows>(
        dp, describe_rows<Tile>(dout + group * 64 * Tile::kSpanBytes), describe_rows<Tile>(v));
    ptx::wgmma_commit();

    QueryRows rows;
    const int64_t at_lse = lse_offset(a, step.index, s.first_q, head);
    if (has_dropout<kVariant>(a)) {
      rows.keys =
          dropout_row(dropout_stream_of(a, step.index, head), static_cast<uint32_t>(first_row + g));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first_row + g + 8 * half;
      const int inside = i < s.len_q ? i : s.len_q - 1;
      const float dlse = a.dlse != nullptr ? a.dlse[at_lse + inside] : 0.0f;
      rows.set(half, i < s.len_q, a.lse[at_lse + inside], -dlse, kLog2e);
    }
    ptx::wgmma_wait<0>(p, dp);
    // The others are through with p and ds of the step before.
    ptx::named_barrier_sync(kConsumersBarrier, kThreads);

    // Rows behind the last query are zeros: against an infinite key they would give NaN.
    const bool whole = step.first_q + Tile::kRows <= s.len_q &&
                       sees_all(s, kept, step.first_q, step.first_q + Tile::kRows, 0, kKeys);
    weigh_rows<T, kVariant>(p, dp, rows, a, s, kept, whole, first_row,
                            [&](int n, const uint32_t (&words)[4]) {
                              ptx::store_matrix_4(memory.p + at_scores(n), words);
                            });
    uint32_t ds[kTiles / 2][4];
    to_left<T>(ds, dp);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) ptx::store_matrix_4(memory.ds + at_scores(n), ds[n / 2]);
    ptx::fence_async_shared();
    ptx::named_barrier_sync(kConsumersBarrier, kThreads);

    float dq[kHeadTiles][4];
    ptx::wgmma_fence(dq, ds);
    multiply<T, Tile>(dq, ds, describe_transposed<Tile, Tile::kRows>(k), false);
    ptx::wgmma_commit();
    ptx::wgmma_fence(dv, dk);
    multiply_by_key<T, Tile>(dv, p_left, describe_transposed<Tile, Tile::kRows>(dout),
                             !step.is_first);
    multiply_by_key<T, Tile>(dk, ds_left, describe_transposed<Tile, Tile::kRows>(q),
                             !step.is_first);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>(dq, ds);
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dq[n][e] *= a.scale;
    }
    store(dq, a.dq, step.index, s.first_q, head, first_row, s.len_q);
    ptx::wgmma_wait<0>(dv, dk);
    arrive_as_warp(&signals.empty[stage.index]);
    if (!step.is_last) continue;
    arrive_as_warp(&signals.keys_empty[keys_stage.index]);
    keys_stage.advance();
    const float dv_scale = kVariant == AttentionVariant::kPlain ? 1.0f : a.dropout_scale;
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dk[n][e] *= a.scale;
        dv[n][e] *= dv_scale;
      }
    }
    const int key_head = key_head_of(a, head);
    store(dk, a.dk, step.index, s.first_k, key_head, row, s.len_k);
    store(dv, a.dv, step.index, s.first_k, key_head, row, s.len_k);
  }
}

template <typename T, typename Tile, AttentionVariant kVariant>
BERTKERN_KERNEL(Tile::kThreads)
attention_bwd_short_kernel(BERTKERN_GRID_CONSTANT AttentionBwdArguments arguments) {
  const auto memory = BwdShortMemory<Tile>::get();
  memory.signals->begin();
  const int warp = warp_index() - 4 * Tile::kWarpgroups;
  if (warp < 0) {
    ptx::raise_registers<Tile::kConsumerRegisters>();
    consume_short<T, Tile, kVariant>(arguments.a, memory);
  } else {
    ptx::lower_registers<Tile::kProducerRegisters>();
    if (warp == 0) produce_short<Tile>(arguments, memory);
    if (warp == 1) clean_short<Tile>(arguments.a, memory);
    if (warp > 1) zero_short<T, Tile>(arguments.a, warp - 2, 2);
  }
}

}  // namespace bertkern::sm90
