// The elementwise part of linear and ffn on the CPU: bias, activation, dropout, residual, and its
// gradient.
//
//   z = x + bias,  y = residual + dropout(act(z))
//   backward:  dz = dropout'(dy) · act'(z),  dbias = Σ_rows dz
//
// Compiled once per instruction set, which also gives its table of kernels (see params.h).
#include "attention_kernels.h"
#include "row_kernels.h"

namespace bertkern::BERTKERN_ISA {
namespace {

constexpr int64_t kBlock =
    512;  // columns between two passes; a multiple of 16, which drop() relies on

template <typename T, Activation kActivation>
void fwd(const ActArguments& a, const float* bias, int64_t first, int64_t last) {
  const HiddenDropout dropout(a.dropout, a.dropout_rows);
  const bool drops = a.dropout.threshold != 0;
  alignas(64) float buffer[kBlock + 16];
  for (int64_t row = first; row < last; ++row) {
    for (int64_t start = 0; start < a.cols; start += kBlock) {
      const int64_t count = a.cols - start < kBlock ? a.cols - start : kBlock;
      const T* x = row_of<T>(a.x, row, a.x_stride) + start;
      const T* residual =
          a.residual != nullptr ? row_of<T>(a.residual, row, a.residual_stride) + start : nullptr;
      T* z_out = a.z != nullptr ? row_of<T>(a.z, row, a.cols) + start : nullptr;
      T* y = row_of<T>(a.y, row, a.cols) + start;
      for_columns<1>(count, [&](int, int64_t c, int64_t n, Vi) INLINE_LAMBDA {
        Vf z = load_columns(x + c, n);
        if (bias != nullptr) z += load(bias + start + c);
        if (z_out != nullptr) store_columns(z_out + c, z, n);
        Vf activated = activate<kActivation>(z);
        if (drops) {
          store(buffer + c, activated);
        } else {
          if (residual != nullptr) activated += load_columns(residual + c, n);
          store_columns(y + c, activated, n);
        }
      });
      if (!drops) continue;
      dropout.apply(buffer, row, start, count);
      for_columns<1>(count, [&](int, int64_t c, int64_t n, Vi) INLINE_LAMBDA {
        Vf dropped = load(buffer + c);
        if (residual != nullptr) dropped += load_columns(residual + c, n);
        store_columns(y + c, dropped, n);
      });
    }
  }
}

// Rows [first, last), at most kRunRows of them, of columns [start, start + count); their sums go
// into `run`.
template <typename T, Activation kActivation>
BERTKERN_INLINE void bwd_block(const ActGradArguments& a, const HiddenDropout& dropout,
                               int64_t first, int64_t last, int64_t start, int64_t count,
                               float* run) {
  const bool drops = a.dropout.threshold != 0;
  alignas(64) float buffer[kBlock + 16];
  for (int64_t row = first; row < last; ++row) {
    const T* dy = row_of<T>(a.dy, row, a.dy_stride) + start;
    const T* z = a.z != nullptr ? row_of<T>(a.z, row, a.z_stride) + start : nullptr;
    T* dz_out = a.dz != nullptr ? row_of<T>(a.dz, row, a.cols) + start : nullptr;
    if (drops) {
      read_row(dy, buffer, count);
      dropout.apply(buffer, row, start, count);
    }
    for_columns<1>(count, [&](int, int64_t c, int64_t n, Vi mask) INLINE_LAMBDA {
      Vf dz = drops ? load(buffer + c) : load_columns(dy + c, n);
      if constexpr (kActivation != Activation::kNone) {
        dz *= activation_slope<kActivation>(load_columns(z + c, n));
      }
      if (dz_out != nullptr) store_columns(dz_out + c, dz, n);
      if (run != nullptr) store(run + c, load(run + c) + select(mask, dz, Vf{}));
    });
  }
}

template <typename T, Activation kActivation>
void bwd(const ActGradArguments& a, float* dbias, int64_t first, int64_t last) {
  const HiddenDropout dropout(a.dropout, a.dropout_rows);
  alignas(64) float run[kBlock + 16] = {};
  for (int64_t row = first; row < last; row += kRunRows) {
    const int64_t end = last - row < kRunRows ? last : row + kRunRows;
    for (int64_t start = 0; start < a.cols; start += kBlock) {
      const int64_t count = a.cols - start < kBlock ? a.cols - start : kBlock;
      bwd_block<T, kActivation>(a, dropout, row, end, start, count,
                                dbias != nullptr ? run : nullptr);
      if (dbias != nullptr) add_run(run, dbias + start, dbias + padded(a.cols) + start, count);
    }
  }
}

template <typename T>
void fwd_of(const ActArguments& a, const float* bias, int64_t first, int64_t last) {
  switch (a.activation) {
    case Activation::kGelu:
      return fwd<T, Activation::kGelu>(a, bias, first, last);
    case Activation::kGeluTanh:
      return fwd<T, Activation::kGeluTanh>(a, bias, first, last);
    case Activation::kRelu:
      return fwd<T, Activation::kRelu>(a, bias, first, last);
    case Activation::kNone:
      return fwd<T, Activation::kNone>(a, bias, first, last);
  }
}

template <typename T>
void bwd_of(const ActGradArguments& a, float* dbias, int64_t first, int64_t last) {
  switch (a.activation) {
    case Activation::kGelu:
      return bwd<T, Activation::kGelu>(a, dbias, first, last);
    case Activation::kGeluTanh:
      return bwd<T, Activation::kGeluTanh>(a, dbias, first, last);
    case Activation::kRelu:
      return bwd<T, Activation::kRelu>(a, dbias, first, last);
    case Activation::kNone:
      return bwd<T, Activation::kNone>(a, dbias, first, last);
  }
}

void cast_to_float(const void* source, DType dtype, float* target, int64_t count) {
  if (dtype == DType::kFloat32) return read_row(static_cast<const float*>(source), target, count);
  if (dtype == DType::kFloat16) return read_row(static_cast<const Half*>(source), target, count);
  read_row(static_cast<const BFloat16*>(source), target, count);
}

void cast_from_float(const float* source, void* target, DType dtype, int64_t count) {
  if (dtype == DType::kFloat32) return write_row(source, static_cast<float*>(target), count);
  if (dtype == DType::kFloat16) return write_row(source, static_cast<Half*>(target), count);
  write_row(source, static_cast<BFloat16*>(target), count);
}

}  // namespace

void bias_act_fwd(const ActArguments& a, const float* bias, int64_t first, int64_t last) {
  if (a.dtype == DType::kFloat32) return fwd_of<float>(a, bias, first, last);
  if (a.dtype == DType::kFloat16) return fwd_of<Half>(a, bias, first, last);
  fwd_of<BFloat16>(a, bias, first, last);
}

void act_bwd(const ActGradArguments& a, float* dbias, int64_t first, int64_t last) {
  if (a.dtype == DType::kFloat32) return bwd_of<float>(a, dbias, first, last);
  if (a.dtype == DType::kFloat16) return bwd_of<Half>(a, dbias, first, last);
  bwd_of<BFloat16>(a, dbias, first, last);
}

extern const Kernels table;
const Kernels table = {
    BERTKERN_ISA_NAME,
    attention_fwd_scratch,
    attention_fwd,
    attention_bwd_scratch,
    attention_bwd,
    layer_norm_fwd,
    embedding_layer_norm_fwd,
    layer_norm_bwd,
    bias_act_fwd,
    act_bwd,
    linear_pack_scratch,
    linear_pack,
    linear_fwd,
    cast_to_float,
    cast_from_float,
};

}  // namespace bertkern::BERTKERN_ISA
