// Tensor maps of what the attention kernels for Hopper read, and whether there can be any.
#pragma once

#include <string>

#include "common/attention_params.h"
#include "cuda/tensor_map.h"

namespace bertkern::cuda {

// A tensor [B, S, H, D], or [T, H, D] with T rows and one sequence.
struct Rows {
  const char* name;
  const DeviceTensor* tensor;
  int64_t count, heads, batch;
};

inline Rows query_rows(const AttentionKernelArguments& a, const char* name,
                       const DeviceTensor& tensor) {
  if (a.cu_seqlens_q != nullptr) return {name, &tensor, a.total_q, a.heads, 1};
  return {name, &tensor, a.seqlen_q, a.heads, a.batch};
}

inline Rows key_rows(const AttentionKernelArguments& a, const char* name,
                     const DeviceTensor& tensor) {
  if (a.cu_seqlens_k != nullptr) return {name, &tensor, a.total_k, a.key_heads, 1};
  return {name, &tensor, a.seqlen_k, a.key_heads, a.batch};
}

inline bool reached(const Rows& rows) {
  const auto apart = [](int64_t size, int64_t stride) { return size == 1 || stride > 0; };
  return rows.count > 0 && rows.heads > 0 && rows.batch > 0 &&
         apart(rows.count, rows.tensor->token) && apart(rows.heads, rows.tensor->head) &&
         apart(rows.batch, rows.tensor->batch);
}

template <typename Tile>
TensorMap map_of(const Rows& rows, int head_dim, DType dtype, int tile_rows) {
  const DeviceTensor& t = *rows.tensor;
  return make_tensor_map({t.data,
                          dtype,
                          4,
                          {head_dim, rows.heads, rows.count, rows.batch},
                          {1, t.head, t.token, t.batch},
                          {Tile::kSpan, 1, tile_rows, 1},
                          Tile::kSwizzle},
                         std::string("attention: the tensor map of ") + rows.name);
}

}  // namespace bertkern::cuda
