// The CUDA ops of bertkern._C: cuda_<op>_fwd and cuda_<op>_bwd on a device and its stream.
#include "bindings.h"

#include <algorithm>
#include <climits>

#include "cuda/attention.h"
#include "cuda/device.h"
#include "cuda/embedding_layer_norm.h"
#include "cuda/layer_norm.h"

namespace bertkern {
namespace {

// The launch fills in the rest, and refuses what it cannot take.
NormRows cuda_rows(int64_t count, int64_t cols) {
  return {count, static_cast<int>(std::min<int64_t>(cols, INT_MAX)), 0, 0.0f, false, false};
}

DeviceDropout device_dropout(uint32_t threshold, float scale, Address seed, Address rows) {
  return {threshold, scale, at<const int64_t>(seed), at<const int64_t>(rows)};
}

void cuda_layer_norm_fwd(Address x, Address residual, Address weight, Address bias, Address y,
                         Address z, Address mean, Address rstd, Address dropout_rows,
                         Address dropout_seed, int64_t x_stride, int64_t residual_stride,
                         int64_t rows, int64_t cols, DType dtype, DType weight_dtype, float eps,
                         uint32_t dropout_threshold, float dropout_scale, int device,
                         Address stream) {
  check_residual(residual, z, dropout_threshold, rows, cols);
  cuda::layer_norm_fwd(
      {at(x), at(residual), at(weight), at(bias), at(y), at(z), at<float>(mean), at<float>(rstd),
       x_stride, residual_stride, cuda_rows(rows, cols), eps,
       device_dropout(dropout_threshold, dropout_scale, dropout_seed, dropout_rows)},
      dtype, weight_dtype, device, at(stream));
}

void cuda_layer_norm_bwd(Address dy, Address dz, Address z, Address weight, Address mean,
                         Address rstd, Address dx, Address dresidual, Address dweight,
                         Address dbias, Address partial, Address dropout_rows, Address dropout_seed,
                         int64_t dy_stride, int64_t dz_stride, int64_t z_stride, int64_t rows,
                         int64_t cols, DType dtype, DType weight_dtype, uint32_t dropout_threshold,
                         float dropout_scale, int device, Address stream) {
  cuda::layer_norm_bwd(
      {at(dy), at(dz), at(z), at(weight), at<const float>(mean), at<const float>(rstd), at(dx),
       at(dresidual), at<float>(partial), dy_stride, dz_stride, z_stride, cuda_rows(rows, cols),
       device_dropout(dropout_threshold, dropout_scale, dropout_seed, dropout_rows)},
      at(dweight), at(dbias), dtype, weight_dtype, device, at(stream));
}

// word, position and type.
using TableAddresses = std::array<Address, kTables>;
using TableSizes = std::array<int64_t, kTables>;

// A size that is no int is too large for the launch too, which says so.
int table_size(int64_t rows) {
  return static_cast<int>(std::clamp<int64_t>(rows, INT_MIN, INT_MAX));
}

EmbeddingIds embedding_ids(const TableAddresses& ids, const std::array<bool, kTables>& wide) {
  EmbeddingIds result{};
  for (int i = 0; i < kTables; ++i) {
    result.data[i] = at(ids[i]);
    result.wide[i] = wide[i];
  }
  return result;
}

EmbeddingTables embedding_tables(const TableAddresses& tables, const TableSizes& strides,
                                 const TableSizes& sizes) {
  EmbeddingTables result{};
  for (int i = 0; i < kTables; ++i) {
    result.data[i] = at(tables[i]);
    result.stride[i] = strides[i];
    result.size[i] = table_size(sizes[i]);
  }
  return result;
}

void cuda_embedding_layer_norm_fwd(TableAddresses ids, std::array<bool, kTables> wide_ids,
                                   TableAddresses tables, TableSizes strides, TableSizes sizes,
                                   Address weight, Address bias, Address y, Address mean,
                                   Address rstd, Address dropout_rows, Address dropout_seed,
                                   int64_t rows, int64_t cols, DType dtype, DType weight_dtype,
                                   float eps, uint32_t dropout_threshold, float dropout_scale,
                                   int device, Address stream) {
  cuda::embedding_layer_norm_fwd(
      {embedding_ids(ids, wide_ids), embedding_tables(tables, strides, sizes), at(weight), at(bias),
       at(y), at<float>(mean), at<float>(rstd), cuda_rows(rows, cols), eps,
       device_dropout(dropout_threshold, dropout_scale, dropout_seed, dropout_rows)},
      dtype, weight_dtype, device, at(stream));
}

void cuda_embedding_layer_norm_keys(TableAddresses ids, std::array<bool, kTables> wide_ids,
                                    TableSizes sizes, Address keys, int64_t rows, int device,
                                    Address stream) {
  EmbeddingKeyArguments a{embedding_ids(ids, wide_ids), {}, at<int32_t>(keys), rows};
  std::transform(sizes.begin(), sizes.end(), a.size, table_size);
  cuda::embedding_layer_norm_keys(a, device, at(stream));
}

void cuda_embedding_layer_norm_bwd(Address dy, Address keys, TableAddresses tables,
                                   TableSizes strides, TableSizes sizes, Address weight,
                                   Address mean, Address rstd, Address dz, Address dweight,
                                   Address dbias, Address partial, Address dropout_rows,
                                   Address dropout_seed, int64_t dy_stride, int64_t dz_stride,
                                   int64_t rows, int64_t cols, DType dtype, DType weight_dtype,
                                   uint32_t dropout_threshold, float dropout_scale, int device,
                                   Address stream) {
  cuda::embedding_layer_norm_bwd(
      {embedding_tables(tables, strides, sizes), at<const int32_t>(keys), at(dy), at(weight),
       at<const float>(mean), at<const float>(rstd), at(dz), at<float>(partial), dy_stride,
       dz_stride, cuda_rows(rows, cols),
       device_dropout(dropout_threshold, dropout_scale, dropout_seed, dropout_rows)},
      at(dweight), at(dbias), dtype, weight_dtype, device, at(stream));
}

void cuda_embedding_layer_norm_tables(Address dz, Address keys, Address order, Address partial,
                                      TableAddresses gradients, TableSizes sizes, int64_t dz_stride,
                                      int64_t rows, int64_t cols, int64_t padding_row, DType dtype,
                                      int device, Address stream) {
  TableGradArguments a{};
  a.dz = at(dz);
  a.keys = at<const int32_t>(keys);
  a.order = at<const int64_t>(order);
  a.partial = at<float>(partial);
  for (int i = 0; i < kTables; ++i) a.gradient[i] = at(gradients[i]);
  std::transform(sizes.begin(), sizes.end(), a.size, table_size);
  a.tokens = rows;
  a.dz_stride = dz_stride;
  a.cols = cuda_rows(rows, cols).cols;
  a.padding_row = static_cast<int>(padding_row);
  cuda::embedding_layer_norm_tables(a, dtype, device, at(stream));
}

DeviceTensor device_tensor(Address address, const Strides& strides) {
  return {at(address), std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
}

// What both directions of attention take.
AttentionKernelArguments cuda_attention_arguments(
    Address q, Address k, Address v, Address out, Address lse, Address bias,
    const Strides& q_strides, const Strides& k_strides, const Strides& v_strides,
    const Strides& out_strides, const FourSizes& bias_sizes, const FourSizes& bias_strides,
    std::optional<DType> bias_dtype, Address key_padding_mask, Address cu_seqlens_q,
    Address cu_seqlens_k, Address key_lengths, Address order, int64_t batch, int64_t seqlen_q,
    int64_t seqlen_k, int64_t total_q, int64_t total_k, int64_t heads, int64_t key_heads,
    int64_t head_dim, DType dtype, int causal, int64_t window_left, int64_t window_right,
    float softcap, float scale, uint32_t dropout_threshold, float dropout_scale,
    Address dropout_seed, int64_t sequence_offset) {
  check(seqlen_q >= 0 && seqlen_q < kNoWindow && seqlen_k >= 0 && seqlen_k < kNoWindow,
        "sequences have at most 2^30 - 1 rows");
  check(!bias_dtype || *bias_dtype == DType::kFloat32 || *bias_dtype == dtype,
        "bias_dtype must be None (bool), FLOAT32 or dtype");
  check(cu_seqlens_q == 0 || batch == 0 || order != 0, "varlen needs order, its scratch");
  const auto window = [](int64_t side) {
    return side < 0 || side >= kNoWindow ? kNoWindow : static_cast<int>(side);
  };
  AttentionKernelArguments a{};
  a.q = device_tensor(q, q_strides);
  a.k = device_tensor(k, k_strides);
  a.v = device_tensor(v, v_strides);
  a.out = device_tensor(out, out_strides);
  a.lse = at<float>(lse);
  const bool varlen = cu_seqlens_q != 0;
  a.lse_batch = varlen ? 0 : heads * seqlen_q;
  a.lse_head = varlen ? total_q : seqlen_q;
  a.cu_seqlens_q = at<const int32_t>(cu_seqlens_q);
  a.cu_seqlens_k = at<const int32_t>(cu_seqlens_k);
  a.key_lengths = at<const int32_t>(key_lengths);
  a.order = at<int32_t>(order);
  a.key_padding_mask = at<const uint8_t>(key_padding_mask);
  a.bias_kind = bias == 0                        ? DeviceBias::kNone
                : !bias_dtype                    ? DeviceBias::kMask
                : *bias_dtype == DType::kFloat32 ? DeviceBias::kFloat32
                                                 : DeviceBias::kSame;
  a.bias = at(bias);
  for (int i = 0; i < 4; ++i) {
    a.bias_sizes[i] = static_cast<int>(bias_sizes[i]);
    a.bias_strides[i] = bias_sizes[i] == 1 ? 0 : bias_strides[i];
  }
  a.batch = static_cast<int>(batch);
  a.heads = static_cast<int>(heads);
  a.key_heads = static_cast<int>(key_heads);
  a.group = key_heads > 0 ? static_cast<int>(heads / key_heads) : 0;
  a.head_dim = static_cast<int>(head_dim);
  a.seqlen_q = static_cast<int>(seqlen_q);
  a.seqlen_k = static_cast<int>(seqlen_k);
  a.total_q = total_q;
  a.total_k = total_k;
  a.bottom_right = causal != 2;
  a.window_left = window(window_left);
  a.window_right = causal != 0 ? 0 : window(window_right);
  a.scale = scale;
  a.softcap = softcap;
  a.dropout_threshold = dropout_threshold;
  a.dropout_scale = dropout_threshold == 0 ? 1.0f : dropout_scale;
  a.dropout_seed = at<const int64_t>(dropout_seed);
  a.sequence_offset = sequence_offset;
  return a;
}

void cuda_attention_fwd(Address q, Address k, Address v, Address out, Address lse, Address bias,
                        Strides q_strides, Strides k_strides, Strides v_strides,
                        Strides out_strides, FourSizes bias_sizes, FourSizes bias_strides,
                        std::optional<DType> bias_dtype, Address key_padding_mask,
                        Address cu_seqlens_q, Address cu_seqlens_k, Address key_lengths,
                        Address order, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                        int64_t total_q, int64_t total_k, int64_t heads, int64_t key_heads,
                        int64_t head_dim, DType dtype, int causal, int64_t window_left,
                        int64_t window_right, float softcap, float scale,
                        uint32_t dropout_threshold, float dropout_scale, Address dropout_seed,
                        int64_t sequence_offset, int device, Address stream) {
  const AttentionKernelArguments a = cuda_attention_arguments(
      q, k, v, out, lse, bias, q_strides, k_strides, v_strides, out_strides, bias_sizes,
      bias_strides, bias_dtype, key_padding_mask, cu_seqlens_q, cu_seqlens_k, key_lengths, order,
      batch, seqlen_q, seqlen_k, total_q, total_k, heads, key_heads, head_dim, dtype, causal,
      window_left, window_right, softcap, scale, dropout_threshold, dropout_scale, dropout_seed,
      sequence_offset);
  cuda::attention_fwd(a, dtype, device, at(stream));
}

void cuda_attention_bwd(Address dout, Address q, Address k, Address v, Address out, Address lse,
                        Address dlse, Address delta, Address bias, Address dq, Address dk,
                        Address dv, Address dbias, Strides dout_strides, Strides q_strides,
                        Strides k_strides, Strides v_strides, Strides out_strides,
                        FourSizes bias_sizes, FourSizes bias_strides,
                        std::optional<DType> bias_dtype, Address key_padding_mask,
                        Address cu_seqlens_q, Address cu_seqlens_k, Address key_lengths,
                        Address order, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                        int64_t total_q, int64_t total_k, int64_t heads, int64_t key_heads,
                        int64_t head_dim, DType dtype, int causal, int64_t window_left,
                        int64_t window_right, float softcap, float scale,
                        uint32_t dropout_threshold, float dropout_scale, Address dropout_seed,
                        int64_t sequence_offset, int device, Address stream) {
  AttentionKernelArguments a = cuda_attention_arguments(
      q, k, v, out, lse, bias, q_strides, k_strides, v_strides, out_strides, bias_sizes,
      bias_strides, bias_dtype, key_padding_mask, cu_seqlens_q, cu_seqlens_k, key_lengths, order,
      batch, seqlen_q, seqlen_k, total_q, total_k, heads, key_heads, head_dim, dtype, causal,
      window_left, window_right, softcap, scale, dropout_threshold, dropout_scale, dropout_seed,
      sequence_offset);
  check(bias_dtype || dbias == 0, "a bool bias has no gradient");
  const bool varlen = cu_seqlens_q != 0;
  const int64_t token = heads * head_dim, key_token = key_heads * head_dim;
  a.dout = device_tensor(dout, dout_strides);
  a.dq = {at(dq), varlen ? 0 : seqlen_q * token, token, head_dim};
  a.dk = {at(dk), varlen ? 0 : seqlen_k * key_token, key_token, head_dim};
  a.dv = {at(dv), varlen ? 0 : seqlen_k * key_token, key_token, head_dim};
  a.dlse = at<const float>(dlse);
  a.delta = at<float>(delta);
  a.dbias = at(dbias);
  cuda::attention_bwd(a, dtype, device, at(stream));
}

std::tuple<int, std::optional<std::string>> cuda_device_count() {
  std::string reason;
  const int count = cuda::device_count(reason);
  return {count, count > 0 ? std::nullopt : std::optional<std::string>(reason)};
}

std::optional<std::string> cuda_unusable() { return std::get<1>(cuda_device_count()); }

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_device_count", &cuda_device_count,
        "(devices, None), or (0, why there is none). Never raises.");
  m.def("cuda_unusable", &cuda_unusable, "Why the CUDA kernels cannot be used; None if they can.");
  m.def("cuda_layer_norm_max_cols", &cuda::layer_norm_max_cols,
        "Most columns that the CUDA LayerNorm kernels hold in registers.");
  m.def("cuda_layer_norm_partials", &cuda::layer_norm_partials, "rows"_a,
        "P, the rows of the `partial` buffer of cuda_layer_norm_bwd.");
  m.def("cuda_layer_norm_fwd", &cuda_layer_norm_fwd, "x"_a, "residual"_a, "weight"_a, "bias"_a,
        "y"_a, "z"_a, "mean"_a, "rstd"_a, "dropout_rows"_a, "dropout_seed"_a, "x_stride"_a,
        "residual_stride"_a, "rows"_a, "cols"_a, "dtype"_a, "weight_dtype"_a, "eps"_a,
        "dropout_threshold"_a, "dropout_scale"_a, "device"_a, "stream"_a, ReleaseGil(),
        "As cpu_layer_norm_fwd, on a device and its stream; dropout_seed is an address on the "
        "device.");
  m.def("cuda_layer_norm_bwd", &cuda_layer_norm_bwd, "dy"_a, "dz"_a, "z"_a, "weight"_a, "mean"_a,
        "rstd"_a, "dx"_a, "dresidual"_a, "dweight"_a, "dbias"_a, "partial"_a, "dropout_rows"_a,
        "dropout_seed"_a, "dy_stride"_a, "dz_stride"_a, "z_stride"_a, "rows"_a, "cols"_a, "dtype"_a,
        "weight_dtype"_a, "dropout_threshold"_a, "dropout_scale"_a, "device"_a, "stream"_a,
        ReleaseGil(),
        "As cpu_layer_norm_bwd; partial is fp32 [cuda_layer_norm_partials(rows), 2, cols].");
  m.def("cuda_embedding_layer_norm_fwd", &cuda_embedding_layer_norm_fwd, "ids"_a, "wide_ids"_a,
        "tables"_a, "strides"_a, "sizes"_a, "weight"_a, "bias"_a, "y"_a, "mean"_a, "rstd"_a,
        "dropout_rows"_a, "dropout_seed"_a, "rows"_a, "cols"_a, "dtype"_a, "weight_dtype"_a,
        "eps"_a, "dropout_threshold"_a, "dropout_scale"_a, "device"_a, "stream"_a, ReleaseGil(),
        "y = dropout((z - mean) * rstd * weight + bias), z = word[id] + position[p] + type[t].");
  m.def(
      "cuda_embedding_layer_norm_keys", &cuda_embedding_layer_norm_keys, "ids"_a, "wide_ids"_a,
      "sizes"_a, "keys"_a, "rows"_a, "device"_a, "stream"_a, ReleaseGil(),
      "keys int32 [3, rows]: the tables' rows that a token reads, counted as those of one table.");
  m.def("cuda_embedding_layer_norm_bwd", &cuda_embedding_layer_norm_bwd, "dy"_a, "keys"_a,
        "tables"_a, "strides"_a, "sizes"_a, "weight"_a, "mean"_a, "rstd"_a, "dz"_a, "dweight"_a,
        "dbias"_a, "partial"_a, "dropout_rows"_a, "dropout_seed"_a, "dy_stride"_a, "dz_stride"_a,
        "rows"_a, "cols"_a, "dtype"_a, "weight_dtype"_a, "dropout_threshold"_a, "dropout_scale"_a,
        "device"_a, "stream"_a, ReleaseGil(), "dz, dweight and dbias.");
  m.def("cuda_embedding_layer_norm_chunks", &cuda::embedding_layer_norm_chunks, "rows"_a,
        "The rows of the `partial` buffer of cuda_embedding_layer_norm_tables.");
  m.def("cuda_embedding_layer_norm_tables", &cuda_embedding_layer_norm_tables, "dz"_a, "keys"_a,
        "order"_a, "partial"_a, "gradients"_a, "sizes"_a, "dz_stride"_a, "rows"_a, "cols"_a,
        "padding_row"_a, "dtype"_a, "device"_a, "stream"_a, ReleaseGil(),
        "The gradients of the three tables from dz and the sorted keys. Deterministic.");
  m.def("cuda_attention_fwd", &cuda_attention_fwd, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "bias"_a,
        "q_strides"_a, "k_strides"_a, "v_strides"_a, "out_strides"_a, "bias_sizes"_a,
        "bias_strides"_a, "bias_dtype"_a, "key_padding_mask"_a, "cu_seqlens_q"_a, "cu_seqlens_k"_a,
        "key_lengths"_a, "order"_a, "batch"_a, "seqlen_q"_a, "seqlen_k"_a, "total_q"_a, "total_k"_a,
        "heads"_a, "key_heads"_a, "head_dim"_a, "dtype"_a, "causal"_a, "window_left"_a,
        "window_right"_a, "softcap"_a, "scale"_a, "dropout_threshold"_a, "dropout_scale"_a,
        "dropout_seed"_a, "sequence_offset"_a, "device"_a, "stream"_a, ReleaseGil(),
        "As cpu_attention_fwd in fp16 and bf16, head dims that are multiples of 8 up to 128, rows "
        "on 16 bytes. In varlen seqlen_q and seqlen_k are the longest sequences', total_q and "
        "total_k the rows, and order is scratch, int32 [batch].");
  m.def("cuda_attention_bwd", &cuda_attention_bwd, "dout"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a,
        "dlse"_a, "delta"_a, "bias"_a, "dq"_a, "dk"_a, "dv"_a, "dbias"_a, "dout_strides"_a,
        "q_strides"_a, "k_strides"_a, "v_strides"_a, "out_strides"_a, "bias_sizes"_a,
        "bias_strides"_a, "bias_dtype"_a, "key_padding_mask"_a, "cu_seqlens_q"_a, "cu_seqlens_k"_a,
        "key_lengths"_a, "order"_a, "batch"_a, "seqlen_q"_a, "seqlen_k"_a, "total_q"_a, "total_k"_a,
        "heads"_a, "key_heads"_a, "head_dim"_a, "dtype"_a, "causal"_a, "window_left"_a,
        "window_right"_a, "softcap"_a, "scale"_a, "dropout_threshold"_a, "dropout_scale"_a,
        "dropout_seed"_a, "sequence_offset"_a, "device"_a, "stream"_a, ReleaseGil(),
        "As cpu_attention_bwd; delta is scratch of lse's shape, order in varlen int32 [2, batch]. "
        "Deterministic.");
}

}  // namespace bertkern
