// What Python sets on the machine; the same in each module that has one.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine/threads.h"

namespace bertkern::emulator {

inline void bind_machine(pybind11::module_& m) {
  using pybind11::literals::operator""_a;
  m.def(
      "configure",
      [](uint64_t seed, int resident_blocks, bool find_races, int capability) {
        Machine::get().configure(seed, resident_blocks, find_races, capability);
      },
      "seed"_a, "resident_blocks"_a = 2, "find_races"_a = true, "capability"_a = 80,
      "Chooses the order in which threads run and copies arrive, how many blocks run at the same "
      "time, one on each multiprocessor, and the compute capability that launches ask for.");
  m.def(
      "register_memory",
      [](uintptr_t address, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
         int element_bytes, bool initialised, const std::string& name) {
        Machine::get().regions().add(address, sizes, strides, element_bytes, initialised, name);
      },
      "address"_a, "sizes"_a, "strides"_a, "element_bytes"_a, "initialised"_a, "name"_a,
      "Makes the elements of a tensor global memory. Strides are in elements.");
  m.def(
      "name_memory",
      [](uintptr_t address, const std::string& name) {
        Machine::get().regions().rename(address, name);
      },
      "address"_a, "name"_a, "Names the tensor at an address in errors.");
  m.def("clear_memory", [] { Machine::get().regions().clear(); }, "No tensor is there any more.");
}

}  // namespace bertkern::emulator
