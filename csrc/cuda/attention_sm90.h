// Attention for Hopper, by the kernels of sm90/; attention.h asks for it where a call suits.
#pragma once

#include "common/attention_params.h"
#include "common/dtype.h"

namespace bertkern::cuda {

// Whether the copy engine can reach the tensors: it knows no empty ones, and none whose rows lie on
// top of each other (stride 0).
bool attention_fwd_suits_sm90(const AttentionKernelArguments& arguments);

bool attention_bwd_suits_sm90(const AttentionKernelArguments& arguments);

// As attention_fwd, on the current device, of which `multiprocessors` are to be used.
void attention_fwd_sm90(const AttentionKernelArguments& arguments, DType dtype, int multiprocessors,
                        void* stream);

// Has the sequences of a varlen batch put into `order` [B], the longest first, and returns it; null
// where there is nothing to put in order: no varlen, or one sequence.
int32_t* order_sequences(const int32_t* cu_seqlens, int batch, int32_t* order, void* stream);

// As attention_bwd but for dbias, on the current device, of which `multiprocessors` are to be used.
void attention_bwd_sm90(const AttentionKernelArguments& arguments, DType dtype, int multiprocessors,
                        void* stream);

}  // namespace bertkern::cuda
