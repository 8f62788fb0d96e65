// LayerNorm of rows on the CPU (Ba et al. 2016), with dropout and a residual before it.
//
//   z = residual + dropout(x), or the sum of three embeddings
//   y = (z − mean) · rstd · weight + bias,  rstd = 1 / √(var + eps)
//   backward:  x̂ = (z − mean) · rstd,  g = dy · weight
//   dresidual = dz + rstd · (g − mean(g) − x̂ · mean(g · x̂)),  dx = dropout'(dresidual)
//   dweight = Σ_rows dy · x̂,  dbias = Σ_rows dy
//
// A row is read again from the nearest cache by each pass. Compiled once per instruction set (see
// params.h).
#include "row_kernels.h"

namespace bertkern::BERTKERN_ISA {
namespace {

// One row z, whose columns add up to `sum`. The mean is taken twice: what the rounding of the first
// leaves behind, `left`, is large beside the deviations of a row with a large mean. The variance is
// that of the deviations.
template <typename Z, typename T>
BERTKERN_INLINE void normalise(const NormArguments& a, const Z* z, float sum, const float* weight,
                               const float* bias, int64_t row) {
  const float cols = static_cast<float>(a.cols);
  const float mean = sum / cols;
  Vf deviation[4] = {}, square[4] = {};
  for_columns<4>(a.cols, [&](int turn, int64_t c, int64_t n, Vi mask) INLINE_LAMBDA {
    const Vf centred = select(mask, load_columns(z + c, n) - mean, Vf{});
    deviation[turn] += centred;
    square[turn] += centred * centred;
  });
  const float left = sum_turns(deviation) / cols;
  const float variance = sum_turns(square) / cols - left * left;
  const float rstd = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + a.eps);
  const float offset = -left * rstd;
  T* y = row_of<T>(a.y, row, a.cols);
  for_columns<4>(a.cols, [&](int, int64_t c, int64_t n, Vi) INLINE_LAMBDA {
    Vf v = (load_columns(z + c, n) - mean) * rstd + offset;
    if (weight != nullptr) v *= load(weight + c);
    if (bias != nullptr) v += load(bias + c);
    store_columns(y + c, v, n);
  });
  a.mean[row] = mean + left;
  a.rstd[row] = rstd;
}

template <typename T>
void fwd(const NormArguments& a, const float* weight, const float* bias, int64_t first,
         int64_t last, float* z) {
  const HiddenDropout dropout(a.dropout, a.dropout_rows);
  for (int64_t row = first; row < last; ++row) {
    const T* x = row_of<T>(a.x, row, a.x_stride);
    Vf sum[4] = {};
    if (a.residual == nullptr) {
      for_columns<4>(a.cols, [&](int turn, int64_t c, int64_t n, Vi)
                                 INLINE_LAMBDA { sum[turn] += load_columns(x + c, n); });
      normalise<T, T>(a, x, sum_turns(sum), weight, bias, row);
      continue;
    }
    const T* residual = row_of<T>(a.residual, row, a.residual_stride);
    T* z_out = row_of<T>(a.z, row, a.cols);
    // The statistics are those of z as stored, which the backward reads.
    const auto add = [&](int turn, int64_t c, int64_t n, Vf dropped) INLINE_LAMBDA {
      store_columns(z_out + c, dropped + load_columns(residual + c, n), n);
      sum[turn] += load_columns(z_out + c, n);
    };
    if (a.dropout.threshold != 0) {
      read_row(x, z, a.cols);
      dropout.apply(z, row, 0, a.cols);
      for_columns<4>(a.cols, [&](int turn, int64_t c, int64_t n, Vi)
                                 INLINE_LAMBDA { add(turn, c, n, load(z + c)); });
    } else {
      for_columns<4>(a.cols, [&](int turn, int64_t c, int64_t n, Vi)
                                 INLINE_LAMBDA { add(turn, c, n, load_columns(x + c, n)); });
    }
    normalise<T, T>(a, z_out, sum_turns(sum), weight, bias, row);
  }
}

// The sum of the three rows stays in fp32.
template <typename T>
void embedding_fwd(const EmbeddingArguments& e, const float* weight, const float* bias,
                   int64_t first, int64_t last, float* z) {
  const NormArguments& a = e.norm;
  const HiddenDropout dropout(a.dropout, a.dropout_rows);
  for (int64_t row = first; row < last; ++row) {
    const T* word = row_of<T>(e.word, e.ids[row], e.word_stride);
    const T* position = row_of<T>(e.position, e.position_ids[row], e.position_stride);
    const int64_t type_id = e.type_ids != nullptr ? e.type_ids[row] : 0;
    const T* type = row_of<T>(e.type, type_id, e.type_stride);
    Vf sum[4] = {};
    for_columns<4>(a.cols, [&](int turn, int64_t c, int64_t n, Vi) INLINE_LAMBDA {
      const Vf v =
          load_columns(word + c, n) + load_columns(position + c, n) + load_columns(type + c, n);
      store(z + c, v);
      sum[turn] += v;
    });
    normalise<float, T>(a, z, sum_turns(sum), weight, bias, row);
    if (a.dropout.threshold != 0) {
      T* y = row_of<T>(a.y, row, a.cols);
      read_row(y, z, a.cols);
      dropout.apply(z, row, 0, a.cols);
      write_row(z, y, a.cols);
    }
  }
}

// scratch: the columns' sums of a run of rows, for dweight and dbias, and a row of gradients.
template <typename T>
void bwd(const NormGradArguments& a, const float* weight, float* dweight, float* dbias,
         int64_t first, int64_t last, float* scratch) {
  const HiddenDropout dropout(a.dropout, a.dropout_rows);
  const int64_t stride = padded(a.cols);
  float *weight_run = scratch, *bias_run = scratch + stride, *d_row = scratch + 2 * stride;
  for (int64_t c = 0; c < 2 * stride; c += kWidth) store(scratch + c, Vf{});
  for (int64_t row = first; row < last; ++row) {
    const float mean = a.mean[row], rstd = a.rstd[row];
    const T* z = row_of<T>(a.z, row, a.z_stride);
    const T* dy_row = row_of<T>(a.dy, row, a.dy_stride);
    Vf sum_g[4] = {}, sum_gx[4] = {};
    // Past the end dy is 0, and so is all that is summed.
    for_columns<4>(a.cols, [&](int turn, int64_t c, int64_t n, Vi) INLINE_LAMBDA {
      const Vf x = (load_columns(z + c, n) - mean) * rstd;
      const Vf dy = load_columns(dy_row + c, n);
      if (dweight != nullptr) store(weight_run + c, load(weight_run + c) + dy * x);
      if (dbias != nullptr) store(bias_run + c, load(bias_run + c) + dy);
      const Vf g = weight != nullptr ? dy * load(weight + c) : dy;
      sum_g[turn] += g;
      sum_gx[turn] += g * x;
    });
    const float mean_g = sum_turns(sum_g) / static_cast<float>(a.cols);
    const float mean_gx = sum_turns(sum_gx) / static_cast<float>(a.cols);
    const T* dz = a.dz != nullptr ? row_of<T>(a.dz, row, a.dz_stride) : nullptr;
    T* dx = row_of<T>(a.dx, row, a.cols);
    T* dresidual = a.dresidual != nullptr ? row_of<T>(a.dresidual, row, a.cols) : nullptr;
    const bool drops = a.dropout.threshold != 0;
    for_columns<1>(a.cols, [&](int, int64_t c, int64_t n, Vi) INLINE_LAMBDA {
      const Vf x = (load_columns(z + c, n) - mean) * rstd;
      const Vf dy = load_columns(dy_row + c, n);
      const Vf g = weight != nullptr ? dy * load(weight + c) : dy;
      Vf d = rstd * (g - mean_g - x * mean_gx);
      if (dz != nullptr) d += load_columns(dz + c, n);
      if (dresidual != nullptr) store_columns(dresidual + c, d, n);
      if (drops) {
        store(d_row + c, d);
      } else {
        store_columns(dx + c, d, n);
      }
    });
    if (drops) {
      dropout.apply(d_row, row, 0, a.cols);
      write_row(d_row, dx, a.cols);
    }
    if ((row - first) % kRunRows == kRunRows - 1 || row == last - 1) {
      if (dweight != nullptr) add_run(weight_run, dweight, dweight + stride, a.cols);
      if (dbias != nullptr) add_run(bias_run, dbias, dbias + stride, a.cols);
    }
  }
}

}  // namespace

void layer_norm_fwd(const NormArguments& a, const float* weight, const float* bias, int64_t first,
                    int64_t last, float* scratch) {
  if (a.dtype == DType::kFloat32) return fwd<float>(a, weight, bias, first, last, scratch);
  if (a.dtype == DType::kFloat16) return fwd<Half>(a, weight, bias, first, last, scratch);
  return fwd<BFloat16>(a, weight, bias, first, last, scratch);
}

void embedding_layer_norm_fwd(const EmbeddingArguments& e, const float* weight, const float* bias,
                              int64_t first, int64_t last, float* scratch) {
  const DType dtype = e.norm.dtype;
  if (dtype == DType::kFloat32) return embedding_fwd<float>(e, weight, bias, first, last, scratch);
  if (dtype == DType::kFloat16) return embedding_fwd<Half>(e, weight, bias, first, last, scratch);
  return embedding_fwd<BFloat16>(e, weight, bias, first, last, scratch);
}

void layer_norm_bwd(const NormGradArguments& a, const float* weight, float* dweight, float* dbias,
                    int64_t first, int64_t last, float* scratch) {
  if (a.dtype == DType::kFloat32)
    return bwd<float>(a, weight, dweight, dbias, first, last, scratch);
  if (a.dtype == DType::kFloat16) return bwd<Half>(a, weight, dweight, dbias, first, last, scratch);
  return bwd<BFloat16>(a, weight, dweight, dbias, first, last, scratch);
}

}  // namespace bertkern::BERTKERN_ISA
