// Sums over the rows of a matrix in an order that depends on the matrix alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "params.h"

namespace bertkern::cpu {

// Rows are cut into chunks of a fixed size, each chunk is summed in one order, and the chunks' sums
// are added in order: the result does not depend on the number of threads.
struct RowChunks {
  static constexpr int64_t kLeastRows = 64, kMostChunks = 256;
  int64_t rows, chunk_rows, count;

  explicit RowChunks(int64_t all_rows)
      : rows(all_rows),
        chunk_rows(std::max(kLeastRows, (all_rows + kMostChunks - 1) / kMostChunks)),
        count((all_rows + chunk_rows - 1) / chunk_rows) {}

  int64_t first(int64_t chunk) const { return chunk * chunk_rows; }
  int64_t last(int64_t chunk) const { return std::min(rows, (chunk + 1) * chunk_rows); }
};

// Rows of an item where nothing is summed: about 16 K elements.
inline int64_t rows_per_item(int64_t cols) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols));
}

inline int64_t padded_cols(int64_t cols) { return (cols + 15) / 16 * 16 + 16; }

// Column sums of every chunk: [chunks, 2, stride], a sum and what its rounding lost.
struct ChunkSums {
  int64_t stride;
  std::vector<float> memory;  // empty where the sums are not wanted

  ChunkSums(const RowChunks& chunks, int64_t cols, bool wanted)
      : stride(padded_cols(cols)), memory(wanted ? chunks.count * 2 * stride : 0) {}

  float* of(int64_t chunk) { return memory.empty() ? nullptr : memory.data() + chunk * 2 * stride; }

  // target [cols] in `dtype` = the sum over all chunks, in order and with compensation.
  void add_up(int64_t cols, void* target, DType dtype, int threads) const {
    constexpr int64_t kCols = 256;
    const int64_t rows = static_cast<int64_t>(memory.size()) / stride;
    parallel_for((cols + kCols - 1) / kCols, rows * cols < 32768 ? 1 : threads, [&](int64_t part) {
      float sum[kCols + 16] = {}, lost[kCols] = {};
      const int64_t first = part * kCols, count = std::min(kCols, cols - first);
      for (int64_t i = 0; i < rows; ++i) {
        const float* row = memory.data() + i * stride + first;
        for (int64_t c = 0; c < count; ++c) {
          const float after = sum[c] + row[c];
          const float added = after - sum[c];
          lost[c] += (sum[c] - (after - added)) + (row[c] - added);
          sum[c] = after;
        }
      }
      for (int64_t c = 0; c < count; ++c) sum[c] += lost[c] == lost[c] ? lost[c] : 0.0f;
      kernels().from_float(sum, static_cast<char*>(target) + first * element_bytes(dtype), dtype,
                           count);
    });
  }
};

// A vector as fp32 with room for whole SIMD vectors; `data` is null where the vector is absent.
struct FloatVector {
  std::vector<float> memory;
  const float* data = nullptr;

  FloatVector(const void* source, DType dtype, int64_t count) {
    if (source == nullptr) return;
    memory.resize(padded_cols(count));
    kernels().to_float(source, dtype, memory.data(), count);
    data = memory.data();
  }
};

}  // namespace bertkern::cpu
