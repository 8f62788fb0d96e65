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
         int shared_bytes, int cluster) {
        run_fault(name, at<float>(x), at<float>(y), fault,
                  {blocks, threads, shared_bytes, cluster});
      },
      "name"_a, "x"_a, "y"_a, "fault"_a, "blocks"_a, "threads"_a, "shared_bytes"_a, "cluster"_a);
  m.def(
      "product",
      [](uintptr_t a, uintptr_t b, uintptr_t d, bool bfloat16, int operands) {
        run_product({at<const uint16_t>(a), at<const uint16_t>(b), at<float>(d), bfloat16},
                    static_cast<Operands>(operands));
      },
      "a"_a, "b"_a, "d"_a, "bfloat16"_a, "operands"_a,
      "d += a b. Operands: 0 as the layout of fragments has them, 1 by ldmatrix, 2 transposed.");
  m.def(
      "warpgroup_products",
      [](uintptr_t shared, uintptr_t a, uintptr_t tiles, uintptr_t places, uintptr_t d,
         int shared_bytes, int steps, int n, bool bfloat16, bool a_in_registers, bool transpose_a,
         bool transpose_b, bool accumulate) {
        run_warpgroup_products({at<const uint32_t>(shared), at<const uint32_t>(a),
                                at<const int64_t>(tiles), at<const int32_t>(places), at<float>(d),
                                shared_bytes, steps, n, bfloat16, a_in_registers, transpose_a,
                                transpose_b, accumulate});
      },
      "shared"_a, "a"_a, "tiles"_a, "places"_a, "d"_a, "shared_bytes"_a, "steps"_a, "n"_a,
      "bfloat16"_a, "a_in_registers"_a, "transpose_a"_a, "transpose_b"_a, "accumulate"_a);
  m.def(
      "box",
      [](uintptr_t data, bool bfloat16, const std::vector<int64_t>& sizes,
         const std::vector<int64_t>& strides, const std::vector<int>& box,
         const std::vector<int>& position, int swizzle, uintptr_t tile, bool load) {
        Box what{
            at<uint16_t>(data), bfloat16, static_cast<int>(sizes.size()), {}, {}, {}, {}, swizzle};
        for (size_t i = 0; i < sizes.size(); ++i) {
          what.sizes[i] = sizes[i];
          what.strides[i] = strides[i];
          what.box[i] = box[i];
          what.at[i] = position[i];
        }
        run_box(what, at<uint32_t>(tile), load);
      },
      "data"_a, "bfloat16"_a, "sizes"_a, "strides"_a, "box"_a, "at"_a, "swizzle"_a, "tile"_a,
      "load"_a, "Dimensions from the innermost on, strides in elements.");
  m.def(
      "pipeline",
      [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int queries, int keys, int fault) {
        run_pipeline({at<const uint16_t>(q), at<const uint16_t>(k), at<const uint16_t>(v),
                      at<uint16_t>(out), queries, keys, fault});
      },
      "q"_a, "k"_a, "v"_a, "out"_a, "queries"_a, "keys"_a, "fault"_a);
  m.def(
      "program",
      [](uintptr_t acts, uintptr_t syncs, uintptr_t source, uintptr_t sink, int steps) {
        run_program({at<const int32_t>(acts), at<const int32_t>(syncs), at<const float>(source),
                     at<float>(sink), steps});
      },
      "acts"_a, "syncs"_a, "source"_a, "sink"_a, "steps"_a);
  m.def(
      "async_program",
      [](uintptr_t acts, uintptr_t syncs, uintptr_t arrivals, uintptr_t parities, uintptr_t source,
         uintptr_t sink, uintptr_t stored, int steps) {
        run_async_program({at<const int32_t>(acts), at<const int32_t>(syncs),
                           at<const int32_t>(arrivals), at<const int32_t>(parities),
                           at<const float>(source), at<float>(sink), at<uint16_t>(stored), steps});
      },
      "acts"_a, "syncs"_a, "arrivals"_a, "parities"_a, "source"_a, "sink"_a, "stored"_a, "steps"_a);
  m.def(
      "casts",
      [](uintptr_t x, uintptr_t half, uintptr_t bfloat16, uintptr_t from_half,
         uintptr_t from_bfloat16, int count) {
        run_casts({at<const float>(x), at<uint16_t>(half), at<uint16_t>(bfloat16),
                   at<float>(from_half), at<float>(from_bfloat16), count});
      },
      "x"_a, "half"_a, "bfloat16"_a, "from_half"_a, "from_bfloat16"_a, "count"_a);
}
