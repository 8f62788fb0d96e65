// The CPU ops as bindings.cpp calls them: they check lengths, bring scratch memory and threads, and
// fill every output completely. They throw std::invalid_argument and std::bad_alloc.
#pragma once

#include "params.h"

namespace bertkern::cpu {

void attention_fwd(const AttentionArguments& arguments, int threads);
void attention_bwd(const AttentionArguments& arguments, int threads);

void layer_norm_fwd(const NormArguments& arguments, int threads);
void embedding_layer_norm_fwd(const EmbeddingArguments& arguments, int threads);
// dweight and dbias [cols] in weight's and bias's dtype; null: not wanted.
void layer_norm_bwd(const NormGradArguments& arguments, void* dweight, void* dbias,
                    DType bias_dtype, int threads);

// For few rows; a product of many is faster by a library's.
void linear_fwd(const LinearArguments& arguments, int threads);
void bias_act_fwd(const ActArguments& arguments, int threads);
void act_bwd(const ActGradArguments& arguments, void* dbias, DType bias_dtype, int threads);

}  // namespace bertkern::cpu
