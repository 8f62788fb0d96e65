// The processor's peak of multiply-adds, measured.
#pragma once

#include <vector>

namespace bertkern::cpu {

enum class FmaType { kFloat32, kBFloat16, kInt8 };

// Operations a second (two a multiply-add) of several repeats on `threads` threads; empty where the
// processor has no such instruction.
std::vector<double> fma_rates(FmaType type, int threads);

}  // namespace bertkern::cpu
