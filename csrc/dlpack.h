// The part of DLPack's C exchange interface that tells what a tensor is without copying it
// (github.com/dmlc/dlpack, version 1): torch offers it as torch.Tensor.__dlpack_c_exchange_api__,
// so that nothing here is compiled against torch.
#pragma once

#include <cstdint>

namespace bertkern::dlpack {

struct Device {
  int32_t type, index;
};

struct Element {
  uint8_t code, bits;
  uint16_t lanes;
};

enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  Element element;
  int64_t* sizes;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  void* older;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*describe)(void* py_object, Tensor* out);  // 0, or -1 with a Python error set
  void* current_stream;
};

constexpr uint32_t kMajor = 1;
constexpr char kCapsule[] = "dlpack_exchange_api";

}  // namespace bertkern::dlpack
