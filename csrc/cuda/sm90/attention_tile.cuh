// Tiles of 16-bit rows in shared memory as the copy engine writes them and wgmma reads them, and
// the products of attention on them.
//
// A tile of kHeadDim columns is kParts blocks side by side, of one span of the swizzle each, since
// a row of a box is at most a span: part n holds columns [n · kSpan, (n + 1) · kSpan) of all rows.
#pragma once

#include "cuda/attention_score.cuh"
#include "ptx/mma.cuh"
#include "ptx/store_matrix.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace bertkern::sm90 {

using namespace cuda;

// Of a tile of kRows rows: where chunk `chunk` (8 columns) of row `row` is, in bytes.
template <typename Tile, int kRows>
BERTKERN_DEVICE int chunk_offset(int row, int chunk) {
  constexpr int kChunks = Tile::kSpan / 8;
  return chunk / kChunks * (kRows * Tile::kSpanBytes) +
         swizzled(row * Tile::kSpanBytes + chunk % kChunks * 16, Tile::kSwizzle);
}

// Starts the copies of rows [first, first + kRows) of a head into a tile; they count on `barrier`.
// `map`: dimensions [D, H, S, B] with boxes [kSpan, 1, kRows, 1].
template <typename Tile, int kRows>
BERTKERN_DEVICE void load_tile(char* tile, const TensorMap& map, int head, int first, int batch,
                               ptx::Barrier* barrier, ptx::CachePolicy policy) {
#pragma unroll
  for (int part = 0; part < Tile::kParts; ++part) {
    ptx::tma_load<4>(tile + part * kRows * Tile::kSpanBytes, map,
                     {part * Tile::kSpan, head, first, batch}, barrier, policy);
  }
}

// The descriptor of rows of a tile as an operand whose k is along the columns.
template <typename Tile>
BERTKERN_DEVICE MatrixDescriptor describe_rows(const char* rows) {
  return ptx::describe_tile<Tile::kSwizzle, 16, 8 * Tile::kSpanBytes>(rows);
}

// The descriptor of a tile of kRows rows as a right operand whose k is along the rows.
template <typename Tile, int kRows>
BERTKERN_DEVICE MatrixDescriptor describe_transposed(const char* tile) {
  return ptx::describe_tile<Tile::kSwizzle, kRows * Tile::kSpanBytes, 8 * Tile::kSpanBytes>(tile);
}

// Starts scores [64 x N] = left · rightᵀ: 64 rows of a tile of kLeftRows, a tile of N rows.
template <typename T, typename Tile, int kLeftRows, int kTiles>
BERTKERN_DEVICE void multiply_transposed(float (&scores)[kTiles][4], MatrixDescriptor left,
                                         MatrixDescriptor right) {
  constexpr int kSteps = Tile::kSpan / 16;  // in a part
#pragma unroll
  for (int k = 0; k < Tile::kHeadDim / 16; ++k) {
    const int part = k / kSteps, bytes = k % kSteps * 32;
    ptx::wgmma<false, false>(scores, advance(left, part * kLeftRows * Tile::kSpanBytes + bytes),
                             advance(right, part * 8 * kTiles * Tile::kSpanBytes + bytes), k > 0,
                             T{});
  }
}

// A warp's 16 rows of a tile of kRows rows, from `row` on, as left operands.
template <typename Tile, int kRows>
BERTKERN_DEVICE void load_left(uint32_t (&left)[Tile::kHeadDim / 16][4], const char* tile,
                               int row) {
#pragma unroll
  for (int k = 0; k < Tile::kHeadDim / 16; ++k) {
    const int lane = lane_index();
    ptx::load_matrix_4(left[k],
                       tile + chunk_offset<Tile, kRows>(row + lane % 16, 2 * k + lane / 16));
  }
}

// Starts scores [64 x N] = left · rightᵀ: 64 rows in registers, a tile of N rows.
template <typename T, typename Tile, int kTiles>
BERTKERN_DEVICE void multiply_transposed(float (&scores)[kTiles][4],
                                         const uint32_t (&left)[Tile::kHeadDim / 16][4],
                                         MatrixDescriptor right) {
  constexpr int kSteps = Tile::kSpan / 16;  // in a part
#pragma unroll
  for (int k = 0; k < Tile::kHeadDim / 16; ++k) {
    const int part = k / kSteps, bytes = k % kSteps * 32;
    ptx::wgmma<false>(scores, left[k], advance(right, part * 8 * kTiles * Tile::kSpanBytes + bytes),
                      k > 0, T{});
  }
}

// Starts acc [64 x kHeadDim] (+)= p · right: p [64 x 16 · kSteps] in registers, a tile of as many
// rows. Unless `accumulate`, what acc held is overwritten.
template <typename T, typename Tile, int kTiles, int kSteps>
BERTKERN_DEVICE void multiply(float (&acc)[kTiles][4], const uint32_t (&p)[kSteps][4],
                              MatrixDescriptor right, bool accumulate = true) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    ptx::wgmma<true>(acc, p[k], advance(right, k * 16 * Tile::kSpanBytes), accumulate || k > 0,
                     T{});
  }
}

// Two neighbouring fragments of accumulators, rounded to T, as they stand: a left operand.
template <typename T>
BERTKERN_DEVICE void to_left(uint32_t (&p)[4], const float (&low)[4], const float (&high)[4]) {
  p[0] = ptx::pack(low[0], low[1], T{});
  p[1] = ptx::pack(low[2], low[3], T{});
  p[2] = ptx::pack(high[0], high[1], T{});
  p[3] = ptx::pack(high[2], high[3], T{});
}
template <typename T, int kTiles>
BERTKERN_DEVICE void to_left(uint32_t (&p)[kTiles / 2][4], const float (&x)[kTiles][4]) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) to_left<T>(p[k], x[2 * k], x[2 * k + 1]);
}

// Stores the 16 rows of accumulators that a warp holds, rounded to T, as rows [first, first + 16)
// of a matrix, those before `end`, of columns those before `width`. They pass through rows
// [row, row + 16) of a tile of kRows rows, which this warp alone uses: a thread then stores 16
// bytes of a row that lies side by side with its neighbours'.
template <typename T, typename Tile, int kRows, int kTiles>
BERTKERN_DEVICE void store_rows(const float (&acc)[kTiles][4], char* tile, int row, T* rows,
                                int64_t stride, int first, int end, int width) {
  const int lane = lane_index();
  ptx::warp_barrier();  // the warp has read what stands in the tile
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    const uint32_t words[4] = {
        ptx::pack(acc[n][0], acc[n][1], T{}), ptx::pack(acc[n][2], acc[n][3], T{}),
        ptx::pack(acc[n + 1][0], acc[n + 1][1], T{}), ptx::pack(acc[n + 1][2], acc[n + 1][3], T{})};
    ptx::store_matrix_4(tile + chunk_offset<Tile, kRows>(row + lane % 16, n + lane / 16), words);
  }
  ptx::warp_barrier();
#pragma unroll
  for (int at = lane; at < 16 * kTiles; at += ptx::kWarpThreads) {
    const int r = at / kTiles, chunk = at % kTiles;
    if (first + r >= end || chunk * 8 >= width) continue;
    // A load of its own: GCC does not instrument one that is itself a call's argument.
    const ptx::Words4 words =
        *reinterpret_cast<const ptx::Words4*>(tile + chunk_offset<Tile, kRows>(row + r, chunk));
    ptx::store_global_16(rows + (first + r) * stride + chunk * 8, words);
  }
}

}  // namespace bertkern::sm90
