// Attention backward, the gradient of the bias: dbias = Σ ds over what the bias was broadcast over.
//
// A block owns a tile of the bias, or a row, a column or one element where its queries or keys are
// broadcast, and walks in a fixed order over everything that is summed into it: sequences, heads,
// queries, keys. ds is computed anew from q, k, v, dout, lse and delta, as in the other kernels.
#pragma once

#include "cuda/sm80/attention_bwd_queries.cuh"

namespace bertkern::sm80 {

template <typename Tile>
constexpr int attention_bwd_bias_shared_bytes() {
  return 2 * Tile::kRowsBytes + 2 * Tile::kColumnsBytes;
}

template <typename Tile>
inline int64_t attention_bwd_bias_blocks(const int (&sizes)[4]) {
  const int64_t q_blocks = sizes[2] == 1 ? 1 : (sizes[2] + Tile::kRows - 1) / Tile::kRows;
  const int64_t k_blocks = sizes[3] == 1 ? 1 : (sizes[3] + Tile::kColumns - 1) / Tile::kColumns;
  return static_cast<int64_t>(sizes[0]) * sizes[1] * q_blocks * k_blocks;
}

// Stores acc, a block's sum, in the bias's dtype: its own elements, or the sums over rows
// (queries), columns (keys) or both where they are broadcast. `partial`: kWarps · kColumns floats.
template <typename B, typename Tile>
BERTKERN_DEVICE void store_bias(float (&acc)[Tile::kColumns / 8][4],
                                const AttentionKernelArguments& a, B* matrix, int first_q,
                                int first_k, float* partial) {
  constexpr int kKeyTiles = Tile::kColumns / 8;
  const int g = lane_index() / 4, t = lane_index() % 4, row = warp_index() * 16;
  const bool sum_q = a.bias_sizes[2] == 1, sum_k = a.bias_sizes[3] == 1;
  const int64_t cols = a.bias_sizes[3];
  float over_keys[2] = {};
  if (sum_k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) sum += acc[n][2 * half] + acc[n][2 * half + 1];
      over_keys[half] = sum_of_row(sum);
    }
  }
  if (!sum_q) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first_q + row + g + 8 * half;
      if (i >= a.bias_sizes[2]) continue;
      if (sum_k) {
        if (t == 0) matrix[i] = ptx::from_float(over_keys[half], B{});
        continue;
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = first_k + 8 * n + 2 * t + e;
          if (j < cols) matrix[i * cols + j] = ptx::from_float(acc[n][2 * half + e], B{});
        }
      }
    }
    return;
  }
  // Sums over queries: within a warp over the lanes of a column, then over the warps in order.
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = sum_k ? over_keys[0] + over_keys[1] : acc[n][e] + acc[n][2 + e];
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
      if (g == 0) partial[warp_index() * Tile::kColumns + 8 * n + 2 * t + e] = sum;
    }
  }
  ptx::block_barrier();
  for (int n = ptx::thread_index(); n < (sum_k ? 1 : Tile::kColumns); n += Tile::kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Tile::kWarps; ++warp) sum += partial[warp * Tile::kColumns + n];
    if (first_k + n < cols) matrix[first_k + n] = ptx::from_float(sum, B{});
  }
}

template <typename T, typename Tile>
BERTKERN_KERNEL(Tile::kThreads)
attention_bwd_bias_kernel(const AttentionKernelArguments a) {
  constexpr int kHeadDim = Tile::kHeadDim, kKeys = Tile::kColumns;
  static_assert(Tile::kRowTiles == 1, "a warp owns 16 queries");
  const bool sum_q = a.bias_sizes[2] == 1, sum_k = a.bias_sizes[3] == 1;
  const int q_blocks = sum_q ? 1 : (a.bias_sizes[2] + Tile::kRows - 1) / Tile::kRows;
  const int k_blocks = sum_k ? 1 : (a.bias_sizes[3] + kKeys - 1) / kKeys;
  int block = ptx::block_index();
  const int own_k = block % k_blocks;
  block /= k_blocks;
  const int own_q = block % q_blocks;
  block /= q_blocks;
  const int own_head = block % a.bias_sizes[1], own_sequence = block / a.bias_sizes[1];
  const int first_sequence = a.bias_sizes[0] == 1 ? 0 : own_sequence;
  const int end_sequence = a.bias_sizes[0] == 1 ? a.batch : own_sequence + 1;
  const int first_head = a.bias_sizes[1] == 1 ? 0 : own_head;
  const int end_head = a.bias_sizes[1] == 1 ? a.heads : own_head + 1;

  char* q_tile = ptx::shared_memory();
  char* dout_tile = q_tile + Tile::kRowsBytes;
  char* k_tile = dout_tile + Tile::kRowsBytes;
  char* v_tile = k_tile + Tile::kColumnsBytes;
  const int row = warp_index() * 16, g = lane_index() / 4;
  float acc[kKeys / 8][4] = {};

  for (int index = first_sequence; index < end_sequence; ++index) {
    const Sequence s = sequence_of(a, index);
    const uint8_t* kept = kept_keys(a, index);
    const int q_tiles = sum_q ? (s.len_q + Tile::kRows - 1) / Tile::kRows : own_q + 1;
    const int k_tiles = sum_k ? (s.len_k + kKeys - 1) / kKeys : own_k + 1;
    for (int head = first_head; head < end_head; ++head) {
      const int key_head = key_head_of(a, head);
      const int64_t at_lse = lse_offset(a, index, s.first_q, head);
      const ScoreOptions options = score_options<T>(a, index, head);
      const DropoutStream stream =
          a.dropout_threshold != 0 ? dropout_stream_of(a, index, head) : DropoutStream{};
      for (int q_block = sum_q ? 0 : own_q; q_block < q_tiles; ++q_block) {
        for (int k_block = sum_k ? 0 : own_k; k_block < k_tiles; ++k_block) {
          const int first_q = q_block * Tile::kRows, first_k = k_block * kKeys;
          const int end_q = first_q + Tile::kRows < s.len_q ? first_q + Tile::kRows : s.len_q;
          // Nothing is seen: outside the sequence or its band.
          if (first_q >= s.len_q || first_k >= s.len_k || first_k > end_q - 1 + s.high ||
              first_k + kKeys - 1 < first_q + s.low) {
            continue;
          }
          ptx::block_barrier();  // nobody reads the tiles of the step before any more
          copy_rows<T, Tile::kRows, kHeadDim, Tile::kThreads>(
              q_tile, head_rows<const T>(a.q, index, s.first_q, head), a.q.token, first_q, s.len_q,
              a.head_dim, AllRows{});
          copy_rows<T, Tile::kRows, kHeadDim, Tile::kThreads>(
              dout_tile, head_rows<const T>(a.dout, index, s.first_q, head), a.dout.token, first_q,
              s.len_q, a.head_dim, AllRows{});
          copy_rows<T, kKeys, kHeadDim, Tile::kThreads>(
              k_tile, head_rows<const T>(a.k, index, s.first_k, key_head), a.k.token, first_k,
              s.len_k, a.head_dim, KeptKeys{kept});
          copy_rows<T, kKeys, kHeadDim, Tile::kThreads>(
              v_tile, head_rows<const T>(a.v, index, s.first_k, key_head), a.v.token, first_k,
              s.len_k, a.head_dim, KeptKeys{kept});
          ptx::copy_async_commit();
          QueryRows rows{};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = first_q + row + g + 8 * half;
            const bool inside = i < s.len_q;
            rows.set(half, inside, inside ? a.lse[at_lse + i] : 0.0f,
                     inside ? a.delta[at_lse + i] : 0.0f, 1.0f);
          }
          rows.keys = dropout_row(stream, static_cast<uint32_t>(first_q + row + g));
          ptx::copy_async_wait<0>();
          ptx::block_barrier();
          float p[1][kKeys / 8][4] = {}, dp[1][kKeys / 8][4] = {};
          multiply_transposed<T, kHeadDim>(p, q_tile, row, k_tile);
          multiply_transposed<T, kHeadDim>(dp, dout_tile, row, v_tile);
          const bool whole = sees_all(s, kept, first_q, end_q, first_k, first_k + kKeys);
          gradients_of_scores<T, AttentionVariant::kGeneral, false>(
              p[0], dp[0], rows, a, s, kept, whole, false, options, first_q + row, first_k);
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[n][e] += p[0][n][e];
          }
        }
      }
    }
  }

  ptx::block_barrier();  // the tiles' memory is free for the sums
  auto* partial = reinterpret_cast<float*>(ptx::shared_memory());
  const int64_t matrix = (static_cast<int64_t>(own_sequence) * a.bias_sizes[1] + own_head) *
                         (static_cast<int64_t>(a.bias_sizes[2]) * a.bias_sizes[3]);
  const int first_q = own_q * Tile::kRows, first_k = own_k * kKeys;
  if (a.bias_kind == DeviceBias::kFloat32) {
    store_bias<float, Tile>(acc, a, static_cast<float*>(a.dbias) + matrix, first_q, first_k,
                            partial);
  } else {
    store_bias<T, Tile>(acc, a, static_cast<T*>(a.dbias) + matrix, first_q, first_k, partial);
  }
}

}  // namespace bertkern::sm80
