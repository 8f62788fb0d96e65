// The CUDA LayerNorm ops on the emulator, called by test_layer_norm.py: null or the error's
// message.
#include "cuda/layer_norm.cu"

namespace {

template <typename Body>
const char* guarded(Body body) {
  static std::string message;
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" const char* layer_norm_fwd(const bertkern::cuda::NormArguments* arguments,
                                      int descending) {
  bertkern::cuda::descending = descending != 0;
  return guarded([&] { bertkern::cuda::layer_norm_fwd(*arguments, 0, nullptr); });
}

extern "C" const char* layer_norm_bwd(const bertkern::cuda::NormGradArguments* arguments,
                                      int descending) {
  bertkern::cuda::descending = descending != 0;
  return guarded([&] { bertkern::cuda::layer_norm_bwd(*arguments, 0, nullptr); });
}

extern "C" int64_t layer_norm_partials(int64_t rows) {
  return bertkern::cuda::layer_norm_partials(rows);
}
