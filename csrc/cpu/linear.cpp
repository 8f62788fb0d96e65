// CPU linear of few rows: from tensors to work items, which are ranges of columns.
#include <algorithm>

#include "cpu.h"
#include "parallel.h"

namespace bertkern::cpu {
namespace {

constexpr int64_t kMostColumns = 48;  // a stretch of so many rows of w stays in the second cache
constexpr int64_t kColumnsMultiple = 24;  // of the columns of every tile and group
constexpr int64_t kItemsPerThread = 4;

}  // namespace

void linear_fwd(const LinearArguments& a, int threads) {
  threads = threads_for(a.rows * a.cols * a.depth, threads);
  const int64_t share = a.cols / (threads * kItemsPerThread) / kColumnsMultiple * kColumnsMultiple;
  const int64_t columns = std::clamp(share, kColumnsMultiple, kMostColumns);
  const Kernels& table = kernels();
  const int64_t floats = table.linear_pack_scratch(a.rows, a.depth);
  float* panels = floats > 0 ? thread_scratch(floats) : nullptr;
  if (panels != nullptr) table.linear_pack(a, panels);
  parallel_for((a.cols + columns - 1) / columns, threads, [&](int64_t item) {
    const int64_t first = item * columns;
    table.linear_fwd(a, panels, first, std::min(a.cols, first + columns));
  });
}

}  // namespace bertkern::cpu
