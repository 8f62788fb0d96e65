// The test kernels on a machine of their own, as a Python module.
#include "controls.h"
#include "kernels/arguments.h"

namespace bertkern::emulator::test {
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace
}  // namespace bertkern::emulator::test

PYBIND11_MODULE(_faults, m) {
  using pybind11::literals::operator""_a;
  using namespace bertkern::emulator::test;
  bertkern::emulator::bind_machine(m);
  m.def(
      "fault",
      [](const std::string& name, uintptr_t x, uintptr_t y, int fault, int blocks, int threads,
         int shared_bytes) {
        run_fault(name, {at<float>(x), at<float>(y), fault}, blocks, threads, shared_bytes);
      },
      "name"_a, "x"_a, "y"_a, "fault"_a, "blocks"_a, "threads"_a, "shared_bytes"_a);
  m.def(
      "product",
      [](uintptr_t a, uintptr_t b, uintptr_t d, bool bfloat16, int operands) {
        run_product({at<const uint16_t>(a), at<const uint16_t>(b), at<float>(d), bfloat16},
                    static_cast<Operands>(operands));
      },
      "a"_a, "b"_a, "d"_a, "bfloat16"_a, "operands"_a,
      "d += a b. Operands: 0 as the layout of fragments has them, 1 by ldmatrix, 2 transposed.");
  m.def(
      "program",
      [](uintptr_t acts, uintptr_t syncs, uintptr_t source, uintptr_t sink, int steps) {
        run_program({at<const int32_t>(acts), at<const int32_t>(syncs), at<const float>(source),
                     at<float>(sink), steps});
      },
      "acts"_a, "syncs"_a, "source"_a, "sink"_a, "steps"_a);
  m.def(
      "casts",
      [](uintptr_t x, uintptr_t half, uintptr_t bfloat16, uintptr_t from_half,
         uintptr_t from_bfloat16, int count) {
        run_casts({at<const float>(x), at<uint16_t>(half), at<uint16_t>(bfloat16),
                   at<float>(from_half), at<float>(from_bfloat16), count});
      },
      "x"_a, "half"_a, "bfloat16"_a, "from_half"_a, "from_bfloat16"_a, "count"_a);
}
