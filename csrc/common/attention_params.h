// Arguments of the attention kernels on the device, their tiles, and the table of what is compiled.
//
// B batch, S sequence, T total tokens, H heads, Hk key heads, D head dim; i a query, j a key.
#pragma once

#include <cstdint>

#include "common/shared_tile.h"

namespace bertkern {

// A tensor [B, S, H, D] or [T, H, D] on the device by its strides in elements; the last one is 1.
struct DeviceTensor {
  void* data;
  int64_t batch, token, head;
};

enum class DeviceBias : int { kNone, kMask, kFloat32, kSame };  // kSame: in the tensors' dtype

// A window's side that is open. i + kNoWindow stays an int for all i < 2^30.
constexpr int kNoWindow = 1 << 30;

struct AttentionKernelArguments {
  DeviceTensor q, k, v, out, dout, dq, dk, dv;
  float* lse;         // contiguous [B, H, Sq] or [H, Tq], natural logarithm
  const float* dlse;  // as lse; null: no gradient
  float* delta;       // as lse: sum_d dout · out - dlse
  int64_t lse_batch, lse_head;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [B + 1], or null: batched layout
  const int32_t* key_lengths;                  // [B], or null
  int32_t* order;  // [B], varlen on Hopper: the sequences as blocks take them; null: as they come
  const uint8_t* key_padding_mask;  // [B, Sk], 0 for padding; or null
  DeviceBias bias_kind;
  const void* bias;
  int64_t bias_strides[4];  // batch, head, query, key; 0 where it is broadcast
  void* dbias;              // contiguous [bias_sizes]
  int bias_sizes[4];
  int batch, heads, key_heads, head_dim;
  int group;                 // heads / key_heads: heads of q that read one of k and v
  int seqlen_q, seqlen_k;    // of the batched layout; in varlen the longest
  int64_t total_q, total_k;  // rows of q and of k in varlen
  // Sequences of least_keys to most_keys keys are this launch's; others are another's.
  int least_keys, most_keys;
  int blocks;                     // tiles of one (sequence, head)
  bool bottom_right;              // causal and window count from the bottom right, else top left
  int window_left, window_right;  // kNoWindow: open
  float scale, softcap;           // softcap 0: none
  uint32_t dropout_threshold;     // 0: off
  float dropout_scale;
  const int64_t* dropout_seed;
  int64_t sequence_offset;
};

// What a kernel is compiled for: options that would cost the plain path registers are apart.
//   kPlain: causal, windows, lengths, padding masks, GQA, varlen, scale > 0
//   kDropout: that and dropout
//   kGeneral: that and bias, softcap, any scale; dropout or not
enum class AttentionVariant : int { kPlain, kDropout, kGeneral };

// kHeadDim: D is padded to it with zeros. A warp owns kRowTiles · 16 rows of the tile; kRows rows
// are a block's own, kColumns are walked over at a time, kStages of them in shared memory.
template <int kHeadDim_, int kWarps_, int kRowTiles_, int kColumns_>
struct AttentionTile {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kStages = 2;
  static constexpr int kRowsBytes = kRows * kHeadDim * 2;
  static constexpr int kColumnsBytes = kColumns * kHeadDim * 2;
  static_assert(kHeadDim % 32 == 0, "rows of shared memory are swizzled in units of 64 bytes");
  static_assert(kColumns % 16 == 0, "mma's k is 16, and dropout's bits come for 16 columns");
};

constexpr int kAttentionMaxHeadDim = 128;
constexpr int kAttentionSharedLimit = 99 * 1024;  // what every device from sm_80 on has

// Tiles of the kernels for Hopper. Each of kWarpgroups warpgroups owns 64 rows; kColumns are walked
// over at a time, in kStages of shared memory; one warpgroup more has the copies made. Rows of
// shared memory are cut into parts of one span of the swizzle.
template <int kHeadDim_, int kWarpgroups_, int kColumns_, int kStages_,
          Swizzle kSwizzle_ = kHeadDim_ % 64 == 0 ? Swizzle::k128 : Swizzle::k64,
          int kProducerRegisters_ = kWarpgroups_ == 3 ? 56 : 40>
struct WarpgroupTile {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kStages = kStages_;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr Swizzle kSwizzle = kSwizzle_;
  static constexpr int kSpanBytes = swizzle_span(kSwizzle);
  static constexpr int kSpan = kSpanBytes / 2;  // columns of a part
  static constexpr int kParts = kHeadDim / kSpan;
  static constexpr int kRowsBytes = kRows * kHeadDim * 2;
  static constexpr int kColumnsBytes = kColumns * kHeadDim * 2;
  static constexpr bool kSquare = kRows == kColumns;
  // Of a thread, in steps of 8: at the start 64 K are shared out evenly; setmaxnreg moves them.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kProducerRegisters_;
  static constexpr int kShare =
      (kLaunchRegisters * (kWarpgroups + 1) - kProducerRegisters) / kWarpgroups / 8 * 8;
  static constexpr int kConsumerRegisters = kShare < 248 ? kShare : 248;
  static_assert(kWarpgroups >= 1 && kWarpgroups <= 3, "registers for one to three");
  static_assert(kHeadDim % 32 == 0, "a part is 32 or 64 columns");
  static_assert(kColumns % 32 == 0 && kColumns <= 256, "wgmma's N, and rows of a box");
};

constexpr int kHopperSharedLimit = 227 * 1024;  // what a block can have on sm_90

// By padded head dim (docs/roofline.md). Rows are queries (Fwd, BwdQueries) or keys (BwdShort,
// BwdKeys); BwdShort with square tiles is attention_bwd_short.cuh's, else attention_bwd_keys.cuh's,
// which has two parts at 64 columns, so that each warpgroup has one of dq. The 128 x 128 scores of
// BwdKeys take 8 registers more, 16 of each thread of its producer.
template <int kHeadDim>
struct HopperAttentionTiles;
template <>
struct HopperAttentionTiles<32> {
  using Fwd = WarpgroupTile<32, 2, 128, 4>;
  using FwdGeneral = Fwd;
  using BwdShort = WarpgroupTile<32, 2, 128, 2>;
  using BwdShortGeneral = WarpgroupTile<32, 2, 64, 2>;
  using BwdKeys = WarpgroupTile<32, 2, 128, 2>;
  using BwdQueries = WarpgroupTile<32, 2, 128, 2>;
  using BwdQueriesGeneral = WarpgroupTile<32, 2, 64, 2>;
};
template <>
struct HopperAttentionTiles<64> {
  using Fwd = WarpgroupTile<64, 2, 128, 4>;
  using FwdGeneral = WarpgroupTile<64, 2, 64, 8>;  // 128 keys would spill
  using BwdShort = WarpgroupTile<64, 2, 128, 2>;
  using BwdShortGeneral = WarpgroupTile<64, 2, 64, 2, Swizzle::k64>;
  using BwdKeys = WarpgroupTile<64, 2, 128, 2, Swizzle::k128, 24>;
  using BwdQueries = WarpgroupTile<64, 2, 128, 2>;
  using BwdQueriesGeneral = WarpgroupTile<64, 2, 64, 2>;
};
template <>
struct HopperAttentionTiles<96> {
  using Fwd = WarpgroupTile<96, 2, 128, 3>;
  using FwdGeneral = WarpgroupTile<96, 2, 64, 6>;
  using BwdShort = WarpgroupTile<96, 2, 64, 2>;
  using BwdShortGeneral = BwdShort;
  using BwdKeys = WarpgroupTile<96, 2, 64, 2>;
  using BwdQueries = WarpgroupTile<96, 2, 64, 2>;
  using BwdQueriesGeneral = BwdQueries;
};
template <>
struct HopperAttentionTiles<128> {
  using Fwd = WarpgroupTile<128, 2, 128, 2>;
  using FwdGeneral = WarpgroupTile<128, 2, 64, 4>;
  using BwdShort = WarpgroupTile<128, 2, 64, 2>;
  using BwdShortGeneral = void;  // would spill: BwdKeys and BwdQueries do it
  using BwdKeys = WarpgroupTile<128, 2, 64, 2>;
  using BwdQueries = WarpgroupTile<128, 2, 64, 2>;
  using BwdQueriesGeneral = BwdQueries;
};

// The tiles, by padded head dim. Rows are queries (fwd, bwd_queries, bwd_bias) or keys (bwd_keys).
// Not measured on a device yet; chosen to fit 99 KB of shared memory and 255 registers.
// Hopper: those of the kernels in sm90/.
template <int kHeadDim>
struct AttentionTiles;
template <>
struct AttentionTiles<32> {
  using Hopper = HopperAttentionTiles<32>;
  using Fwd = AttentionTile<32, 4, 2, 64>;
  using FwdGeneral = Fwd;
  using BwdShort = AttentionTile<32, 8, 1, 64>;
  using BwdKeys = AttentionTile<32, 8, 1, 64>;
  using BwdQueries = AttentionTile<32, 8, 1, 64>;
  using BwdBias = AttentionTile<32, 4, 1, 64>;
};
template <>
struct AttentionTiles<64> {
  using Hopper = HopperAttentionTiles<64>;
  using Fwd = AttentionTile<64, 4, 2, 64>;
  using FwdGeneral = AttentionTile<64, 4, 2, 32>;  // 64 keys would spill
  using BwdShort = AttentionTile<64, 8, 1, 32>;
  using BwdKeys = AttentionTile<64, 8, 1, 64>;
  using BwdQueries = AttentionTile<64, 8, 1, 64>;
  using BwdBias = AttentionTile<64, 4, 1, 32>;
};
template <>
struct AttentionTiles<96> {
  using Hopper = HopperAttentionTiles<96>;
  using Fwd = AttentionTile<96, 8, 1, 64>;
  using FwdGeneral = Fwd;
  using BwdShort = AttentionTile<96, 8, 1, 16>;
  using BwdKeys = AttentionTile<96, 8, 1, 32>;
  using BwdQueries = AttentionTile<96, 8, 1, 32>;
  using BwdBias = AttentionTile<96, 4, 1, 32>;
};
template <>
struct AttentionTiles<128> {
  using Hopper = HopperAttentionTiles<128>;
  using Fwd = AttentionTile<128, 8, 1, 64>;
  using FwdGeneral = Fwd;
  using BwdShort = AttentionTile<128, 8, 1, 16>;
  using BwdKeys = AttentionTile<128, 8, 1, 32>;
  using BwdQueries = AttentionTile<128, 8, 1, 32>;
  using BwdBias = AttentionTile<128, 4, 1, 32>;
};

}  // namespace bertkern
