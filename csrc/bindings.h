// What the bindings of the CPU and of the CUDA ops share: addresses, strides, checks.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtype.h"

namespace bertkern {

namespace py = pybind11;
using py::literals::operator""_a;

using Address = uintptr_t;
using Strides = std::tuple<int64_t, int64_t, int64_t>;  // batch, sequence, head
using FourSizes = std::array<int64_t, 4>;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void check(bool good, const std::string& message) {
  if (!good) throw std::invalid_argument(message);
}

// A tensor without elements has the address 0, as one that is absent.
inline void check_residual(Address residual, Address z, uint32_t dropout_threshold, int64_t rows,
                           int64_t cols) {
  if (rows == 0 || cols == 0) return;
  check((residual == 0) == (z == 0), "z is written when there is a residual, and only then");
  check(residual != 0 || dropout_threshold == 0, "dropout needs a residual");
}

// Adds the functions cuda_* to a module: bertkern._C, or the emulator's.
void bind_cuda(py::module_& m);

}  // namespace bertkern
