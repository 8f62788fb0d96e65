// Calls every op of csrc/cuda in each way that chooses another kernel: with launch.h of this folder
// the launches are printed, with threads and shared memory as the launch code computes them. What
// decides is read from the ops' own headers (tiles, limits). No kernel runs, no address is read.
#include <initializer_list>

#include "cuda/attention.h"
#include "cuda/device.h"
#include "cuda/embedding_layer_norm.h"
#include "cuda/layer_norm.h"
#include "cuda/tensor_map.h"

namespace bertkern::cuda {

namespace {
int capability_at_hand;
}

// What would ask the CUDA runtime and the driver.
int capability(int) { return capability_at_hand; }
int multiprocessors(int) { return 1; }
TensorMap make_tensor_map(const TensorBoxes& boxes, const std::string& what) {
  check_tensor_boxes(boxes, what);
  return {};
}

namespace {

constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
alignas(16) char something[16];  // stands for tensors that an op may lack

void attention(DType dtype, int head_dim, AttentionVariant variant) {
  AttentionKernelArguments a{};
  a.batch = a.heads = a.key_heads = 1;
  a.head_dim = head_dim;
  // What the copy engine can reach, so that it is not why Hopper's kernels are passed over.
  a.q = a.k = a.v = a.dout = {something, head_dim, head_dim, head_dim};
  a.scale = 1.0f;
  a.dropout_threshold = variant == AttentionVariant::kDropout;
  if (variant == AttentionVariant::kGeneral) a.bias_kind = DeviceBias::kSame;
  for (int& size : a.bias_sizes) size = 1;
  a.dbias = something;
  // Both ways of the backward: where lengths differ within a batch it launches them all.
  a.seqlen_q = a.seqlen_k = 1 << 14;
  a.key_lengths = reinterpret_cast<const int32_t*>(something);
  attention_fwd(a, dtype, 0, nullptr);
  attention_bwd(a, dtype, 0, nullptr);
  // Varlen, whose sequences are put in order first.
  a.batch = 2;
  a.total_q = a.total_k = a.seqlen_q;
  a.key_lengths = nullptr;
  a.cu_seqlens_q = a.cu_seqlens_k = reinterpret_cast<const int32_t*>(something);
  a.order = reinterpret_cast<int32_t*>(something);
  attention_fwd(a, dtype, 0, nullptr);
}

void layer_norm(DType dtype, int cols) {
  NormKernelArguments forward{};
  forward.rows.count = 1;
  forward.rows.cols = cols;
  layer_norm_fwd(forward, dtype, dtype, 0, nullptr);
  NormGradKernelArguments backward{};
  backward.rows = forward.rows;
  backward.partial = reinterpret_cast<float*>(something);
  layer_norm_bwd(backward, something, something, dtype, dtype, 0, nullptr);
}

void embedding_layer_norm(DType dtype, int cols) {
  EmbeddingKernelArguments forward{};
  forward.rows.count = 1;
  forward.rows.cols = cols;
  for (int& size : forward.tables.size) size = 1;
  embedding_layer_norm_fwd(forward, dtype, dtype, 0, nullptr);
  EmbeddingGradKernelArguments backward{};
  backward.tables = forward.tables;
  backward.rows = forward.rows;
  backward.dz_stride = cols;
  backward.partial = reinterpret_cast<float*>(something);
  embedding_layer_norm_bwd(backward, something, something, dtype, dtype, 0, nullptr);
  TableGradArguments tables{};
  tables.tokens = 1;
  tables.cols = cols;
  tables.dz_stride = cols;
  for (int& size : tables.size) size = 1;
  embedding_layer_norm_tables(tables, dtype, 0, nullptr);
  EmbeddingKeyArguments keys{};
  keys.tokens = 1;
  for (int& size : keys.size) size = 1;
  embedding_layer_norm_keys(keys, 0, nullptr);
}

}  // namespace
}  // namespace bertkern::cuda

int main() {
  using namespace bertkern;
  using namespace bertkern::cuda;
  for (int capability : {80, 90}) {
    capability_at_hand = capability;
    for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      for (int head_dim = 8; head_dim <= kAttentionMaxHeadDim; head_dim += 8) {
        for (auto variant :
             {AttentionVariant::kPlain, AttentionVariant::kDropout, AttentionVariant::kGeneral}) {
          attention(dtype, head_dim, variant);
        }
      }
    }
  }
  for (DType dtype : kTypes) {
    for (int cols = 8; cols <= kNormMaxCols; cols += 8) {
      layer_norm(dtype, cols);
      embedding_layer_norm(dtype, cols);
    }
  }
}
