// Tensor maps are encoded by the driver. Its function is asked for through the runtime, so that
// this module loads where there is no driver.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "cuda/launch.h"
#include "cuda/tensor_map.h"

namespace bertkern::cuda {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) &&
                  alignof(TensorMap) >= alignof(CUtensorMap),
              "kernels take the driver's own bits");

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  constexpr unsigned kSince = 12000;  // the CUDA version that the function is of
  check(cudaGetDriverEntryPointByVersion(kName, &entry, kSince, cudaEnableDefault, &found), kName);
#else
  check(cudaGetDriverEntryPoint(kName, &entry, cudaEnableDefault, &found), kName);
#endif
  if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
    throw std::runtime_error(std::string(kName) + ": the driver does not have it; CUDA 12.0 does");
  }
  return reinterpret_cast<Encode>(entry);
}

CUtensorMapSwizzle driver_swizzle(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case Swizzle::k64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::k128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

}  // namespace

TensorMap make_tensor_map(const TensorBoxes& boxes, const std::string& what) {
  check_tensor_boxes(boxes, what);
  static const Encode encode = find_encode();  // a failure throws, and is tried again
  const int bytes = element_bytes(boxes.dtype);
  cuuint64_t sizes[5], strides[4];  // in elements; in bytes, from the second dimension on
  cuuint32_t box[5], steps[5];
  for (int i = 0; i < boxes.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(boxes.sizes[i]);
    box[i] = static_cast<cuuint32_t>(boxes.box[i]);
    steps[i] = 1;
    if (i == 0) continue;
    // Where there is one element any stride is right, and the driver may not like the given one:
    // that of a dense tensor.
    const auto given = static_cast<cuuint64_t>(boxes.strides[i] * bytes);
    const cuuint64_t dense = (i == 1 ? bytes : strides[i - 2]) * sizes[i - 1];
    strides[i - 1] = boxes.sizes[i] == 1 ? (dense + 15) / 16 * 16 : given;
  }
  CUtensorMap map;
  // Rows of 64 elements are 128 bytes: larger requests would fetch the neighbouring head's, too.
  const CUresult result =
      encode(&map,
             boxes.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
             static_cast<cuuint32_t>(boxes.rank), const_cast<void*>(boxes.data), sizes, strides,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, driver_swizzle(boxes.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(what + ": cuTensorMapEncodeTiled answers CUresult " +
                             std::to_string(static_cast<int>(result)));
  }
  TensorMap made;
  memcpy(&made, &map, sizeof(made));
  return made;
}

}  // namespace bertkern::cuda
