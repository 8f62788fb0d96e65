// CUDA attention: argument checks, choice of the kernels, launch of those in sm80/;
// attention_sm90.cu launches those in sm90/. What is compiled of sm80's is named in
// attention_table.h.
#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/attention.h"
#include "cuda/attention_sm90.h"
#include "cuda/attention_table.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/sm80/attention_bwd_bias.cuh"
#include "cuda/sm80/attention_bwd_keys.cuh"
#include "cuda/sm80/attention_bwd_queries.cuh"
#include "cuda/sm80/attention_fwd.cuh"

namespace bertkern::cuda {
namespace {

void check_tensor(const char* name, const DeviceTensor& t) {
  if (reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch % 8 == 0 && t.token % 8 == 0 &&
      t.head % 8 == 0) {
    return;
  }
  throw std::invalid_argument(std::string(name) + " has strides (" + std::to_string(t.batch) +
                              ", " + std::to_string(t.token) + ", " + std::to_string(t.head) +
                              ") from an address that is " +
                              std::to_string(reinterpret_cast<uintptr_t>(t.data) % 16) +
                              " modulo 16; rows must start on multiples of 16 bytes");
}

void check(const AttentionKernelArguments& a, DType dtype) {
  if (dtype == DType::kFloat32) {
    throw std::invalid_argument("dtype is FLOAT32; allowed are FLOAT16 and BFLOAT16");
  }
  if (a.head_dim < 8 || a.head_dim > kAttentionMaxHeadDim || a.head_dim % 8 != 0) {
    throw std::invalid_argument("head_dim is " + std::to_string(a.head_dim) +
                                "; allowed are the multiples of 8 up to " +
                                std::to_string(kAttentionMaxHeadDim));
  }
  if (a.heads > 0 && (a.key_heads == 0 || a.heads % a.key_heads != 0)) {
    throw std::invalid_argument("heads is " + std::to_string(a.heads) +
                                "; it must be a multiple of key_heads, " +
                                std::to_string(a.key_heads));
  }
  for (const auto& [name, tensor] : {std::pair{"q", &a.q},
                                     {"k", &a.k},
                                     {"v", &a.v},
                                     {"out", &a.out},
                                     {"dout", &a.dout},
                                     {"dq", &a.dq},
                                     {"dk", &a.dk},
                                     {"dv", &a.dv}}) {
    check_tensor(name, *tensor);
  }
}

int tiles_of(int length, int tile) { return std::max(1, (length + tile - 1) / tile); }

// In varlen one more "sequence" holds the rows behind the last one.
int64_t sequences(const AttentionKernelArguments& a) {
  return static_cast<int64_t>(a.batch) + (a.cu_seqlens_q != nullptr ? 1 : 0);
}

template <typename Tile>
void launch_attention(void (*kernel)(AttentionKernelArguments), AttentionKernelArguments a,
                      int blocks, int64_t heads_and_sequences, int shared_bytes, void* stream,
                      const char* what) {
  a.blocks = blocks;
  launch(kernel, {blocks * heads_and_sequences, Tile::kThreads, shared_bytes}, a, stream, what);
}

template <typename T, typename Tiles, AttentionVariant kVariant>
void launch_bwd(AttentionKernelArguments a, void* stream) {
  using Short = typename Tiles::BwdShort;
  using Keys = typename Tiles::BwdKeys;
  using Queries = typename Tiles::BwdQueries;
  // Which kernel computes a sequence follows from its own number of keys. Where that differs within
  // a batch both are launched, each leaving out the sequences of the other.
  const bool own_lengths = a.cu_seqlens_k != nullptr || a.key_lengths != nullptr;
  const bool some_long = a.seqlen_k > Short::kRows;
  const int64_t short_sequences = some_long ? a.batch : sequences(a);
  const bool some_short = (own_lengths || !some_long) && short_sequences > 0;
  if (some_short) {
    AttentionKernelArguments part = a;
    part.least_keys = 0;
    part.most_keys = Short::kRows;
    launch_attention<Short>(sm80::attention_bwd_keys_kernel<T, Short, kVariant, true>, part, 1,
                            a.key_heads * short_sequences,
                            sm80::attention_bwd_keys_shared_bytes<Short, true>(), stream,
                            "attention_bwd_short");
  }
  if (!some_long) return;
  a.least_keys = Short::kRows + 1;
  a.most_keys = INT_MAX;
  launch_attention<Queries>(sm80::attention_bwd_queries_kernel<T, Queries, kVariant>, a,
                            tiles_of(a.seqlen_q, Queries::kRows), a.heads * sequences(a),
                            sm80::attention_bwd_queries_shared_bytes<Queries>(), stream,
                            "attention_bwd_queries");
  launch_attention<Keys>(sm80::attention_bwd_keys_kernel<T, Keys, kVariant, false>, a,
                         tiles_of(a.seqlen_k, Keys::kRows), a.key_heads * sequences(a),
                         sm80::attention_bwd_keys_shared_bytes<Keys, false>(), stream,
                         "attention_bwd_keys");
}

}  // namespace

void attention_fwd(const AttentionKernelArguments& a, DType dtype, int device, void* stream) {
  check(a, dtype);
  if (a.heads == 0 || sequences(a) == 0) return;
  const DeviceGuard guard(device);
  if (capability(device) == 90 && attention_fwd_suits_sm90(a)) {
    return attention_fwd_sm90(a, dtype, multiprocessors(device), stream);
  }
  with_tiles(dtype, a.head_dim, [&](auto type, auto tiles) {
    using T = decltype(type);
    with_variant(a, [&](auto variant) {
      using Tile =
          std::conditional_t<decltype(variant)::value == AttentionVariant::kGeneral,
                             typename decltype(tiles)::FwdGeneral, typename decltype(tiles)::Fwd>;
      launch_attention<Tile>(sm80::attention_fwd_kernel<T, Tile, decltype(variant)::value>, a,
                             tiles_of(a.seqlen_q, Tile::kRows), a.heads * sequences(a),
                             sm80::attention_fwd_shared_bytes<Tile>(), stream, "attention_fwd");
    });
  });
}

void attention_bwd(const AttentionKernelArguments& a, DType dtype, int device, void* stream) {
  check(a, dtype);
  if (a.heads == 0 || sequences(a) == 0) return;
  const DeviceGuard guard(device);
  with_tiles(dtype, a.head_dim, [&](auto type, auto tiles) {
    using T = decltype(type);
    using Tiles = decltype(tiles);
    if (capability(device) == 90 && attention_bwd_suits_sm90(a)) {
      attention_bwd_sm90(a, dtype, multiprocessors(device), stream);
    } else {
      with_variant(
          a, [&](auto variant) { launch_bwd<T, Tiles, decltype(variant)::value>(a, stream); });
    }
    const int64_t elements =
        static_cast<int64_t>(a.bias_sizes[0]) * a.bias_sizes[1] * a.bias_sizes[2] * a.bias_sizes[3];
    if (a.dbias == nullptr || elements == 0) return;
    using Tile = typename Tiles::BwdBias;
    launch(sm80::attention_bwd_bias_kernel<T, Tile>,
           {sm80::attention_bwd_bias_blocks<Tile>(a.bias_sizes), Tile::kThreads,
            sm80::attention_bwd_bias_shared_bytes<Tile>()},
           a, stream, "attention_bwd_bias");
  });
}

}  // namespace bertkern::cuda
