// CPU LayerNorm: from tensors to work items, which are ranges of rows.
#include "cpu.h"
#include "row_chunks.h"

namespace bertkern::cpu {

namespace {

constexpr int64_t kItemsPerThread = 4;

// kernel(weight, bias, first, last, scratch) for every range of rows, weight and bias in fp32.
template <typename Kernel>
void normalise_rows(const NormArguments& a, int threads, const Kernel& kernel) {
  const FloatVector weight(a.weight, a.weight_dtype, a.cols);
  const FloatVector bias(a.bias, a.bias_dtype, a.cols);
  // Long runs of rows: memory next to each other is one thread's, and its next pages are fetched.
  const int64_t step = std::max(rows_per_item(a.cols), a.rows / (kItemsPerThread * threads));
  parallel_for((a.rows + step - 1) / step, threads, [&](int64_t item) {
    const int64_t first = item * step, last = std::min(a.rows, first + step);
    kernel(weight.data, bias.data, first, last, thread_scratch(row_scratch(a.cols)));
  });
}

}  // namespace

void layer_norm_fwd(const NormArguments& a, int threads) {
  const Kernels& table = kernels();
  normalise_rows(a, threads, [&](const auto&... range) { table.layer_norm_fwd(a, range...); });
}

void embedding_layer_norm_fwd(const EmbeddingArguments& e, int threads) {
  const Kernels& table = kernels();
  normalise_rows(e.norm, threads,
                 [&](const auto&... range) { table.embedding_layer_norm_fwd(e, range...); });
}

void layer_norm_bwd(const NormGradArguments& a, void* dweight, void* dbias, DType bias_dtype,
                    int threads) {
  const FloatVector weight(a.weight, a.weight_dtype, a.cols);
  const RowChunks chunks(a.rows);
  ChunkSums weight_sums(chunks, a.cols, dweight != nullptr);
  ChunkSums bias_sums(chunks, a.cols, dbias != nullptr);
  const Kernels& table = kernels();
  parallel_for(chunks.count, threads, [&](int64_t i) {
    table.layer_norm_bwd(a, weight.data, weight_sums.of(i), bias_sums.of(i), chunks.first(i),
                         chunks.last(i), thread_scratch(row_scratch(a.cols)));
  });
  if (dweight != nullptr) weight_sums.add_up(a.cols, dweight, a.weight_dtype, threads);
  if (dbias != nullptr) bias_sums.add_up(a.cols, dbias, bias_dtype, threads);
}

}  // namespace bertkern::cpu
