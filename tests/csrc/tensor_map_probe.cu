// tensor_map_probe data dtype swizzle rank sizes… strides… box…
//
// Prints what make_tensor_map asks of the driver, which is one of our own here, or the exception's
// kind and message.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/tensor_map.h"

namespace {

constexpr unsigned char kMark = 0xA5;  // what the driver fills a map with

void print(const char* name, int count, const cuuint64_t* values) {
  std::printf(" %s", name);
  for (int i = 0; i < count; ++i) std::printf(" %llu", static_cast<unsigned long long>(values[i]));
}
void print(const char* name, int count, const cuuint32_t* values) {
  std::printf(" %s", name);
  for (int i = 0; i < count; ++i) std::printf(" %u", values[i]);
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  if (sizes[0] == 99) return CUDA_ERROR_INVALID_VALUE;
  const int n = static_cast<int>(rank);
  std::printf("%s at %p", type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? "fp16" : "bf16", data);
  print("sizes", n, sizes);
  print("strides", n - 1, strides);
  print("box", n, box);
  print("steps", n, steps);
  std::printf(" swizzle %d interleave %d fill %d", swizzle, interleave, fill);
  std::memset(map, kMark, sizeof(*map));
  return CUDA_SUCCESS;
}

cudaError_t find(const char* name, void** entry, cudaDriverEntryPointQueryResult* found) {
  const bool known =
      std::getenv("OLD_DRIVER") == nullptr && std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *entry = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return std::getenv("NO_DRIVER") == nullptr ? cudaSuccess : cudaErrorInsufficientDriver;
}

}  // namespace

// In place of the runtime's own.
#if CUDART_VERSION >= 12050
cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned,
                                                       unsigned long long,
                                                       cudaDriverEntryPointQueryResult* found) {
  return find(name, entry, found);
}
#else
cudaError_t CUDARTAPI cudaGetDriverEntryPoint(const char* name, void** entry, unsigned long long,
                                              cudaDriverEntryPointQueryResult* found) {
  return find(name, entry, found);
}
#endif

int main(int, char** arguments) {
  const auto next = [&arguments] { return std::strtoll(*++arguments, nullptr, 0); };
  bertkern::cuda::TensorBoxes boxes{};
  boxes.data = reinterpret_cast<const void*>(next());
  boxes.dtype = static_cast<bertkern::DType>(next());
  boxes.swizzle = static_cast<bertkern::Swizzle>(next());
  boxes.rank = static_cast<int>(next());
  const int given = boxes.rank < 5 ? boxes.rank : 5;
  for (int i = 0; i < given; ++i) boxes.sizes[i] = next();
  for (int i = 0; i < given; ++i) boxes.strides[i] = next();
  for (int i = 0; i < given; ++i) boxes.box[i] = static_cast<int>(next());
  try {
    const bertkern::TensorMap map = bertkern::cuda::make_tensor_map(boxes, "keys");
    const auto* bytes = reinterpret_cast<const unsigned char*>(&map);
    for (size_t i = 0; i < sizeof(CUtensorMap); ++i) {
      if (bytes[i] != kMark) std::printf(" byte %zu of the map is lost", i);
    }
  } catch (const std::invalid_argument& error) {
    std::printf("invalid_argument %s", error.what());
  } catch (const std::runtime_error& error) {
    std::printf("runtime_error %s", error.what());
  }
  return 0;
}
