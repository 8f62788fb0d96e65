// Attention forward on Hopper: out = dropout(softmax(score(q kᵀ))) v and lse, as sm80's, with the
// roles apart (Shah et al. 2024, FlashAttention-3):
//
//   producer   a warp that finds the block's tiles of queries and has the copy engine bring q, k, v
//   cleaner    a warp that zeroes rows of v which no query may see: what stands there may be NaN,
//              and 0 · NaN would not be 0 (in k the score is replaced, so there it does not matter)
//   consumers  warpgroups with 64 queries each. While a tile of scores becomes probabilities, the
//              product of the tile before with v runs; and the products of one warpgroup run while
//              the other one makes exponentials: they take turns by named barriers.
//
//   m' = max(m, max_j s_ij),  p_ij = exp(s_ij - m'),  sum' = sum · exp(m - m') + Σ_j p_ij,
//   acc' = acc · exp(m - m') + p v,   at the end out = acc / sum, lse = m + log(sum)
//
// m is left as it is while the maximum has grown by less than kSlack powers of two: then acc keeps
// its factor, and p stays below 2^kSlack, which costs no digit. Each row decides for itself.
#pragma once

#include "cuda/sm90/attention_schedule.cuh"
#include "cuda/sm90/attention_softmax.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "ptx/registers.cuh"

namespace bertkern::sm90 {

struct AttentionFwdArguments {
  TensorMap q, k, v;
  AttentionKernelArguments a;
  AttentionSchedule schedule;
};

constexpr int kQueryStages = 2;

// What the warps of a block tell each other. A barrier named full tells that a tile has come, one
// named empty that all its readers are through with it.
template <typename Tile>
struct AttentionFwdSignals {
  ptx::Barrier q_full[kQueryStages], q_empty[kQueryStages];
  ptx::Barrier k_full[Tile::kStages], k_empty[Tile::kStages];
  ptx::Barrier v_full[Tile::kStages], v_empty[Tile::kStages];
  ptx::Barrier v_landed[Tile::kStages];  // v has come, but is to be cleaned before it is full
  QueryTile queries[kQueryStages];       // comes with q; first_q < 0: no more come
};

// The block's shared memory. Tiles start on multiples of 1024, as the swizzle asks for.
template <typename Tile>
struct AttentionFwdMemory {
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + kQueryStages * Tile::kRowsBytes;
  static constexpr int kV = kK + Tile::kStages * Tile::kColumnsBytes;
  static constexpr int kOut = kV + Tile::kStages * Tile::kColumnsBytes;
  static constexpr int kSignals = kOut + Tile::kRowsBytes;
  static constexpr int kBytes = kSignals + static_cast<int>(sizeof(AttentionFwdSignals<Tile>));
  static_assert(kBytes <= kHopperSharedLimit, "more shared memory than a block can have");

  char* q;
  char* k;
  char* v;
  char* out;
  AttentionFwdSignals<Tile>* signals;

  BERTKERN_DEVICE static AttentionFwdMemory get() {
    char* start = ptx::shared_memory();
    return {start + kQ, start + kK, start + kV, start + kOut,
            reinterpret_cast<AttentionFwdSignals<Tile>*>(start + kSignals)};
  }
};

template <typename Tile>
BERTKERN_DEVICE void produce(const AttentionFwdArguments& arguments,
                             const AttentionFwdMemory<Tile>& memory) {
  const AttentionKernelArguments& a = arguments.a;
  AttentionFwdSignals<Tile>& signals = *memory.signals;
  if (ptx::elect_one()) {
    ptx::tma_prefetch(arguments.q);
    ptx::tma_prefetch(arguments.k);
    ptx::tma_prefetch(arguments.v);
  }
  // k and v are read again by blocks with other queries of the head.
  const ptx::CachePolicy once = ptx::cache_briefly(), again = ptx::cache_normally();
  QueryTiles<Tile::kRows, Tile::kColumns> tiles(a, arguments.schedule);
  Stage<kQueryStages> q_stage;
  Stage<Tile::kStages> stage;
  QueryTile queries;
  for (; tiles.next(queries); q_stage.advance()) {
    ptx::barrier_wait(&signals.q_empty[q_stage.index], q_stage.parity ^ 1);
    const int batch = a.cu_seqlens_q != nullptr ? 0 : queries.index;
    const bool any = queries.first_tile < queries.end_tile;
    if (ptx::elect_one()) {
      ptx::Barrier* full = &signals.q_full[q_stage.index];
      signals.queries[q_stage.index] = queries;
      if (any) {
        ptx::barrier_arrive_expect_bytes(full, Tile::kRowsBytes);
        load_tile<Tile, Tile::kRows>(
            memory.q + q_stage.index * Tile::kRowsBytes, arguments.q, queries.head,
            static_cast<int>(queries.s.first_q) + queries.first_q, batch, full, once);
      } else {
        ptx::barrier_arrive(full);
      }
    }
    if (!any) continue;
    const int head = key_head_of(a, queries.head), first = static_cast<int>(queries.s.first_k);
#pragma unroll 1
    for (int tile = queries.first_tile; tile < queries.end_tile; ++tile, stage.advance()) {
      const int first_k = tile * Tile::kColumns, at = stage.index * Tile::kColumnsBytes;
      ptx::barrier_wait(&signals.k_empty[stage.index], stage.parity ^ 1);
      if (ptx::elect_one()) {
        ptx::Barrier* full = &signals.k_full[stage.index];
        ptx::barrier_arrive_expect_bytes(full, Tile::kColumnsBytes);
        load_tile<Tile, Tile::kColumns>(memory.k + at, arguments.k, head, first + first_k, batch,
                                        full, again);
      }
      ptx::barrier_wait(&signals.v_empty[stage.index], stage.parity ^ 1);
      if (ptx::elect_one()) {
        ptx::Barrier* full = has_foreign_keys(a, queries.s.len_k, first_k + Tile::kColumns)
                                 ? &signals.v_landed[stage.index]
                                 : &signals.v_full[stage.index];
        ptx::barrier_arrive_expect_bytes(full, Tile::kColumnsBytes);
        load_tile<Tile, Tile::kColumns>(memory.v + at, arguments.v, head, first + first_k, batch,
                                        full, again);
      }
    }
  }
  ptx::barrier_wait(&signals.q_empty[q_stage.index], q_stage.parity ^ 1);
  if (ptx::elect_one()) {
    queries = {};
    queries.first_q = -1;
    signals.queries[q_stage.index] = queries;
    ptx::barrier_arrive(&signals.q_full[q_stage.index]);
  }
}

template <typename Tile>
BERTKERN_DEVICE void clean(const AttentionKernelArguments& a,
                           const AttentionFwdMemory<Tile>& memory) {
  AttentionFwdSignals<Tile>& signals = *memory.signals;
  Stage<kQueryStages> q_stage;
  Stage<Tile::kStages> stage;
  uint32_t parities = 0;  // of v_landed, a bit for each stage
  for (;; q_stage.advance()) {
    ptx::barrier_wait(&signals.q_full[q_stage.index], q_stage.parity);
    const QueryTile queries = signals.queries[q_stage.index];
    arrive_as_warp(&signals.q_empty[q_stage.index]);
    if (queries.first_q < 0) return;
    const uint8_t* kept = kept_keys(a, queries.index);
    const int len_k = queries.s.len_k;
    for (int tile = queries.first_tile; tile < queries.end_tile; ++tile, stage.advance()) {
      const int first_k = tile * Tile::kColumns;
      if (!has_foreign_keys(a, len_k, first_k + Tile::kColumns)) continue;
      ptx::barrier_wait(&signals.v_landed[stage.index], (parities >> stage.index) & 1);
      parities ^= 1u << stage.index;
      clear_foreign_keys<Tile, Tile::kColumns>(memory.v + stage.index * Tile::kColumnsBytes, kept,
                                               len_k, first_k);
      arrive_as_warp(&signals.v_full[stage.index]);
    }
  }
}

// The warpgroups take turns at starting products. Group 0 has the first turn.
template <typename Tile>
struct Turns {
  static constexpr bool kTaken = Tile::kWarpgroups == 2;
  static constexpr int kThreads = 256;
  int group;

  BERTKERN_DEVICE void begin() const {
    if (kTaken && group == 1) ptx::named_barrier_arrive(1, kThreads);
  }
  BERTKERN_DEVICE void wait() const {
    if (kTaken) ptx::named_barrier_sync(1 + group, kThreads);
  }
  BERTKERN_DEVICE void pass_on() const {
    if (kTaken) ptx::named_barrier_arrive(2 - group, kThreads);
  }
  BERTKERN_DEVICE void end() const {
    if (kTaken && group == 0) wait();
  }
};

// Of the 16 rows of a warp: out = acc / sum and lse, or 0 and -Inf where the sum is 0.
template <typename T, typename Tile, AttentionVariant kVariant>
BERTKERN_DEVICE void store_out(const AttentionKernelArguments& a, const QueryTile& queries,
                               float (&acc)[Tile::kHeadDim / 8][4], const RunningRows& rows,
                               char* tile) {
  constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  const Sequence& s = queries.s;
  const int row = warp_index() * 16, first_row = queries.first_q + row;
  float* lse = a.lse + lse_offset(a, queries.index, s.first_q, queries.head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = sum_of_row(rows.sum[half]);
    const int i = first_row + lane_index() / 4 + 8 * half;
    if (lane_index() % 4 == 0 && i < s.len_q) {
      const float scale = kGeneral ? 1.0f : a.scale;
      const float lse_i = ptx::fma(rows.maximum[half], scale, natural_log(total));
      lse[i] = total == 0.0f ? -kInfinity : lse_i;
    }
    float factor = total == 0.0f ? 0.0f : 1.0f / total;
    if (kVariant != AttentionVariant::kPlain) factor *= a.dropout_scale;
#pragma unroll
    for (int n = 0; n < Tile::kHeadDim / 8; ++n) {
      acc[n][2 * half] *= factor;
      acc[n][2 * half + 1] *= factor;
    }
  }
  store_rows<T, Tile, Tile::kRows>(acc, tile, row,
                                   head_rows<T>(a.out, queries.index, s.first_q, queries.head),
                                   a.out.token, first_row, s.len_q, a.head_dim);
}

// The same for queries that see no key at all.
template <typename T, typename Tile>
BERTKERN_DEVICE void store_nothing(const AttentionKernelArguments& a, const QueryTile& queries) {
  const Sequence& s = queries.s;
  const int first = queries.first_q + warp_index() * 16;
  const int end = first + 16 < s.len_q ? first + 16 : s.len_q;
  float* lse = a.lse + lse_offset(a, queries.index, s.first_q, queries.head);
  T* out = head_rows<T>(a.out, queries.index, s.first_q, queries.head);
  if (first + lane_index() < end) lse[first + lane_index()] = -kInfinity;
  const int chunks = a.head_dim / 8;
  for (int at = lane_index(); at < (end - first) * chunks; at += ptx::kWarpThreads) {
    ptx::store_global_16(out + (first + at / chunks) * a.out.token + at % chunks * 8,
                         {{0, 0, 0, 0}});
  }
}

// Queries as left operands: in registers where these suffice, which spares reading them from shared
// memory with each tile of keys.
template <typename T, typename Tile>
struct OwnQueries {
  static constexpr bool kHeld = Tile::kHeadDim <= 96;
  MatrixDescriptor tile;
  uint32_t held[kHeld ? Tile::kHeadDim / 16 : 1][4];

  // When the tile has come. Whether nothing will read it any more.
  BERTKERN_DEVICE bool take(const char* q) {
    if constexpr (kHeld) {
      load_left<Tile, Tile::kRows>(held, q, warp_index() * 16);
      ptx::fence_async_shared();
    } else {
      tile = describe_rows<Tile>(q + of_warp(warp_index() / 4) * 64 * Tile::kSpanBytes);
    }
    return kHeld;
  }

  template <int kTiles>
  BERTKERN_DEVICE void start_scores(float (&scores)[kTiles][4], MatrixDescriptor k) {
    if constexpr (kHeld) {
      ptx::wgmma_fence(scores, held);
      multiply_transposed<T, Tile>(scores, held, k);
    } else {
      ptx::wgmma_fence(scores);
      multiply_transposed<T, Tile, Tile::kRows>(scores, tile, k);
    }
    ptx::wgmma_commit();
  }

  // Until they are there; one group that was started after them may still run.
  template <int kTiles>
  BERTKERN_DEVICE void wait_for_scores(float (&scores)[kTiles][4]) {
    if constexpr (kHeld) {
      ptx::wgmma_wait<1>(scores, held);
    } else {
      ptx::wgmma_wait<1>(scores);
    }
  }
};

// A warpgroup's share of the block's tiles. The tiles of keys of all queries are one row of steps:
// a step starts its own scores and the product of the last step's probabilities with v, and while
// this one runs makes probabilities of the scores.
template <typename T, typename Tile, AttentionVariant kVariant>
BERTKERN_DEVICE void consume(const AttentionKernelArguments& a,
                             const AttentionFwdMemory<Tile>& memory) {
  constexpr int kKeys = Tile::kColumns;
  AttentionFwdSignals<Tile>& signals = *memory.signals;
  const int group = of_warp(warp_index() / 4);
  const MatrixDescriptor k_tiles = describe_rows<Tile>(memory.k);
  const MatrixDescriptor v_tiles = describe_transposed<Tile, kKeys>(memory.v);
  const Turns<Tile> turns{group};
  Stage<kQueryStages> q_stage;
  Stage<Tile::kStages> k_stage, v_stage;

  // The next queries that see a key; false: there are none.
  const auto find_queries = [&](QueryTile& found) {
    for (;; q_stage.advance()) {
      ptx::barrier_wait(&signals.q_full[q_stage.index], q_stage.parity);
      found = signals.queries[q_stage.index];
      found.first_tile = of_warp(found.first_tile);
      found.end_tile = of_warp(found.end_tile);
      if (of_warp(found.first_q) < 0) return false;
      if (found.first_tile < found.end_tile) return true;
      arrive_as_warp(&signals.q_empty[q_stage.index]);
      store_nothing<T, Tile>(a, found);
    }
  };

  OwnQueries<T, Tile> q;
  const auto take_queries = [&] {
    if (q.take(memory.q + q_stage.index * Tile::kRowsBytes)) {
      arrive_as_warp(&signals.q_empty[q_stage.index]);
      q_stage.advance();
    }
  };

  QueryTile queries;
  if (!find_queries(queries)) return;
  take_queries();
  TileOptions<T, Tile, kVariant> options(a, queries);
  RunningRows rows;
  float scores[kKeys / 8][4], out[Tile::kHeadDim / 8][4];
  uint32_t p[kKeys / 16][4] = {};
  const auto start_out = [&](bool accumulate) {
    ptx::barrier_wait(&signals.v_full[v_stage.index], v_stage.parity);
    ptx::wgmma_fence(p, out);
    multiply<T, Tile>(out, p, advance(v_tiles, v_stage.index * Tile::kColumnsBytes), accumulate);
    ptx::wgmma_commit();
  };
  const auto release_v = [&] {
    arrive_as_warp(&signals.v_empty[v_stage.index]);
    v_stage.advance();
  };

  // Tiles of the queries in `options` whose probabilities are made. Before the first step there are
  // none: it multiplies zeros with v, which nobody looks at, since the compiler would wait for each
  // product by itself if one of a step could be missing.
  int done = 0, tiles = queries.end_tile - queries.first_tile;
  bool last = false;
  turns.begin();
  for (int tile = queries.first_tile;;) {
    ptx::barrier_wait(&signals.k_full[k_stage.index], k_stage.parity);
    turns.wait();
    q.start_scores(scores, advance(k_tiles, k_stage.index * Tile::kColumnsBytes));
    start_out(done > 1);
    turns.pass_on();
    q.wait_for_scores(scores);
    if (last) {
      ptx::wgmma_wait<0>(out, p);
      release_v();
      store_out<T, Tile, kVariant>(a, options.queries(), out, rows, memory.out);
      options = TileOptions<T, Tile, kVariant>(a, queries);
      rows = RunningRows();
      tiles = queries.end_tile - queries.first_tile;
      done = 0;
    }
    arrive_as_warp(&signals.k_empty[k_stage.index]);
    k_stage.advance();
    options.apply(scores, tile);
    softmax_tile<kVariant, Tile>(scores, rows, options.to_log2(), options.slack());
    options.drop(scores, tile);
    // Two waits, since the assembler moves a wait up over the exponentials, but not over a branch.
    // All warps of the warpgroup come to the same one. The first product's sums are of no queries.
    if (done > 0) {
      ptx::wgmma_wait<0>(out, p);
      if (rows.corrected) rows.rescale(out);
      release_v();
    } else {
      ptx::wgmma_wait<0>(out, p);
    }
    to_left<T>(p, scores);
    ++tile;
    last = ++done == tiles;
    if (last) {
      if constexpr (!q.kHeld) {
        arrive_as_warp(&signals.q_empty[q_stage.index]);
        q_stage.advance();
      }
      if (!find_queries(queries)) break;
      take_queries();
      tile = queries.first_tile;
    }
  }
  turns.wait();
  start_out(done > 1);
  turns.pass_on();
  ptx::wgmma_wait<0>(out, p);
  store_out<T, Tile, kVariant>(a, options.queries(), out, rows, memory.out);
  turns.end();
}

template <typename T, typename Tile, AttentionVariant kVariant>
BERTKERN_KERNEL(Tile::kThreads)
attention_fwd_kernel(BERTKERN_GRID_CONSTANT AttentionFwdArguments arguments) {
  const auto memory = AttentionFwdMemory<Tile>::get();
  AttentionFwdSignals<Tile>& signals = *memory.signals;
  if (ptx::thread_index() == 0) {
    constexpr int kConsumers = 4 * Tile::kWarpgroups;  // warps
    for (int i = 0; i < kQueryStages; ++i) {
      ptx::barrier_init(&signals.q_full[i], 1);
      ptx::barrier_init(&signals.q_empty[i], kConsumers + 1);
    }
    for (int i = 0; i < Tile::kStages; ++i) {
      ptx::barrier_init(&signals.k_full[i], 1);
      ptx::barrier_init(&signals.k_empty[i], kConsumers);
      ptx::barrier_init(&signals.v_full[i], 1);
      ptx::barrier_init(&signals.v_empty[i], kConsumers);
      ptx::barrier_init(&signals.v_landed[i], 1);
    }
    ptx::barrier_init_fence();
  }
  ptx::block_barrier();
  const int warp = warp_index() - 4 * Tile::kWarpgroups;
  if (warp < 0) {
    ptx::raise_registers<Tile::kConsumerRegisters>();
    consume<T, Tile, kVariant>(arguments.a, memory);
  } else {
    ptx::lower_registers<Tile::kProducerRegisters>();
    if (warp == 0) produce<Tile>(arguments, memory);
    if (warp == 1) clean<Tile>(arguments.a, memory);
  }
}

}  // namespace bertkern::sm90
