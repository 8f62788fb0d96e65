// Attention backward on Hopper, the part that owns queries: dq and delta, for sequences whose keys
// do not fit one tile. As sm80's, with the same sums in the same order: no atomics.
//
// A block owns 128 queries of one head, a warpgroup 64 of them, and walks over the keys, of which
// one warp has the copy engine bring tiles. ds is the left operand of the sum for dq as it stands
// in registers.
#pragma once

#include "cuda/sm90/attention_bwd.cuh"

namespace bertkern::sm90 {

// The block's shared memory. Tiles start on multiples of 1024, as the swizzle asks for.
template <typename Tile>
struct BwdQueriesMemory {
  static constexpr int kDout = Tile::kRowsBytes;
  static constexpr int kK = kDout + Tile::kRowsBytes;
  static constexpr int kV = kK + Tile::kStages * Tile::kColumnsBytes;
  static constexpr int kSignals = kV + Tile::kStages * Tile::kColumnsBytes;
  static constexpr int kBytes = kSignals + static_cast<int>(sizeof(AttentionBwdSignals<Tile>));
  static_assert(kBytes <= kHopperSharedLimit, "more shared memory than a block can have");

  char *q, *dout, *k, *v;
  AttentionBwdSignals<Tile>* signals;

  BERTKERN_DEVICE static BwdQueriesMemory get() {
    char* start = ptx::shared_memory();
    return {start, start + kDout, start + kK, start + kV,
            reinterpret_cast<AttentionBwdSignals<Tile>*>(start + kSignals)};
  }
};

template <typename Tile>
BERTKERN_DEVICE void produce_keys(const AttentionBwdArguments& arguments, const QueryTile& own,
                                  const BwdQueriesMemory<Tile>& memory) {
  constexpr int kKeys = Tile::kColumns;
  const AttentionKernelArguments& a = arguments.a;
  const Sequence& s = own.s;
  AttentionBwdSignals<Tile>& signals = *memory.signals;
  const int batch = a.cu_seqlens_q != nullptr ? 0 : own.index;
  const int key_head = key_head_of(a, own.head);
  const uint8_t* kept = kept_keys(a, own.index);
  const ptx::CachePolicy once = ptx::cache_briefly(), again = ptx::cache_normally();
  if (ptx::elect_one()) {
    const int first = static_cast<int>(s.first_q) + own.first_q;
    ptx::barrier_arrive_expect_bytes(&signals.own_full, 2 * Tile::kRowsBytes);
    load_tile<Tile, Tile::kRows>(memory.q, arguments.q, own.head, first, batch, &signals.own_full,
                                 once);
    load_tile<Tile, Tile::kRows>(memory.dout, arguments.dout, own.head, first, batch,
                                 &signals.own_full, once);
  }
  int landed = 0;  // parity
  Stage<Tile::kStages> stage;
  for (int tile = own.first_tile; tile < own.end_tile; ++tile, stage.advance()) {
    const int first_k = tile * kKeys;
    char* k = memory.k + stage.index * Tile::kColumnsBytes;
    char* v = memory.v + stage.index * Tile::kColumnsBytes;
    // dq sums over all keys of a tile.
    const bool clear = has_foreign_keys(a, s.len_k, first_k + kKeys);
    ptx::barrier_wait(&signals.empty[stage.index], stage.parity ^ 1);
    if (ptx::elect_one()) {
      ptx::Barrier* counts = clear ? &signals.landed : &signals.full[stage.index];
      const int first = static_cast<int>(s.first_k) + first_k;
      ptx::barrier_arrive_expect_bytes(counts, 2 * Tile::kColumnsBytes);
      load_tile<Tile, kKeys>(k, arguments.k, key_head, first, batch, counts, again);
      load_tile<Tile, kKeys>(v, arguments.v, key_head, first, batch, counts, again);
    }
    if (!clear) continue;
    ptx::barrier_wait(&signals.landed, landed);
    landed ^= 1;
    clear_foreign_keys<Tile, kKeys>(k, kept, s.len_k, first_k);
    arrive_as_warp(&signals.full[stage.index]);
  }
}

template <typename T, typename Tile, AttentionVariant kVariant>
BERTKERN_DEVICE void consume_keys(const AttentionKernelArguments& a, const QueryTile& own,
                                  const BwdQueriesMemory<Tile>& memory) {
  constexpr bool kGeneral = kVariant == AttentionVariant::kGeneral;
  constexpr int kKeys = Tile::kColumns, kTiles = kKeys / 8, kHeadTiles = Tile::kHeadDim / 8;
  const Sequence& s = own.s;
  const int index = own.index, head = own.head;
  AttentionBwdSignals<Tile>& signals = *memory.signals;
  const uint8_t* kept = kept_keys(a, index);
  const int warp = of_warp(warp_index()), group = warp / 4, first_row = own.first_q + warp * 16;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const bool all_keys = own.end_tile - own.first_tile == 1;
  const int64_t at_lse = lse_offset(a, index, s.first_q, head);
  QueryRows rows;
  if (has_dropout<kVariant>(a)) {
    rows.keys =
        dropout_row(dropout_stream_of(a, index, head), static_cast<uint32_t>(first_row + g));
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = first_row + g + 8 * half;
    const int inside = i < s.len_q ? i : s.len_q - 1;  // all lanes take part in the sum
    float delta = 0.0f;
    if (!all_keys) {
      const T* row = head_rows<const T>(a.dout, index, s.first_q, head) + inside * a.dout.token;
      delta = delta_of_row<T, Tile::kHeadDim, kVariant>(a, own, inside, rows.keys, [&](int chunk) {
        return ptx::load_global_16(row + chunk * 8);
      });
    }
    if (a.dlse != nullptr) delta -= a.dlse[at_lse + inside];
    rows.set(half, i < s.len_q, a.lse[at_lse + inside], delta, kGeneral ? 1.0f : kLog2e);
  }
  const ScoreOptions options = kGeneral ? score_options<T>(a, index, head) : ScoreOptions{};
  const MatrixDescriptor q = describe_rows<Tile>(memory.q + group * 64 * Tile::kSpanBytes);
  const MatrixDescriptor dout = describe_rows<Tile>(memory.dout + group * 64 * Tile::kSpanBytes);
  float dq[kHeadTiles][4] = {};
  ptx::barrier_wait(&signals.own_full, 0);

  Stage<Tile::kStages> stage;
  for (int tile = own.first_tile; tile < own.end_tile; ++tile, stage.advance()) {
    const int first_k = tile * kKeys;
    const char* k = memory.k + stage.index * Tile::kColumnsBytes;
    const char* v = memory.v + stage.index * Tile::kColumnsBytes;
    float p[kTiles][4], dp[kTiles][4];
    ptx::barrier_wait(&signals.full[stage.index], stage.parity);
    ptx::wgmma_fence(p, dp);
    multiply_transposed<T, Tile, Tile::kRows>(p, q, describe_rows<Tile>(k));
    multiply_transposed<T, Tile, Tile::kRows>(dp, dout, describe_rows<Tile>(v));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(p, dp);
    const bool whole = sees_all(s, kept, own.first_q, own.end_q, first_k, first_k + kKeys);
    gradients_of_scores<T, kVariant, true>(p, dp, rows, a, s, kept, whole, all_keys, options,
                                           first_row, first_k);
    uint32_t ds[kKeys / 16][4];
    to_left<T>(ds, p);
    ptx::wgmma_fence(dq, ds);
    multiply<T, Tile>(dq, ds, describe_transposed<Tile, kKeys>(k));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(dq, ds);
    arrive_as_warp(&signals.empty[stage.index]);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = first_row + g + 8 * half;
    if (t == 0 && i < s.len_q) a.delta[at_lse + i] = rows.delta[half];
  }
#pragma unroll
  for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dq[n][e] *= a.scale;
  }
  // Nobody reads the tile of q any more.
  ptx::named_barrier_sync(kConsumersBarrier, 128 * Tile::kWarpgroups);
  store_rows<T, Tile, Tile::kRows>(dq, memory.q, warp * 16,
                                   head_rows<T>(a.dq, index, s.first_q, head), a.dq.token,
                                   first_row, s.len_q, a.head_dim);
}

template <typename T, typename Tile, AttentionVariant kVariant>
BERTKERN_KERNEL(Tile::kThreads)
attention_bwd_queries_kernel(BERTKERN_GRID_CONSTANT AttentionBwdArguments arguments) {
  const AttentionKernelArguments& a = arguments.a;
  // The longest rows of a causal matrix come first, so that the last blocks to start are short
  // ones.
  const int block = ptx::block_index(), pair = block / a.blocks;
  const QueryTile own = query_tile<Tile::kRows, Tile::kColumns>(
      a, sequence_in_turn(a, pair / a.heads), pair % a.heads, a.blocks - 1 - block % a.blocks);
  const Sequence& s = own.s;
  if (own.index == a.batch) {  // rows behind the last sequence of a varlen batch
    zero_rows<T, Tile::kThreads>(head_rows<T>(a.dq, 0, s.first_q, own.head), a.dq.token, 0, s.len_q,
                                 a.head_dim, own.first_q / Tile::kRows, a.blocks);
    return;
  }
  if (own.first_q >= own.end_q || s.len_k < a.least_keys) return;

  const auto memory = BwdQueriesMemory<Tile>::get();
  memory.signals->begin();
  const int warp = warp_index() - 4 * Tile::kWarpgroups;
  if (warp < 0) {
    ptx::raise_registers<Tile::kConsumerRegisters>();
    consume_keys<T, Tile, kVariant>(a, own, memory);
  } else {
    ptx::lower_registers<Tile::kProducerRegisters>();
    if (warp == 0) produce_keys<Tile>(arguments, own, memory);
  }
}

}  // namespace bertkern::sm90
