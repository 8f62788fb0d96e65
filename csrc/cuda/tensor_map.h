// Making tensor maps, by which kernels on the copy engine (ptx/tma.cuh) reach a tensor.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/shared_tile.h"
#include "common/tensor_map.h"

namespace bertkern::cuda {

// A tensor of 16-bit elements on the device, and the box of it that is copied at a time. Dimensions
// stand from the innermost on, as coordinates do in tma_load.
struct TensorBoxes {
  const void* data;
  DType dtype;
  int rank;          // 2 to 5
  int64_t sizes[5];  // in elements
  int64_t
      strides[5];   // in elements; the first is 1, that of a dimension of size 1 is not looked at
  int box[5];       // in elements; in shared memory it is contiguous, but for the swizzle
  Swizzle swizzle;  // of rows of box[0] elements
};

// Throws std::invalid_argument, naming the value and those allowed, for what a map cannot describe.
inline void check_tensor_boxes(const TensorBoxes& boxes, const std::string& what) {
  const auto demand = [&what](bool holds, const std::string& name, int64_t value,
                              const std::string& allowed) {
    if (!holds) {
      throw std::invalid_argument(what + ": " + name + " is " + std::to_string(value) +
                                  "; allowed: " + allowed);
    }
  };
  const auto at = [](const char* name, int i) {
    return std::string(name) + "[" + std::to_string(i) + "]";
  };
  demand(boxes.dtype != DType::kFloat32, "dtype", static_cast<int64_t>(boxes.dtype),
         "FLOAT16 (1) and BFLOAT16 (2)");
  demand(boxes.rank >= 2 && boxes.rank <= 5, "rank", boxes.rank, "2 to 5");
  demand(reinterpret_cast<uintptr_t>(boxes.data) % 16 == 0, "data",
         static_cast<int64_t>(reinterpret_cast<uintptr_t>(boxes.data)), "multiples of 16");
  demand(boxes.strides[0] == 1, "strides[0]", boxes.strides[0], "1, elements side by side");
  for (int i = 0; i < boxes.rank; ++i) {
    demand(boxes.sizes[i] >= 1 && boxes.sizes[i] <= int64_t{1} << 32, at("sizes", i),
           boxes.sizes[i], "1 to 2^32");
    demand(boxes.box[i] >= 1 && boxes.box[i] <= 256, at("box", i), boxes.box[i], "1 to 256");
    const int64_t stride = boxes.strides[i];
    demand(i == 0 || boxes.sizes[i] == 1 ||
               (stride >= 0 && stride < int64_t{1} << 39 && stride % 8 == 0),
           at("strides", i), stride, "multiples of 8 (16 bytes) from 0 to below 2^39");
  }
  const int row = boxes.box[0] * element_bytes(boxes.dtype), span = swizzle_span(boxes.swizzle);
  demand(row % 16 == 0, "box[0]", boxes.box[0], "multiples of 8 (16 bytes)");
  demand(boxes.swizzle == Swizzle::kNone || row <= span, "box[0]", boxes.box[0],
         "up to " + std::to_string(span / element_bytes(boxes.dtype)) + ", the swizzle's " +
             std::to_string(span) + " bytes");
}

// The map of the tensor. Elements outside it are read as zeros. Throws std::invalid_argument as
// above and std::runtime_error where the driver makes no maps (devices before sm_90).
TensorMap make_tensor_map(const TensorBoxes& boxes, const std::string& what);

}  // namespace bertkern::cuda
