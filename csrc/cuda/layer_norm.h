// The CUDA LayerNorm ops as cuda/bindings.cpp calls them. They throw std::invalid_argument for what
// they cannot take and std::runtime_error, with CUDA's own message, when a launch fails.
#pragma once

#include "common/dtype.h"
#include "common/norm_params.h"

namespace bertkern::cuda {

int64_t layer_norm_max_cols();
// P, the rows of `partial` [P, 2, cols] of a backward.
int64_t layer_norm_partials(int64_t rows);

// Of `rows` in the arguments, count and cols are given.
void layer_norm_fwd(NormKernelArguments arguments, DType dtype, DType weight_dtype, int device,
                    void* stream);
void layer_norm_bwd(NormGradKernelArguments arguments, void* dweight, void* dbias, DType dtype,
                    DType weight_dtype, int device, void* stream);

// The second half of a backward: adds the partial sums of its blocks. `dtype` of dweight and dbias.
void layer_norm_bwd_sum(const NormSumArguments& arguments, DType dtype, void* stream);

}  // namespace bertkern::cuda
