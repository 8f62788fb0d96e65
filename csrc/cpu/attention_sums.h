// What several heads add up to in the backward of attention: the gradient of a bias that they
// share, and of keys and values that a group of query heads reads.
//
// Heads are done in waves. Each head of a wave has buffers of its own; between waves they are added
// to the sums, head after head in the order of (sequence, head). So no result depends on the number
// of threads or on the size of a wave.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "parallel.h"
#include "params.h"

namespace bertkern::cpu {

// Memory that is not filled before a head writes it, and the floats behind that a kernel may read.
using Parts = std::unique_ptr<float[]>;
constexpr int64_t kVectorSlack = 16;

// dbias [B or 1, H or 1, Sq or 1, Sk or 1], contiguous, in the bias's dtype. A head makes its part
// [Sq or 1, Sk or 1] in fp32, already summed over queries and keys where the bias has one of them;
// parts are added up in double.
class BiasGrad {
 public:
  explicit BiasGrad(const AttentionArguments& a)
      : a_(a),
        wanted_(a.bias.grad != nullptr),
        dtype_(a.bias.kind == BiasKind::kFloat32 ? DType::kFloat32 : a.dtype),
        floats_(a.bias.sizes[2] * a.bias.sizes[3]),
        matrices_(a.bias.sizes[0] * a.bias.sizes[1]),
        shared_(matrices_ != a.batch * a.heads) {}

  // Whether parts go through buffers; else each head can write its own part of dbias.
  bool is_buffered() const { return wanted_ && (shared_ || dtype_ != DType::kFloat32); }

  int64_t floats_of_head() const { return wanted_ ? floats_ : 0; }

  void own_part(int64_t batch, int64_t head, AttentionHead& h) const {
    if (wanted_) place(static_cast<float*>(a_.bias.grad) + (batch * a_.heads + head) * floats_, h);
  }

  void reserve(int64_t wave) {
    if (!wanted_) return;
    parts_.reset(new float[wave * floats_ + kVectorSlack]);
    if (shared_) sums_.resize(matrices_ * floats_);
  }

  void part(int64_t i, AttentionHead& h) {
    if (wanted_) place(parts_.get() + i * floats_, h);
  }

  // Adds the parts of `count` heads, the first of which is number `first` of all.
  void add(int64_t first, int64_t count, int threads) {
    if (!wanted_) return;
    if (!shared_) {
      parallel_for(count, threads, [&](int64_t i) {
        write_floats(parts_.get() + i * floats_, (first + i) * floats_, floats_);
      });
      return;
    }
    in_chunks(threads, [&](int64_t matrix, int64_t begin, int64_t end) {
      double* sum = sums_.data() + matrix * floats_;
      for (int64_t i = 0; i < count; ++i) {
        if (matrix_of(first + i) != matrix) continue;
        const float* part = parts_.get() + i * floats_;
        for (int64_t c = begin; c < end; ++c) sum[c] += part[c];
      }
    });
  }

  void write(int threads) const {
    if (!wanted_ || !shared_) return;
    in_chunks(threads, [&](int64_t matrix, int64_t begin, int64_t end) {
      float rounded[kChunk + kVectorSlack];
      const int64_t at = matrix * floats_ + begin;
      for (int64_t c = 0; c < end - begin; ++c) rounded[c] = static_cast<float>(sums_[at + c]);
      write_floats(rounded, at, end - begin);
    });
  }

 private:
  static constexpr int64_t kChunk = 4096;

  void place(float* part, AttentionHead& h) const {
    h.dbias = part;
    h.dbias_floats = floats_;
    h.dbias_row = a_.bias.sizes[2] == 1 ? 0 : a_.bias.sizes[3];
    h.dbias_key = a_.bias.sizes[3] == 1 ? 0 : 1;
  }

  void write_floats(const float* source, int64_t at, int64_t count) const {
    char* target = static_cast<char*>(a_.bias.grad) + at * element_bytes(dtype_);
    kernels().from_float(source, target, dtype_, count);
  }

  int64_t matrix_of(int64_t i) const {
    const int64_t batch = a_.bias.sizes[0] == 1 ? 0 : i / a_.heads;
    return batch * a_.bias.sizes[1] + (a_.bias.sizes[1] == 1 ? 0 : i % a_.heads);
  }

  template <typename Work>
  void in_chunks(int threads, const Work& work) const {
    const int64_t chunks = (floats_ + kChunk - 1) / kChunk;
    parallel_for(matrices_ * chunks, threads, [&](int64_t item) {
      const int64_t begin = item % chunks * kChunk;
      work(item / chunks, begin, std::min(floats_, begin + kChunk));
    });
  }

  const AttentionArguments& a_;
  const bool wanted_;
  const DType dtype_;
  const int64_t floats_, matrices_;
  const bool shared_;
  Parts parts_;
  std::vector<double> sums_;
};

// dk and dv of a key head: the sum over its query heads, each [Sk, D] in fp32.
class GroupSums {
 public:
  GroupSums(const AttentionArguments& a, int64_t most_keys)
      : a_(a),
        group_(a.heads / std::max<int64_t>(a.key_heads, 1)),
        floats_(most_keys * a.head_dim) {}

  bool wanted() const { return group_ > 1; }
  int64_t group() const { return group_; }
  int64_t floats_of_head() const { return wanted() ? 2 * floats_ : 0; }

  void reserve(int64_t wave) {
    if (wanted()) parts_.reset(new float[wave * floats_of_head() + kVectorSlack]);
  }

  void part(int64_t i, AttentionHead& h) {
    if (!wanted()) return;
    h.float_sums = true;
    h.dk = parts_.get() + i * 2 * floats_;
    h.dv = parts_.get() + (i * 2 + 1) * floats_;
    h.dk_row = h.dv_row = a_.head_dim;
  }

  // Adds the parts of `count` heads, whole groups; head_of(i) has the places of the sums.
  template <typename HeadOf>
  void add(int64_t count, int threads, const HeadOf& head_of) {
    if (!wanted()) return;
    parallel_for(count / group_, threads, [&](int64_t i) {
      const AttentionHead h = head_of(i * group_);
      for (int which = 0; which < 2; ++which) {
        float* sum = parts_.get() + (i * group_ * 2 + which) * floats_;
        const int64_t used = h.len_k * a_.head_dim;
        for (int64_t g = 1; g < group_; ++g) {
          const float* part = sum + g * 2 * floats_;
          for (int64_t c = 0; c < used; ++c) sum[c] += part[c];
        }
        char* target = static_cast<char*>(which == 0 ? h.dk : h.dv);
        const int64_t row = (which == 0 ? h.dk_row : h.dv_row) * element_bytes(a_.dtype);
        for (int64_t j = 0; j < h.len_k; ++j) {
          kernels().from_float(sum + j * a_.head_dim, target + j * row, a_.dtype, a_.head_dim);
        }
      }
    });
  }

 private:
  const AttentionArguments& a_;
  const int64_t group_, floats_;
  Parts parts_;
};

}  // namespace bertkern::cpu
