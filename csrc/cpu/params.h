// Arguments of the CPU kernels, and the table of kernels of one instruction set.
//
// The files *_kernels.cpp are compiled once per instruction set, each time into a namespace of its
// own, and give one `Kernels` table. They hold no memory, no threads and nothing of the C++
// library: a copy of a library template compiled for AVX-512 must not become the program's only
// copy. attention.cpp, layer_norm.cpp, linear.cpp and ffn.cpp, compiled once for the baseline,
// bring scratch memory and threads.
#pragma once

#include <cstdint>

#include "../common/dropout.h"
#include "../common/dtype.h"

namespace bertkern {

struct Dropout {
  uint32_t threshold;  // 0: off
  float scale;
  uint64_t seed;
};

// One tensor [B, S, H, D] or [T, H, D] by its strides in elements; the last one is 1.
struct Strided {
  void* data;
  int64_t batch, seq, head;
};

enum class BiasKind : int { kNone, kMask, kFloat32, kSame };  // kSame: in the tensors' dtype

// A bias [B or 1, H or 1, Sq or 1, Sk or 1] by its sizes and strides; a size of 1 has stride 0.
struct Bias {
  BiasKind kind;
  const void* data;
  void* grad;  // contiguous; null: not wanted
  int64_t sizes[4], strides[4];
};

constexpr int64_t kNoLimit = int64_t{1} << 40;  // a window's side that is open

struct AttentionArguments {
  Strided q, k, v, out;
  Strided dout, dq, dk, dv;  // backward only
  float* lse;                // [B, H, Sq] or [H, Tq]
  const float* dlse;         // backward only; may be null
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  const int32_t* key_lengths;
  const uint8_t* key_padding_mask;  // [B, Sk]; may be null
  Bias bias;
  int64_t batch, seqlen_q, seqlen_k, heads, key_heads, head_dim;
  DType dtype;
  int causal;
  int64_t window_left, window_right;  // -1: no limit
  float softcap, scale;
  Dropout dropout;
  int64_t sequence_offset;
};

// One (sequence, head): pointers to its first rows. Keys that no query sees, before the first that
// one does, are not there: key 0 is the sequence's key first_key.
struct AttentionHead {
  const void *q, *k, *v;
  void* out;
  const void* dout;
  void *dq, *dk, *dv;
  bool float_sums;    // dk and dv are fp32, whatever the other tensors are
  float* lse;         // stride 1 over queries
  const float* dlse;  // may be null
  int64_t len_q, len_k, first_key;
  int64_t q_row, k_row, v_row, out_row, dout_row, dq_row, dk_row, dv_row;  // strides over tokens
  int64_t low, high;    // query i sees key j when i + low <= j <= i + high
  const uint8_t* kept;  // [len_k]: 0 for a key that is padding; null: none is
  BiasKind bias_kind;
  const void* bias;
  int64_t bias_row, bias_key;  // strides
  // fp32, dbias_floats of them, completely written; null: not wanted. A stride of 0 sums.
  float* dbias;
  int64_t dbias_row, dbias_key, dbias_floats;
  int head_dim;
  float softcap, scale;
  uint32_t dropout_threshold;
  float dropout_scale;
  DropoutStream stream;
};

struct NormArguments {
  const void *x, *residual, *weight, *bias;
  void *y, *z;
  float *mean, *rstd;
  const int64_t* dropout_rows;
  int64_t x_stride, residual_stride, rows, cols;
  DType dtype, weight_dtype, bias_dtype;
  float eps;
  Dropout dropout;
};

// y = dropout(LayerNorm(word[id] + position[p] + type[t])): the tables' rows, dtype `norm.dtype`,
// and which of them each row of y sums; type_ids null: row 0. Of `norm` x, residual and z are not
// used.
struct EmbeddingArguments {
  const int64_t *ids, *position_ids, *type_ids;
  const void *word, *position, *type;
  int64_t word_stride, position_stride, type_stride;
  NormArguments norm;
};

struct NormGradArguments {
  const void *dy, *dz, *z, *weight;
  const float *mean, *rstd;
  void *dx, *dresidual;
  const int64_t* dropout_rows;
  int64_t dy_stride, dz_stride, z_stride, rows, cols;
  DType dtype, weight_dtype;
  Dropout dropout;
};

struct ActArguments {
  const void *x, *bias, *residual;
  void *y, *z;
  const int64_t* dropout_rows;
  int64_t x_stride, residual_stride, rows, cols;
  DType dtype, bias_dtype;
  Activation activation;
  Dropout dropout;
};

struct ActGradArguments {
  const void *dy, *z;
  void* dz;
  const int64_t* dropout_rows;
  int64_t dy_stride, z_stride, rows, cols;
  DType dtype;
  Activation activation;
  Dropout dropout;
};

// z = x wᵀ + bias, y = act(z), all fp32: x [rows, depth], w [cols, depth], y and z [rows, cols],
// contiguous; bias and z may be null.
struct LinearArguments {
  const float *x, *w, *bias;
  float *y, *z;
  int64_t x_stride, w_stride, rows, cols, depth;
  Activation activation;
};

// Kernels of one instruction set. Scratch is 64-byte aligned fp32; *_scratch says how many floats.
struct Kernels {
  const char* isa;
  int64_t (*attention_fwd_scratch)(int64_t max_queries, int64_t max_keys, int head_dim);
  // Queries [first, last) of one head.
  void (*attention_fwd)(const AttentionHead&, DType, int64_t first, int64_t last, float* scratch);
  int64_t (*attention_bwd_scratch)(int64_t max_queries, int64_t max_keys, int head_dim);
  void (*attention_bwd)(const AttentionHead&, DType, float* scratch);
  // Rows [first, last). weight, bias: fp32, or null. scratch: row_scratch(cols) floats.
  void (*layer_norm_fwd)(const NormArguments&, const float* weight, const float* bias,
                         int64_t first, int64_t last, float* scratch);
  void (*embedding_layer_norm_fwd)(const EmbeddingArguments&, const float* weight,
                                   const float* bias, int64_t first, int64_t last, float* scratch);
  // dweight, dbias: fp32 [2, padded cols], zero before: the sums over these rows and what their
  // rounding lost; or null.
  void (*layer_norm_bwd)(const NormGradArguments&, const float* weight, float* dweight,
                         float* dbias, int64_t first, int64_t last, float* scratch);
  void (*bias_act_fwd)(const ActArguments&, const float* bias, int64_t first, int64_t last);
  void (*act_bwd)(const ActGradArguments&, float* dbias, int64_t first, int64_t last);
  // Floats that x takes as panels; 0: so few rows need none.
  int64_t (*linear_pack_scratch)(int64_t rows, int64_t depth);
  void (*linear_pack)(const LinearArguments&, float* panels);
  // Columns [first, last) of every row. panels: what linear_pack wrote; null where none are needed.
  void (*linear_fwd)(const LinearArguments&, const float* panels, int64_t first, int64_t last);
  // Casts between fp32 and `dtype`. The fp32 side has room for whole vectors: up to 15 floats more.
  void (*to_float)(const void* source, DType, float* target, int64_t count);
  void (*from_float)(const float* source, void* target, DType, int64_t count);
};

// Scratch floats for a kernel that works on rows of `cols` elements: up to four rows in fp32,
// padded.
inline int64_t row_scratch(int64_t cols) { return 4 * ((cols + 15) / 16 * 16 + 16); }

// The table in use; see isa.cpp.
const Kernels& kernels();
const char* const* available_isas(int* count);
bool use_isa(const char* name);  // false: not compiled in, or this processor lacks it

}  // namespace bertkern
