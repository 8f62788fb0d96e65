// What stands in for the CUDA ops in a build without CUDA. setup.py compiles this file or the .cu
// files.
#include <stdexcept>

#include "device.h"
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
void layer_norm_fwd(const NormArguments&, int, void*) { refuse(); }
void layer_norm_bwd(const NormGradArguments&, int, void*) { refuse(); }

int device_count(std::string& reason) {
  reason = std::string("bertkern._C was built without CUDA: ") + BERTKERN_CUDA_REASON;
  return 0;
}

}  // namespace bertkern::cuda
