// The CUDA attention ops as cuda/bindings.cpp calls them. They throw std::invalid_argument for what
// they cannot take and std::runtime_error, with CUDA's own message, when a launch fails.
#pragma once

#include "common/attention_params.h"
#include "common/dtype.h"

namespace bertkern::cuda {

// Of the arguments, the functions set least_keys, most_keys and blocks themselves. Forward: out and
// lse are written. Backward: delta, dq, dk, dv and, unless null, dbias. Every element of what is
// written is written. In varlen `order` is scratch, forward [B], backward [2, B].
void attention_fwd(const AttentionKernelArguments& arguments, DType dtype, int device,
                   void* stream);
void attention_bwd(const AttentionKernelArguments& arguments, DType dtype, int device,
                   void* stream);

}  // namespace bertkern::cuda
