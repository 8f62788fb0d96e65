// CUDA devices: how many the runtime inside this module can use, or why none; what they are.
#include <cuda_runtime.h>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace bertkern::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

int device_count(std::string& reason) {
  int driver = 0, runtime = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  const auto name = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    reason = "no NVIDIA driver on this machine";
    return 0;
  }
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    reason = error == cudaErrorInsufficientDriver
                 ? "the driver supports CUDA " + name(driver) +
                       ", older than the runtime inside, CUDA " + name(runtime)
                 : std::string("cudaGetDeviceCount: ") + cudaGetErrorString(error);
    return 0;
  }
  if (count == 0) {
    reason = "the driver reports no device";
    return 0;
  }
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) == cudaSuccess &&
      major < 8) {
    reason = "device 0 is of compute capability " + std::to_string(major) + "." +
             std::to_string(minor) + "; the kernels need 8.0";
    return 0;
  }
  return count;
}

int capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

}  // namespace bertkern::cuda
