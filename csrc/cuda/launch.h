// Launching a kernel: the one place that hands a grid to the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace bertkern::cuda {

// What a launch needs, computed in plain C++. `blocks` is a multiple of `cluster`, the blocks that
// run at the same time and reach each other's shared memory.
struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;
  int cluster = 1;
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Makes `device` current and restores the one before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Kernels take one argument struct. Shared memory of more than 48 KB needs the kernel's permission.
template <typename Arguments>
void launch(void (*kernel)(Arguments), const Launch& shape, const Arguments& arguments,
            void* stream, const char* what) {
  if (shape.blocks > 0x7FFFFFFF) {
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(shape.blocks) +
                                " blocks; at most 2147483647 fit a grid");
  }
  if (shape.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shape.shared_bytes),
          what);
  }
  if (shape.cluster == 1) {
    kernel<<<static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.threads),
             static_cast<size_t>(shape.shared_bytes), static_cast<cudaStream_t>(stream)>>>(
        arguments);
    return check(cudaGetLastError(), what);
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(shape.blocks);
  config.blockDim = static_cast<unsigned>(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments), what);
}

}  // namespace bertkern::cuda
