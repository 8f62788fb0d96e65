// Tiles of 16-bit rows in shared memory, and products of them on mma.sync.
//
// A tile has rows of kColumns elements, in chunks of 8 (16 bytes). Chunk c of row r stands at place
// c ^ phase(r), so that the 8 rows of one ldmatrix, and the 8 rows that a warp stores words of,
// fall on different banks. A fragment of a product is 16 x 8: lane 4g + t holds rows g and g + 8,
// columns 2t and 2t + 1 (see ptx/mma.cuh).
#pragma once

#include "cuda/attention_score.cuh"
#include "ptx/copy_async.cuh"
#include "ptx/mma.cuh"

namespace bertkern::sm80 {

using namespace cuda;

// A block's own queries. The longest rows of a causal matrix come first, so that the last blocks to
// start are short ones.
template <typename Tile>
BERTKERN_DEVICE QueryTile own_query_tile(const AttentionKernelArguments& a) {
  const int block = ptx::block_index();
  return query_tile<Tile::kRows, Tile::kColumns>(
      a, block / a.blocks / a.heads, block / a.blocks % a.heads, a.blocks - 1 - block % a.blocks);
}

// Where chunk `chunk` of row `row` of a tile is, in bytes.
template <int kColumns>
BERTKERN_DEVICE int chunk_offset(int row, int chunk) {
  static_assert(kColumns % 16 == 0, "a row is a multiple of 32 bytes");
  // Rows of 64 + n · 128 bytes: two rows take all banks once, so pairs of rows share a phase; of
  // 32 + n · 64 bytes: four rows.
  const int phase = kColumns % 64 == 0   ? row & 7
                    : kColumns % 32 == 0 ? (row >> 1) & 3
                                         : (row >> 2) & 1;
  return row * kColumns * 2 + ((chunk ^ phase) << 4);
}

// Starts copies of rows [first, first + kRows) of a matrix into a tile. Rows from `end` on, rows
// for which counts(row) is false, and columns from `width` on become 0: what stands there may be
// NaN, and 0 · NaN would not be 0. `rows` is row 0, inside the tensor.
template <typename T, int kRows, int kColumns, int kThreads, typename Counts>
BERTKERN_DEVICE void copy_rows(char* tile, const T* rows, int64_t stride, int first, int end,
                               int width, Counts counts) {
  constexpr int kChunks = kColumns / 8;
  // Whole rows of threads walk down the tile; where 96 columns make that impossible some are idle.
  constexpr int kStep = kThreads / kChunks;
  const int chunk = ptx::thread_index() % kChunks;
  if (kThreads % kChunks != 0 && ptx::thread_index() >= kStep * kChunks) return;
  int row = ptx::thread_index() / kChunks;
  const T* source = rows + (first + row) * stride + chunk * 8;
  // At 128 columns the kernels have no register to spare for the addresses of an unrolled loop.
  constexpr int kUnroll = kColumns > 96 ? 1 : 8;
#pragma unroll kUnroll
  for (int n = 0; n < (kRows + kStep - 1) / kStep; ++n, row += kStep, source += kStep * stride) {
    const bool valid = first + row < end && chunk * 8 < width && counts(first + row);
    if (kRows % kStep == 0 || row < kRows) {  // not a break: the loop would not be unrolled
      ptx::copy_async_16(tile + chunk_offset<kColumns>(row, chunk), valid ? source : rows, valid);
    }
  }
}

struct AllRows {
  BERTKERN_DEVICE bool operator()(int) const { return true; }
};

// a: 16 rows from `row`, 16 columns from chunk `chunk`, as the left operand of mma.
template <int kColumns>
BERTKERN_DEVICE void load_left(uint32_t (&a)[4], const char* tile, int row, int chunk) {
  const int lane = lane_index();
  ptx::load_matrix_4(a, tile + chunk_offset<kColumns>(row + (lane & 15), chunk + (lane >> 4)));
}

// a: as load_left of the tile's transpose; `row` and `chunk` are the tile's own.
template <int kColumns>
BERTKERN_DEVICE void load_left_transposed(uint32_t (&a)[4], const char* tile, int row, int chunk) {
  const int lane = lane_index();
  ptx::load_matrix_4_transposed(a,
                                tile + chunk_offset<kColumns>(row + (lane & 7) + ((lane >> 4) << 3),
                                                              chunk + ((lane >> 3) & 1)));
}

// acc [rows of `left` x kColumnTiles · 8] += left · rightᵀ: 16 · kRowTiles rows of the tile `left`
// from `row` on, the first rows of the tile `right`, both of kHeadDim columns.
template <typename T, int kHeadDim, int kRowTiles, int kColumnTiles>
BERTKERN_DEVICE void multiply_transposed(float (&acc)[kRowTiles][kColumnTiles][4], const char* left,
                                         int row, const char* right) {
  const int lane = lane_index();
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) load_left<kHeadDim>(a[r], left, row + 16 * r, 2 * k);
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      uint32_t b[4];
      ptx::load_matrix_4(b, right + chunk_offset<kHeadDim>(n * 8 + (lane & 7) + ((lane >> 4) << 3),
                                                           2 * k + ((lane >> 3) & 1)));
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        ptx::mma_16x8x16(acc[r][n], a[r], {b[0], b[1]}, T{});
        ptx::mma_16x8x16(acc[r][n + 1], a[r], {b[2], b[3]}, T{});
      }
    }
  }
}

// A warp's own 16 rows of a tile as left operands, which a loop uses again and again: in registers
// while these suffice (up to 64 columns), else loaded anew each time.
template <int kHeadDim>
struct OwnRows {
  static constexpr bool kHeld = kHeadDim <= 64;
  const char* tile;
  int row;
  uint32_t held[kHeld ? kHeadDim / 16 : 1][4];

  // To be called once, when the tile has arrived.
  BERTKERN_DEVICE void hold() {
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) load_left<kHeadDim>(held[k], tile, row, 2 * k);
    }
  }

  // acc [16 x 16] += own rows · rightᵀ, of the tile `right` the rows from `first` on.
  template <typename T>
  BERTKERN_DEVICE void multiply_transposed(float (&acc)[2][4], const char* right, int first,
                                           T) const {
    const int lane = lane_index();
    constexpr int kUnroll = kHeadDim > 96 ? 2 : kHeadDim / 16;  // fewer addresses in registers
#pragma unroll kUnroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[4], b[4];
      if constexpr (kHeld) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = held[k][i];
      } else {
        load_left<kHeadDim>(a, tile, row, 2 * k);
      }
      ptx::load_matrix_4(b, right + chunk_offset<kHeadDim>(first + (lane & 7) + ((lane >> 4) << 3),
                                                           2 * k + ((lane >> 3) & 1)));
      ptx::mma_16x8x16(acc[0], a, {b[0], b[1]}, T{});
      ptx::mma_16x8x16(acc[1], a, {b[2], b[3]}, T{});
    }
  }
};

// acc [16 x kColumnTiles · 8] += a · right, one step of 16 of the sum: rows [row, row + 16) of the
// tile `right`, its columns from chunk `chunk` on.
template <typename T, int kColumns, int kColumnTiles>
BERTKERN_DEVICE void multiply_step(float (&acc)[kColumnTiles][4], const uint32_t (&a)[4],
                                   const char* right, int row, int chunk) {
  const int lane = lane_index();
#pragma unroll
  for (int n = 0; n + 1 < kColumnTiles; n += 2) {
    uint32_t b[4];
    ptx::load_matrix_4_transposed(
        b, right + chunk_offset<kColumns>(row + (lane & 15), chunk + n + (lane >> 4)));
    ptx::mma_16x8x16(acc[n], a, {b[0], b[1]}, T{});
    ptx::mma_16x8x16(acc[n + 1], a, {b[2], b[3]}, T{});
  }
  if constexpr (kColumnTiles % 2 == 1) {
    uint32_t b[2];
    ptx::load_matrix_2_transposed(
        b, right + chunk_offset<kColumns>(row + (lane & 15), chunk + kColumnTiles - 1));
    ptx::mma_16x8x16(acc[kColumnTiles - 1], a, b, T{});
  }
}

// Two neighbouring accumulators [16 x 16], rounded to T, as they stand: the left operand of mma.
template <typename T>
BERTKERN_DEVICE void to_left(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = ptx::pack(low[0], low[1], T{});
  a[1] = ptx::pack(low[2], low[3], T{});
  a[2] = ptx::pack(high[0], high[1], T{});
  a[3] = ptx::pack(high[2], high[3], T{});
}

// acc [16 · kRowTiles x kHeadDim] += weights · right, where a warp holds weights
// [16 · kRowTiles x kSumTiles · 8] as accumulators: rounded to T, they are left operands as they
// stand. `right` is a tile of kSumTiles · 8 rows.
template <typename T, int kHeadDim, int kRowTiles, int kSumTiles>
BERTKERN_DEVICE void multiply_accumulators(float (&acc)[kRowTiles][kHeadDim / 8][4],
                                           const float (&weights)[kRowTiles][kSumTiles][4],
                                           const char* right) {
#pragma unroll
  for (int k = 0; k < kSumTiles / 2; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      to_left<T>(a[r], weights[r][2 * k], weights[r][2 * k + 1]);
    }
    const int lane = lane_index();
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      uint32_t b[4];
      ptx::load_matrix_4_transposed(
          b, right + chunk_offset<kHeadDim>(16 * k + (lane & 15), n + (lane >> 4)));
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        ptx::mma_16x8x16(acc[r][n], a[r], {b[0], b[1]}, T{});
        ptx::mma_16x8x16(acc[r][n + 1], a[r], {b[2], b[3]}, T{});
      }
    }
  }
}

// Stores 16 rows of accumulators, rounded to T, as rows [first, first + 16) of a matrix, those
// before `end`; columns from chunk `chunk` on, those before `width`. They pass through rows
// [row, row + 16) of a tile, which this warp alone uses: a thread then stores 16 bytes.
template <typename T, int kColumns, int kColumnTiles>
BERTKERN_DEVICE void store_rows(const float (&acc)[kColumnTiles][4], char* tile, int row, int chunk,
                                T* rows, int64_t stride, int first, int end, int width) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  ptx::warp_barrier();  // the warp has read what stands in the tile
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    char* low = tile + chunk_offset<kColumns>(row + g, chunk + n) + 4 * t;
    char* high = tile + chunk_offset<kColumns>(row + g + 8, chunk + n) + 4 * t;
    *reinterpret_cast<uint32_t*>(low) = ptx::pack(acc[n][0], acc[n][1], T{});
    *reinterpret_cast<uint32_t*>(high) = ptx::pack(acc[n][2], acc[n][3], T{});
  }
  ptx::warp_barrier();
#pragma unroll
  for (int at = lane; at < 16 * kColumnTiles; at += ptx::kWarpThreads) {
    const int r = at / kColumnTiles, c = chunk + at % kColumnTiles;
    if (first + r >= end || c * 8 >= width) continue;
    // A load of its own: GCC does not instrument one that is itself a call's argument.
    const ptx::Words4 words =
        *reinterpret_cast<const ptx::Words4*>(tile + chunk_offset<kColumns>(row + r, c));
    ptx::store_global_16(rows + (first + r) * stride + c * 8, words);
  }
}

}  // namespace bertkern::sm80
