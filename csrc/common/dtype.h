// Codes of element types and activations, as Python passes them.
#pragma once

namespace bertkern {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum class Activation : int { kNone = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

constexpr int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace bertkern
