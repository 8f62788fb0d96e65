// Small matrix products for attention: register-blocked micro-kernels on packed panels.
//
// B is packed as panels of kPanel columns: panel p holds B[:, p·kPanel ...] as [depth][kPanel]. A
// is read by broadcasts, so it may be stored either way around. Each element of C is one chain of
// additions over the depth, in order, or a chain of such chains: it depends neither on the rows
// computed beside it nor on how work is cut. Compiled once per instruction set (see params.h).
#pragma once

#include <algorithm>

#include "vec.h"

namespace bertkern::BERTKERN_ISA {

// kRows·2 accumulators, two vectors of B and a broadcast stay in registers: 15 of AVX2's 16, 27 of
// the 32 of AVX-512 and NEON.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int kPanel = 2 * kWidth;
// A product of its own adds up the depth in chains of this length: one chain over a head dim of 256
// would round twice as coarsely as torch's products. No head dim of BERT's is cut.
constexpr int64_t kChain = 64;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// C[kCount, kPanel] = or += A[kCount, depth] B[depth, kPanel]. A(r, d) is a[r·row_step +
// d·depth_step]. Where A comes from memory, its rows that stand `ahead` rows further are asked for
// meanwhile; 0: none.
template <bool kAccumulate, int kCount = kRows>
BERTKERN_INLINE void micro_kernel(const float* a, int64_t row_step, int64_t depth_step,
                                  const float* panel, int64_t depth, float* c, int64_t c_row,
                                  int64_t ahead = 0) {
  constexpr int64_t kCacheLine = 64 / sizeof(float);
  Vf acc[kCount][2];
  for (int r = 0; r < kCount; ++r) {
    for (int j = 0; j < 2; ++j) {
      acc[r][j] = Vf{};
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    const Vf b0 = load(panel + d * kPanel);
    const Vf b1 = load(panel + d * kPanel + kWidth);
    const float* a_column = a + d * depth_step;
    if (ahead > 0 && d % kCacheLine == 0) {
      // into the second cache: rows that a power of two lies between share few places of the first
      for (int r = 0; r < kCount; ++r) {
        __builtin_prefetch(a_column + (r + ahead) * row_step, 0, 2);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kCount; ++r) {
      const float x = a_column[r * row_step];
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
  }
  for (int r = 0; r < kCount; ++r) {
    for (int j = 0; j < 2; ++j) {
      float* to = c + r * c_row + j * kWidth;
      // Added at the end, not the start: sums of many calls are sums of partial sums, and lose
      // less.
      if (kAccumulate) acc[r][j] += load(to);
      store(to, acc[r][j]);
    }
  }
}

// C[rows, columns] (+)= A[rows, depth] B; rows is rounded up to kRows and columns to kPanel, and
// that much memory must be there in A and C. Panels outside, row groups inside: a panel stays in
// the nearest cache.
template <bool kAccumulate>
inline void multiply(const float* a, int64_t row_step, int64_t depth_step, const float* panels,
                     int64_t rows, int64_t columns, int64_t depth, int64_t panel_depth, float* c,
                     int64_t c_row) {
  const int64_t chain = kAccumulate || depth < kChain ? depth : kChain;
  for (int64_t j = 0; j < columns; j += kPanel) {
    const float* panel = panels + j * panel_depth;
    for (int64_t i = 0; i < rows; i += kRows) {
      float* to = c + i * c_row + j;
      micro_kernel<kAccumulate>(a + i * row_step, row_step, depth_step, panel, chain, to, c_row);
      for (int64_t d = chain; d < depth; d += kChain) {
        micro_kernel<true>(a + i * row_step + d * depth_step, row_step, depth_step,
                           panel + d * kPanel, std::min(kChain, depth - d), to, c_row);
      }
    }
  }
}

// Packs M [count, width] (row stride `row`) as B = M: panels over width, depth `count`. Columns
// past width are zeros. `panel_depth` >= count is the room of a panel.
template <typename T>
inline void pack(const T* source, int64_t row, int64_t count, int64_t width, int64_t panel_depth,
                 float* panels) {
  for (int64_t i = 0; i < count; ++i) {
    const T* from = source + i * row;
    int64_t c = 0;
    for (; c + kWidth <= width; c += kWidth) {
      store(panels + (c / kPanel) * kPanel * panel_depth + i * kPanel + c % kPanel,
            load_as_float(from + c));
    }
    for (const int64_t end = round_up(width, kPanel); c < end; c += kWidth) {
      const Vf v = c < width ? load_as_float(from + c, width - c) : Vf{};
      store(panels + (c / kPanel) * kPanel * panel_depth + i * kPanel + c % kPanel, v);
    }
  }
}

// The four-by-four transposition inside every 128-bit lane, then lanes by memory: see
// pack_transposed.
typedef float Quad __attribute__((vector_size(16)));

BERTKERN_INLINE void transpose_quads(Quad& a, Quad& b, Quad& c, Quad& d) {
  const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Quad ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Quad cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

// Packs M [count, width] as B = Mᵀ: panels over count, depth `width`. Rows past count, up to the
// panel's edge, become columns of zeros. `row_scratch` holds 4 · (width + kWidth) floats.
template <typename T>
inline void pack_transposed(const T* source, int64_t row, int64_t count, int64_t width,
                            float* panels, float* row_scratch) {
  const int64_t padded = round_up(width, kWidth);
  for (int64_t i = 0; i < round_up(count, kPanel); i += 4) {
    float* panel = panels + (i / kPanel) * kPanel * width + i % kPanel;
    const float* rows[4];
    for (int r = 0; r < 4; ++r) {
      float* target = row_scratch + r * padded;
      rows[r] = target;
      if (i + r < count) {
        if constexpr (sizeof(T) == 4) {
          rows[r] = source + (i + r) * row;
        } else {
          read_row(source + (i + r) * row, target, width);
        }
      } else {
        for (int64_t c = 0; c < padded; c += kWidth) store(target + c, Vf{});
      }
    }
    int64_t c = 0;
    for (; c + 4 <= width; c += 4) {
      Quad q[4];
      for (int r = 0; r < 4; ++r) std::memcpy(&q[r], rows[r] + c, sizeof(Quad));
      transpose_quads(q[0], q[1], q[2], q[3]);
      for (int r = 0; r < 4; ++r) std::memcpy(panel + (c + r) * kPanel, &q[r], sizeof(Quad));
    }
    for (; c < width; ++c) {
      for (int r = 0; r < 4; ++r) panel[c * kPanel + r] = rows[r][c];
    }
  }
}

}  // namespace bertkern::BERTKERN_ISA
