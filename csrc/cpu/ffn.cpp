// CPU bias, activation, dropout and residual: from tensors to work items, which are ranges of rows.
#include "cpu.h"
#include "row_chunks.h"

namespace bertkern::cpu {

void bias_act_fwd(const ActArguments& a, int threads) {
  const FloatVector bias(a.bias, a.bias_dtype, a.cols);
  const Kernels& table = kernels();
  const int64_t step = rows_per_item(a.cols);
  parallel_for((a.rows + step - 1) / step, threads, [&](int64_t item) {
    const int64_t first = item * step;
    table.bias_act_fwd(a, bias.data, first, std::min(a.rows, first + step));
  });
}

void act_bwd(const ActGradArguments& a, void* dbias, DType bias_dtype, int threads) {
  const RowChunks chunks(a.rows);
  ChunkSums sums(chunks, a.cols, dbias != nullptr);
  const Kernels& table = kernels();
  parallel_for(chunks.count, threads,
               [&](int64_t i) { table.act_bwd(a, sums.of(i), chunks.first(i), chunks.last(i)); });
  if (dbias != nullptr) sums.add_up(a.cols, dbias, bias_dtype, threads);
}

}  // namespace bertkern::cpu
