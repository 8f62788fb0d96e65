// bertkern._C: one function per native op. The contents page of everything compiled.
//
// Tensors come as addresses (0: absent), sizes and strides in elements; bertkern/_C.pyi says the
// shapes and dtypes of each argument. The GIL is released while an op works.
#include "bindings.h"

#include "cpu/cpu.h"
#include "cpu/fma_rate.h"
#include "cpu/parallel.h"
#include "usual_call.h"

namespace bertkern {
namespace {

Strided strided(Address address, const Strides& strides) {
  return {at(address), std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
}

Dropout dropout_of(uint32_t threshold, float scale, int64_t seed) {
  return {threshold, scale, static_cast<uint64_t>(seed)};
}

Bias bias_of(Address bias, const FourSizes& sizes, const FourSizes& strides,
             std::optional<DType> bias_dtype, Address dbias, int64_t batch, int64_t heads,
             DType dtype) {
  Bias b{};
  if (bias == 0) return b;
  check((sizes[0] == 1 || sizes[0] == batch) && (sizes[1] == 1 || sizes[1] == heads),
        "bias_sizes must begin with batch or 1, and heads or 1");
  check(!bias_dtype || *bias_dtype == DType::kFloat32 || *bias_dtype == dtype,
        "bias_dtype must be None (bool), FLOAT32 or dtype");
  check(bias_dtype || dbias == 0, "a bool bias has no gradient");
  b.kind = !bias_dtype                      ? BiasKind::kMask
           : *bias_dtype == DType::kFloat32 ? BiasKind::kFloat32
                                            : BiasKind::kSame;
  b.data = at(bias);
  b.grad = at(dbias);
  for (int i = 0; i < 4; ++i) {
    b.sizes[i] = sizes[i];
    b.strides[i] = sizes[i] == 1 ? 0 : strides[i];
  }
  return b;
}

AttentionArguments attention_arguments(Address key_padding_mask, Address cu_seqlens_q,
                                       Address cu_seqlens_k, Address key_lengths, int64_t batch,
                                       int64_t seqlen_q, int64_t seqlen_k, int64_t heads,
                                       int64_t key_heads, int64_t head_dim, DType dtype, int causal,
                                       int64_t window_left, int64_t window_right, float softcap,
                                       float scale, const Dropout& dropout,
                                       int64_t sequence_offset) {
  check(head_dim >= 1 && head_dim <= 256,
        "head_dim is " + std::to_string(head_dim) + "; allowed are 1 to 256");
  check(causal >= 0 && causal <= 2,
        "causal is " + std::to_string(causal) + "; allowed are 0, 1 (bottom right), 2 (top left)");
  check((cu_seqlens_q == 0) == (cu_seqlens_k == 0),
        "cu_seqlens_q and cu_seqlens_k must both be given, or neither");
  check(cu_seqlens_q == 0 || key_padding_mask == 0,
        "key_padding_mask is for the batched layout; cu_seqlens_q must not be given with it");
  check(batch >= 0 && seqlen_q >= 0 && seqlen_k >= 0 && heads >= 0 && key_heads >= 0,
        "sizes must not be negative");
  check(key_heads == heads || (key_heads > 0 && heads % key_heads == 0),
        "heads is " + std::to_string(heads) + "; it must be a multiple of key_heads, " +
            std::to_string(key_heads));
  check(window_left >= -1 && window_right >= -1, "a window's sides must be -1 (no limit) or more");
  check(softcap >= 0, "softcap must be 0 (none) or positive");
  AttentionArguments a{};
  a.key_padding_mask = at<const uint8_t>(key_padding_mask);
  a.cu_seqlens_q = at<const int32_t>(cu_seqlens_q);
  a.cu_seqlens_k = at<const int32_t>(cu_seqlens_k);
  a.key_lengths = at<const int32_t>(key_lengths);
  a.batch = batch;
  a.seqlen_q = seqlen_q;
  a.seqlen_k = seqlen_k;
  a.heads = heads;
  a.key_heads = key_heads;
  a.head_dim = head_dim;
  a.dtype = dtype;
  a.causal = causal;
  a.window_left = window_left;
  a.window_right = window_right;
  a.softcap = softcap;
  a.scale = scale;
  a.dropout = dropout;
  a.sequence_offset = sequence_offset;
  return a;
}

void cpu_attention_fwd(Address q, Address k, Address v, Address out, Address lse, Address bias,
                       Strides q_strides, Strides k_strides, Strides v_strides, Strides out_strides,
                       FourSizes bias_sizes, FourSizes bias_strides,
                       std::optional<DType> bias_dtype, Address key_padding_mask,
                       Address cu_seqlens_q, Address cu_seqlens_k, Address key_lengths,
                       int64_t batch, int64_t seqlen_q, int64_t seqlen_k, int64_t heads,
                       int64_t key_heads, int64_t head_dim, DType dtype, int causal,
                       int64_t window_left, int64_t window_right, float softcap, float scale,
                       uint32_t dropout_threshold, float dropout_scale, int64_t dropout_seed,
                       int64_t sequence_offset, int threads) {
  AttentionArguments a = attention_arguments(
      key_padding_mask, cu_seqlens_q, cu_seqlens_k, key_lengths, batch, seqlen_q, seqlen_k, heads,
      key_heads, head_dim, dtype, causal, window_left, window_right, softcap, scale,
      dropout_of(dropout_threshold, dropout_scale, dropout_seed), sequence_offset);
  a.q = strided(q, q_strides);
  a.k = strided(k, k_strides);
  a.v = strided(v, v_strides);
  a.out = strided(out, out_strides);
  a.bias = bias_of(bias, bias_sizes, bias_strides, bias_dtype, 0, batch, heads, dtype);
  a.lse = at<float>(lse);
  cpu::attention_fwd(a, threads);
}

void cpu_attention_bwd(Address dout, Address q, Address k, Address v, Address out, Address lse,
                       Address dlse, Address bias, Address dq, Address dk, Address dv,
                       Address dbias, Strides dout_strides, Strides q_strides, Strides k_strides,
                       Strides v_strides, Strides out_strides, FourSizes bias_sizes,
                       FourSizes bias_strides, std::optional<DType> bias_dtype,
                       Address key_padding_mask, Address cu_seqlens_q, Address cu_seqlens_k,
                       Address key_lengths, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                       int64_t heads, int64_t key_heads, int64_t head_dim, DType dtype, int causal,
                       int64_t window_left, int64_t window_right, float softcap, float scale,
                       uint32_t dropout_threshold, float dropout_scale, int64_t dropout_seed,
                       int64_t sequence_offset, int threads) {
  AttentionArguments a = attention_arguments(
      key_padding_mask, cu_seqlens_q, cu_seqlens_k, key_lengths, batch, seqlen_q, seqlen_k, heads,
      key_heads, head_dim, dtype, causal, window_left, window_right, softcap, scale,
      dropout_of(dropout_threshold, dropout_scale, dropout_seed), sequence_offset);
  const int64_t token = heads * head_dim, key_token = key_heads * head_dim;
  a.q = strided(q, q_strides);
  a.k = strided(k, k_strides);
  a.v = strided(v, v_strides);
  a.out = strided(out, out_strides);
  a.dout = strided(dout, dout_strides);
  a.dq = strided(dq, {seqlen_q * token, token, head_dim});
  a.dk = strided(dk, {seqlen_k * key_token, key_token, head_dim});
  a.dv = strided(dv, {seqlen_k * key_token, key_token, head_dim});
  a.bias = bias_of(bias, bias_sizes, bias_strides, bias_dtype, dbias, batch, heads, dtype);
  a.lse = at<float>(lse);
  a.dlse = at<const float>(dlse);
  cpu::attention_bwd(a, threads);
}

void cpu_layer_norm_fwd(Address x, Address residual, Address weight, Address bias, Address y,
                        Address z, Address mean, Address rstd, Address dropout_rows,
                        int64_t x_stride, int64_t residual_stride, int64_t rows, int64_t cols,
                        DType dtype, DType weight_dtype, DType bias_dtype, float eps,
                        uint32_t dropout_threshold, float dropout_scale, int64_t dropout_seed,
                        int threads) {
  check_residual(residual, z, dropout_threshold, rows, cols);
  const Dropout dropout = dropout_of(dropout_threshold, dropout_scale, dropout_seed);
  cpu::layer_norm_fwd({at(x), at(residual), at(weight), at(bias), at(y), at(z), at<float>(mean),
                       at<float>(rstd), at<const int64_t>(dropout_rows), x_stride, residual_stride,
                       rows, cols, dtype, weight_dtype, bias_dtype, eps, dropout},
                      threads);
}

void cpu_embedding_layer_norm_fwd(Address ids, Address position_ids, Address type_ids, Address word,
                                  Address position, Address type, Address weight, Address bias,
                                  Address y, Address mean, Address rstd, Address dropout_rows,
                                  int64_t word_stride, int64_t position_stride, int64_t type_stride,
                                  int64_t rows, int64_t cols, DType dtype, DType weight_dtype,
                                  DType bias_dtype, float eps, uint32_t dropout_threshold,
                                  float dropout_scale, int64_t dropout_seed, int threads) {
  EmbeddingArguments e{};
  e.ids = at<const int64_t>(ids);
  e.position_ids = at<const int64_t>(position_ids);
  e.type_ids = at<const int64_t>(type_ids);
  e.word = at(word), e.position = at(position), e.type = at(type);
  e.word_stride = word_stride, e.position_stride = position_stride, e.type_stride = type_stride;
  e.norm.weight = at(weight), e.norm.bias = at(bias);
  e.norm.y = at(y), e.norm.mean = at<float>(mean), e.norm.rstd = at<float>(rstd);
  e.norm.dropout_rows = at<const int64_t>(dropout_rows);
  e.norm.rows = rows, e.norm.cols = cols;
  e.norm.dtype = dtype, e.norm.weight_dtype = weight_dtype, e.norm.bias_dtype = bias_dtype;
  e.norm.eps = eps;
  e.norm.dropout = dropout_of(dropout_threshold, dropout_scale, dropout_seed);
  cpu::embedding_layer_norm_fwd(e, threads);
}

void cpu_layer_norm_bwd(Address dy, Address dz, Address z, Address weight, Address mean,
                        Address rstd, Address dx, Address dresidual, Address dweight, Address dbias,
                        Address dropout_rows, int64_t dy_stride, int64_t dz_stride,
                        int64_t z_stride, int64_t rows, int64_t cols, DType dtype,
                        DType weight_dtype, DType bias_dtype, uint32_t dropout_threshold,
                        float dropout_scale, int64_t dropout_seed, int threads) {
  const Dropout dropout = dropout_of(dropout_threshold, dropout_scale, dropout_seed);
  cpu::layer_norm_bwd(
      {at(dy), at(dz), at(z), at(weight), at<const float>(mean), at<const float>(rstd), at(dx),
       at(dresidual), at<const int64_t>(dropout_rows), dy_stride, dz_stride, z_stride, rows, cols,
       dtype, weight_dtype, dropout},
      at(dweight), at(dbias), bias_dtype, threads);
}

void cpu_linear_fwd(Address x, Address w, Address bias, Address y, Address z, int64_t x_stride,
                    int64_t w_stride, int64_t rows, int64_t cols, int64_t depth,
                    Activation activation, int threads) {
  cpu::linear_fwd({at<const float>(x), at<const float>(w), at<const float>(bias), at<float>(y),
                   at<float>(z), x_stride, w_stride, rows, cols, depth, activation},
                  threads);
}

void cpu_bias_act_fwd(Address x, Address bias, Address residual, Address y, Address z,
                      Address dropout_rows, int64_t x_stride, int64_t residual_stride, int64_t rows,
                      int64_t cols, DType dtype, DType bias_dtype, Activation activation,
                      uint32_t dropout_threshold, float dropout_scale, int64_t dropout_seed,
                      int threads) {
  const Dropout dropout = dropout_of(dropout_threshold, dropout_scale, dropout_seed);
  cpu::bias_act_fwd({at(x), at(bias), at(residual), at(y), at(z), at<const int64_t>(dropout_rows),
                     x_stride, residual_stride, rows, cols, dtype, bias_dtype, activation, dropout},
                    threads);
}

void cpu_dropout(Address x, Address y, Address dropout_rows, int64_t x_stride, int64_t rows,
                 int64_t cols, DType dtype, uint32_t dropout_threshold, float dropout_scale,
                 int64_t dropout_seed, int threads) {
  cpu_bias_act_fwd(x, 0, 0, y, 0, dropout_rows, x_stride, 0, rows, cols, dtype, dtype,
                   Activation::kNone, dropout_threshold, dropout_scale, dropout_seed, threads);
}

void cpu_act_bwd(Address dy, Address z, Address dz, Address dbias, Address dropout_rows,
                 int64_t dy_stride, int64_t z_stride, int64_t rows, int64_t cols, DType dtype,
                 DType bias_dtype, Activation activation, uint32_t dropout_threshold,
                 float dropout_scale, int64_t dropout_seed, int threads) {
  check(z != 0 || activation == Activation::kNone || rows == 0 || cols == 0,
        "the activation's gradient needs z");
  const Dropout dropout = dropout_of(dropout_threshold, dropout_scale, dropout_seed);
  cpu::act_bwd({at(dy), at(z), at(dz), at<const int64_t>(dropout_rows), dy_stride, z_stride, rows,
                cols, dtype, activation, dropout},
               at(dbias), bias_dtype, threads);
}

std::vector<double> cpu_fma_rates(const std::string& type, int threads) {
  check(threads > 0, "threads is " + std::to_string(threads) + "; allowed are 1 and more");
  if (type == "float32") return cpu::fma_rates(cpu::FmaType::kFloat32, threads);
  if (type == "bfloat16") return cpu::fma_rates(cpu::FmaType::kBFloat16, threads);
  if (type == "int8") return cpu::fma_rates(cpu::FmaType::kInt8, threads);
  throw std::invalid_argument("type is '" + type + "'; allowed are float32, bfloat16, int8");
}

std::vector<std::string> cpu_isas() {
  int count = 0;
  const char* const* names = available_isas(&count);
  return {names, names + count};
}

void set_cpu_isa(const std::string& name) {
  std::string allowed;
  for (const std::string& isa : cpu_isas()) allowed += (allowed.empty() ? "" : ", ") + isa;
  check(use_isa(name.c_str()), "name is '" + name + "'; allowed here are " + allowed);
}

py::dict build_info() {
  std::string isas;
  for (const std::string& isa : cpu_isas()) isas += (isas.empty() ? "" : ", ") + isa;
  py::dict info;
  info["compiler"] = BERTKERN_COMPILER;
  info["cpu_isas"] = isas;
  info["cpu_isa"] = kernels().isa;
  info["parallel"] = parallel_backend();
  info["cuda"] = BERTKERN_CUDA_VERSION[0] != '\0' ? std::string(BERTKERN_CUDA_VERSION)
                                                  : std::string("absent: ") + BERTKERN_CUDA_REASON;
  info["cuda_targets"] = BERTKERN_CUDA_TARGETS;
  return info;
}

}  // namespace
}  // namespace bertkern

PYBIND11_MODULE(_C, m) {
  using namespace bertkern;
  m.doc() = "Compiled kernels of bertkern; see bertkern/_C.pyi.";

  py::enum_<DType>(m, "DType", "Element type of a tensor.")
      .value("FLOAT32", DType::kFloat32)
      .value("FLOAT16", DType::kFloat16)
      .value("BFLOAT16", DType::kBFloat16);
  py::enum_<Activation>(m, "Activation", "Activation function of a feed-forward layer.")
      .value("NONE", Activation::kNone)
      .value("GELU", Activation::kGelu)
      .value("GELU_TANH", Activation::kGeluTanh)
      .value("RELU", Activation::kRelu);

  m.def("build_info", &build_info, "What was compiled, by what, and why anything is absent.");
  m.def("cpu_isas", &cpu_isas, "Instruction sets compiled in that this processor has, best last.");
  m.def("set_cpu_isa", &set_cpu_isa, "name"_a, "Use one of cpu_isas() from now on.");
  m.def("cpu_fma_rates", &cpu_fma_rates, "type"_a, "threads"_a, ReleaseGil(),
        "Multiply-add operations a second, of repeats; empty where there is no instruction.");

  m.def("usual_call", &usual_call, "pattern"_a, "exchange"_a, "types"_a, "is_neg"_a,
        "A function that tells whether an op's tensors are as the pattern says.");
  m.def("cpu_attention_fwd", &cpu_attention_fwd, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "bias"_a,
        "q_strides"_a, "k_strides"_a, "v_strides"_a, "out_strides"_a, "bias_sizes"_a,
        "bias_strides"_a, "bias_dtype"_a, "key_padding_mask"_a, "cu_seqlens_q"_a, "cu_seqlens_k"_a,
        "key_lengths"_a, "batch"_a, "seqlen_q"_a, "seqlen_k"_a, "heads"_a, "key_heads"_a,
        "head_dim"_a, "dtype"_a, "causal"_a, "window_left"_a, "window_right"_a, "softcap"_a,
        "scale"_a, "dropout_threshold"_a, "dropout_scale"_a, "dropout_seed"_a, "sequence_offset"_a,
        "threads"_a, ReleaseGil(),
        "out = dropout(softmax(score(q k^T))) v and its lse. q, out [B, Sq, H, D], k, v [B, Sk, "
        "Hk, D], or [T, ., D] with cu_seqlens; strides (batch, sequence, head); lse fp32 [B, H, "
        "Sq] or [H, Tq]; bias [B or 1, H or 1, Sq or 1, Sk or 1].");
  m.def("cpu_attention_bwd", &cpu_attention_bwd, "dout"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a,
        "dlse"_a, "bias"_a, "dq"_a, "dk"_a, "dv"_a, "dbias"_a, "dout_strides"_a, "q_strides"_a,
        "k_strides"_a, "v_strides"_a, "out_strides"_a, "bias_sizes"_a, "bias_strides"_a,
        "bias_dtype"_a, "key_padding_mask"_a, "cu_seqlens_q"_a, "cu_seqlens_k"_a, "key_lengths"_a,
        "batch"_a, "seqlen_q"_a, "seqlen_k"_a, "heads"_a, "key_heads"_a, "head_dim"_a, "dtype"_a,
        "causal"_a, "window_left"_a, "window_right"_a, "softcap"_a, "scale"_a,
        "dropout_threshold"_a, "dropout_scale"_a, "dropout_seed"_a, "sequence_offset"_a,
        "threads"_a, ReleaseGil(),
        "dq, dk, dv of cpu_attention_fwd, contiguous in the layout of q, k, v, and dbias, "
        "contiguous, or 0. dlse may be 0.");
  m.def("cpu_layer_norm_fwd", &cpu_layer_norm_fwd, "x"_a, "residual"_a, "weight"_a, "bias"_a, "y"_a,
        "z"_a, "mean"_a, "rstd"_a, "dropout_rows"_a, "x_stride"_a, "residual_stride"_a, "rows"_a,
        "cols"_a, "dtype"_a, "weight_dtype"_a, "bias_dtype"_a, "eps"_a, "dropout_threshold"_a,
        "dropout_scale"_a, "dropout_seed"_a, "threads"_a, ReleaseGil(),
        "y = (z - mean) * rstd * weight + bias, z = residual + dropout(x); x, y, z [rows, cols], "
        "mean, "
        "rstd fp32 [rows]. Without a residual z is x, and is not written. ");
  m.def("cpu_embedding_layer_norm_fwd", &cpu_embedding_layer_norm_fwd, "ids"_a, "position_ids"_a,
        "type_ids"_a, "word"_a, "position"_a, "type"_a, "weight"_a, "bias"_a, "y"_a, "mean"_a,
        "rstd"_a, "dropout_rows"_a, "word_stride"_a, "position_stride"_a, "type_stride"_a, "rows"_a,
        "cols"_a, "dtype"_a, "weight_dtype"_a, "bias_dtype"_a, "eps"_a, "dropout_threshold"_a,
        "dropout_scale"_a, "dropout_seed"_a, "threads"_a, ReleaseGil(),
        "y = dropout(LayerNorm(word[id] + position[p] + type[t])); ids int64 [rows], checked.");
  m.def("cpu_layer_norm_bwd", &cpu_layer_norm_bwd, "dy"_a, "dz"_a, "z"_a, "weight"_a, "mean"_a,
        "rstd"_a, "dx"_a, "dresidual"_a, "dweight"_a, "dbias"_a, "dropout_rows"_a, "dy_stride"_a,
        "dz_stride"_a, "z_stride"_a, "rows"_a, "cols"_a, "dtype"_a, "weight_dtype"_a,
        "bias_dtype"_a, "dropout_threshold"_a, "dropout_scale"_a, "dropout_seed"_a, "threads"_a,
        ReleaseGil(),
        "dresidual = dz + rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * weight; "
        "dx = dropout'(dresidual); dweight, dbias [cols] summed in fp32 in a fixed order. ");
  m.def("cpu_dropout", &cpu_dropout, "x"_a, "y"_a, "dropout_rows"_a, "x_stride"_a, "rows"_a,
        "cols"_a, "dtype"_a, "dropout_threshold"_a, "dropout_scale"_a, "dropout_seed"_a,
        "threads"_a, ReleaseGil(), "y = dropout(x), x, y [rows, cols].");
  m.def("cpu_linear_fwd", &cpu_linear_fwd, "x"_a, "w"_a, "bias"_a, "y"_a, "z"_a, "x_stride"_a,
        "w_stride"_a, "rows"_a, "cols"_a, "depth"_a, "activation"_a, "threads"_a, ReleaseGil(),
        "z = x w^T + bias, y = act(z), fp32: x [rows, depth], w [cols, depth]; for few rows.");
  m.def("cpu_bias_act_fwd", &cpu_bias_act_fwd, "x"_a, "bias"_a, "residual"_a, "y"_a, "z"_a,
        "dropout_rows"_a, "x_stride"_a, "residual_stride"_a, "rows"_a, "cols"_a, "dtype"_a,
        "bias_dtype"_a, "activation"_a, "dropout_threshold"_a, "dropout_scale"_a, "dropout_seed"_a,
        "threads"_a, ReleaseGil(),
        "z = x + bias, y = residual + dropout(act(z)), all [rows, cols], bias [cols].");
  m.def("cpu_act_bwd", &cpu_act_bwd, "dy"_a, "z"_a, "dz"_a, "dbias"_a, "dropout_rows"_a,
        "dy_stride"_a, "z_stride"_a, "rows"_a, "cols"_a, "dtype"_a, "bias_dtype"_a, "activation"_a,
        "dropout_threshold"_a, "dropout_scale"_a, "dropout_seed"_a, "threads"_a, ReleaseGil(),
        "dz = dropout'(dy) * act'(z) [rows, cols], dbias = sum of dz over rows [cols].");
  bind_cuda(m);
}
