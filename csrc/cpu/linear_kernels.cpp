// linear of few rows on the CPU, fp32: z = x wᵀ + bias, y = act(z). x [rows, depth],
// w [cols, depth].
//
// Libraries' products pack w, which pays only where many rows read it. Here w is read as it lies,
// once: a block of its rows stays in the second cache while all rows of x meet it. There are two
// ways.
//
// Fewer rows than a panel has columns: x is read along the depth as well. A tile of kTileRows x
// kTileColumns elements of y has a vector of sums each, which is folded at the end, and a stretch
// of kDepth of a tile's rows stays in the first cache.
//
// More rows: x is packed into panels (gemm.h), and yᵀ = w xᵀ is computed by gemm.h's micro-kernel,
// which reads its first factor by broadcasts. Nothing is folded, and a block of panels stays in the
// first cache.
//
// The number of rows decides the way; in either each element is the same sum in the same order,
// whatever rows and columns are computed beside it.
//
// Compiled once per instruction set (see params.h).
#include "gemm.h"
#include "row_kernels.h"

namespace bertkern::BERTKERN_ISA {
namespace {

// The sums, a vector of each row of w and one of x stay in registers.
constexpr int kTileRows = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileColumns = 6;
#else
constexpr int kTileColumns = 3;
#endif
// At most 128 products are added up in a lane before the lanes are: the rounding error of one long
// chain grows with its length.
constexpr int64_t kDepth = kWidth < 8 ? 128 * kWidth : 1024;

// Of a packed product: columns whose sums are kept while the depth goes by in blocks, and rows of x
// whose panels they meet.
constexpr int64_t kGroup = 12;
constexpr int64_t kPackedRows = 64;
constexpr int64_t kBlock = 256;
static_assert(kGroup % kRows == 0 && kGroup % 4 == 0 && kPackedRows % kPanel == 0);

// Lane i of the result is the sum of lanes i, i + 4, ... of v.
BERTKERN_INLINE Quad fold(Vf v) {
  Quad part[kWidth / 4];
  std::memcpy(part, &v, sizeof(v));
  for (int n = kWidth / 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  }
  return part[0];
}

// y[kM, kN] = or += x[kM, depth] w[kN, depth]ᵀ.
template <int kM, int kN>
BERTKERN_INLINE void multiply_tile(const float* x, int64_t x_row, const float* w, int64_t w_row,
                                   int64_t depth, float* y, int64_t y_row, bool add) {
  Vf acc[kM][kN];
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) acc[m][n] = Vf{};
  }
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) {
    Vf b[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) b[n] = load(w + n * w_row + k);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const Vf a = load(x + m * x_row + k);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) acc[m][n] += a * b[n];
    }
  }
  if (k < depth) {
    for (int n = 0; n < kN; ++n) {
      const Vf b = load_as_float(w + n * w_row + k, depth - k);
      for (int m = 0; m < kM; ++m) acc[m][n] += load_as_float(x + m * x_row + k, depth - k) * b;
    }
  }
  static_assert(kM <= 4, "a quad of rows");
  for (int n = 0; n < kN; ++n) {
    Quad row[4] = {};
    for (int m = 0; m < kM; ++m) row[m] = fold(acc[m][n]);
    transpose_quads(row[0], row[1], row[2], row[3]);
    const Quad sums = (row[0] + row[1]) + (row[2] + row[3]);
    for (int m = 0; m < kM; ++m) {
      float* to = y + m * y_row + n;
      *to = add ? *to + sums[m] : sums[m];
    }
  }
}

template <int kM, int kN>
BERTKERN_INLINE void multiply_rows(const float* x, int64_t x_row, const float* w, int64_t w_row,
                                   int64_t depth, int64_t cols, float* y, int64_t y_row, bool add) {
  int64_t n = 0;
  for (; n + kN <= cols; n += kN) {
    multiply_tile<kM, kN>(x, x_row, w + n * w_row, w_row, depth, y + n, y_row, add);
  }
  for (; n < cols; ++n) {
    multiply_tile<kM, 1>(x, x_row, w + n * w_row, w_row, depth, y + n, y_row, add);
  }
}

// Columns [first, last) of x wᵀ. Stretches of the depth are equal, but for the last.
void multiply_columns(const LinearArguments& a, int64_t first, int64_t last) {
  const int64_t stretches = (a.depth + kDepth - 1) / kDepth, cols = last - first;
  const int64_t stretch = round_up((a.depth + stretches - 1) / stretches, kWidth);
  for (int64_t k = 0; k < a.depth; k += stretch) {
    const int64_t depth = std::min(stretch, a.depth - k);
    const float* w = a.w + first * a.w_stride + k;
    int64_t m = 0;
    const auto multiply_some = [&](auto multiply, int64_t count) INLINE_LAMBDA {
      multiply(a.x + m * a.x_stride + k, a.x_stride, w, a.w_stride, depth, cols,
               a.y + m * a.cols + first, a.cols, k > 0);
      m += count;
    };
    while (m + kTileRows <= a.rows)
      multiply_some(multiply_rows<kTileRows, kTileColumns>, kTileRows);
    // Fewer rows leave registers for more columns.
    if (a.rows - m == 3) multiply_some(multiply_rows<3, kTileColumns>, 3);
    if (a.rows - m == 2) multiply_some(multiply_rows<2, 4>, 2);
    if (a.rows - m == 1) multiply_some(multiply_rows<1, 8>, 1);
  }
}

// y[rows, kGroup or cols] from c = yᵀ, whose panels of rows follow each other.
void store_transposed(const float* c, int64_t rows, int64_t cols, float* y, int64_t y_row) {
  for (int64_t m = 0; m < rows; m += 4) {
    const float* panel = c + m / kPanel * (kGroup * kPanel) + m % kPanel;
    for (int64_t n = 0; n < cols; n += 4) {
      Quad q[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&q[i], panel + (n + i) * kPanel, sizeof(Quad));
      transpose_quads(q[0], q[1], q[2], q[3]);
      for (int64_t i = 0; i < 4 && m + i < rows; ++i) {
        float* to = y + (m + i) * y_row + n;
        if (cols - n >= 4) {
          std::memcpy(to, &q[i], sizeof(Quad));
        } else {
          for (int64_t j = 0; j < cols - n; ++j) to[j] = q[i][j];
        }
      }
    }
  }
}

// Columns [first, last) of x wᵀ from the panels of x.
void multiply_packed_columns(const LinearArguments& a, const float* panels, int64_t first,
                             int64_t last) {
  alignas(64) float c[kPackedRows * kGroup];
  for (int64_t m = 0; m < a.rows; m += kPackedRows) {
    const int64_t rows = std::min(kPackedRows, a.rows - m);
    for (int64_t n = first; n < last; n += kGroup) {
      const int64_t cols = std::min(kGroup, last - n);
      std::memset(c, 0, sizeof(c));
      for (int64_t k = 0; k < a.depth; k += kBlock) {
        const int64_t depth = std::min(kBlock, a.depth - k);
        const float* w = a.w + n * a.w_stride + k;
        for (int64_t p = 0; p < rows; p += kPanel) {
          const float* panel = panels + (m + p) * a.depth + k * kPanel;
          const int64_t ahead = m == 0 && p == 0 && last - n > kGroup ? kGroup : 0;
          float* to = c + p * kGroup;
          int64_t done = 0;
          for (; done + kRows <= cols; done += kRows) {
            micro_kernel<true>(w + done * a.w_stride, a.w_stride, 1, panel, depth,
                               to + done * kPanel, kPanel, ahead);
          }
          for (; done < cols; ++done) {
            micro_kernel<true, 1>(w + done * a.w_stride, a.w_stride, 1, panel, depth,
                                  to + done * kPanel, kPanel);
          }
        }
      }
      store_transposed(c, rows, cols, a.y + m * a.cols + n, a.cols);
    }
  }
}

template <Activation kActivation>
void finish_columns(const LinearArguments& a, int64_t first, int64_t last) {
  for (int64_t row = 0; row < a.rows; ++row) {
    float* y = a.y + row * a.cols;
    float* z_out = a.z != nullptr ? a.z + row * a.cols : nullptr;
    for (int64_t c = first; c < last; c += kWidth) {
      const int64_t n = last - c;
      Vf z = load_columns(y + c, n);
      if (a.bias != nullptr) z += load_columns(a.bias + c, n);
      if (z_out != nullptr) store_columns(z_out + c, z, n);
      store_columns(y + c, activate<kActivation>(z), n);
    }
  }
}

}  // namespace

int64_t linear_pack_scratch(int64_t rows, int64_t depth) {
  if (rows < kPanel) return 0;
  return round_up(rows, kPanel) * depth + 4 * (depth + kWidth);
}

void linear_pack(const LinearArguments& a, float* panels) {
  float* row_scratch = panels + round_up(a.rows, kPanel) * a.depth;
  pack_transposed(a.x, a.x_stride, a.rows, a.depth, panels, row_scratch);
}

void linear_fwd(const LinearArguments& a, const float* panels, int64_t first, int64_t last) {
  if (panels != nullptr) {
    multiply_packed_columns(a, panels, first, last);
  } else {
    multiply_columns(a, first, last);
  }
  switch (a.activation) {
    case Activation::kGelu:
      return finish_columns<Activation::kGelu>(a, first, last);
    case Activation::kGeluTanh:
      return finish_columns<Activation::kGeluTanh>(a, first, last);
    case Activation::kRelu:
      return finish_columns<Activation::kRelu>(a, first, last);
    case Activation::kNone:
      if (a.bias != nullptr || a.z != nullptr) finish_columns<Activation::kNone>(a, first, last);
  }
}

}  // namespace bertkern::BERTKERN_ISA
