// The CUDA op embedding_layer_norm as cuda/bindings.cpp calls it; it throws as layer_norm.h says.
#pragma once

#include "common/dtype.h"
#include "common/norm_params.h"

namespace bertkern::cuda {

// Chunks of sorted keys, rows of `partial` [chunks, 2, dz_stride] of table_gradients.
int64_t embedding_layer_norm_chunks(int64_t tokens);

// Of `rows` in the arguments, count and cols are given.
void embedding_layer_norm_fwd(EmbeddingKernelArguments arguments, DType dtype, DType weight_dtype,
                              int device, void* stream);

// A backward is these three in this order; between the first and the last the caller sorts the
// keys.
void embedding_layer_norm_keys(const EmbeddingKeyArguments& arguments, int device, void* stream);
void embedding_layer_norm_bwd(EmbeddingGradKernelArguments arguments, void* dweight, void* dbias,
                              DType dtype, DType weight_dtype, int device, void* stream);
// sum_blocks and aligned are not the caller's to give.
void embedding_layer_norm_tables(TableGradArguments arguments, DType dtype, int device,
                                 void* stream);

}  // namespace bertkern::cuda
