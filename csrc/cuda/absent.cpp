// What stands in for the CUDA ops in a build without CUDA. setup.py compiles this file or the .cu
// files.
#include <stdexcept>

#include "attention.h"
#include "device.h"
#include "embedding_layer_norm.h"
#include "layer_norm.h"

namespace bertkern::cuda {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(std::string("bertkern._C was built without CUDA: ") +
                           BERTKERN_CUDA_REASON);
}

}  // namespace

int64_t layer_norm_max_cols() { return 0; }
int64_t layer_norm_partials(int64_t) { return 0; }
void layer_norm_fwd(NormKernelArguments, DType, DType, int, void*) { refuse(); }
void layer_norm_bwd(NormGradKernelArguments, void*, void*, DType, DType, int, void*) { refuse(); }

int64_t embedding_layer_norm_chunks(int64_t) { return 0; }
void embedding_layer_norm_fwd(EmbeddingKernelArguments, DType, DType, int, void*) { refuse(); }
void embedding_layer_norm_keys(const EmbeddingKeyArguments&, int, void*) { refuse(); }
void embedding_layer_norm_bwd(EmbeddingGradKernelArguments, void*, void*, DType, DType, int,
                              void*) {
  refuse();
}
void embedding_layer_norm_tables(TableGradArguments, DType, int, void*) { refuse(); }

void attention_fwd(const AttentionKernelArguments&, DType, int, void*) { refuse(); }
void attention_bwd(const AttentionKernelArguments&, DType, int, void*) { refuse(); }

int device_count(std::string& reason) {
  reason = std::string("bertkern._C was built without CUDA: ") + BERTKERN_CUDA_REASON;
  return 0;
}

}  // namespace bertkern::cuda
