// The table of instantiations: what is compiled of the attention kernels, and what a call takes.
//
//   fwd, bwd_short, bwd_queries, bwd_keys: fp16 and bf16 x the padded head dims 32, 64, 96, 128 x
//   the three variants of AttentionVariant;  bwd_bias: fp16 and bf16 x the head dims
//
// Their tiles are AttentionTiles of common/attention_params.h.
#pragma once

#include "common/attention_params.h"
#include "common/dtype.h"
#include "ptx/memory.cuh"

namespace bertkern::cuda {

template <AttentionVariant kValue>
struct VariantConstant {
  static constexpr AttentionVariant value = kValue;
};

// Calls body(T{}, AttentionTiles<kHeadDim>{}).
template <typename Body>
void with_tiles(DType dtype, int head_dim, Body body) {
  const auto with_head_dim = [&](auto type) {
    if (head_dim <= 32) return body(type, AttentionTiles<32>{});
    if (head_dim <= 64) return body(type, AttentionTiles<64>{});
    if (head_dim <= 96) return body(type, AttentionTiles<96>{});
    return body(type, AttentionTiles<128>{});
  };
  if (dtype == DType::kFloat16) return with_head_dim(ptx::half{});
  with_head_dim(ptx::bfloat16{});
}

// On the plain path scale · log2(e) is one factor, and max(factor · x) = factor · max(x) only for a
// positive one.
template <typename Body>
void with_variant(const AttentionKernelArguments& a, Body body) {
  if (a.bias_kind != DeviceBias::kNone || a.softcap != 0.0f || !(a.scale > 0.0f)) {
    return body(VariantConstant<AttentionVariant::kGeneral>{});
  }
  if (a.dropout_threshold != 0) return body(VariantConstant<AttentionVariant::kDropout>{});
  body(VariantConstant<AttentionVariant::kPlain>{});
}

}  // namespace bertkern::cuda
