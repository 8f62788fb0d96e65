#include "machine/maps.h"

#include <cstring>
#include <string>

#include "cuda/tensor_map.h"
#include "machine/watch.h"

namespace bertkern {
namespace {

constexpr uint64_t kMark = 0x70616D2072736E74u;

}  // namespace

TensorMap cuda::make_tensor_map(const TensorBoxes& boxes, const std::string& what) {
  check_tensor_boxes(boxes, what);
  emulator::EmulatedMap map = {};
  map.mark = kMark;
  map.data = static_cast<char*>(const_cast<void*>(boxes.data));
  map.rank = static_cast<int16_t>(boxes.rank);
  map.swizzle = boxes.swizzle;
  for (int i = 0; i < boxes.rank; ++i) {
    map.sizes[i] = boxes.sizes[i];
    map.box[i] = static_cast<int16_t>(boxes.box[i]);
    if (i > 0) map.strides[i - 1] = boxes.strides[i];
  }
  TensorMap made = {};
  static_assert(sizeof(map) <= sizeof(made));
  std::memcpy(&made, &map, sizeof(map));
  return made;
}

const emulator::EmulatedMap& emulator::read_tensor_map(const void* pointer, int rank,
                                                       const void* place) {
  const auto& map = *static_cast<const EmulatedMap*>(pointer);
  if (reinterpret_cast<uintptr_t>(pointer) % 64 != 0 || map.mark != kMark) {
    fail_at("takes a tensor map", place, "there is none at this address");
  }
  if (rank != 0 && map.rank != rank) {
    fail_at("takes a tensor map", place,
            "it has rank " + std::to_string(map.rank) + ", the box " + std::to_string(rank));
  }
  return map;
}

}  // namespace bertkern
