// csrc/ptx/registers.cuh on the emulator's machine.
#pragma once

#include "ptx/thread.cuh"

namespace bertkern::ptx {

template <int kRegisters>
BERTKERN_DEVICE void lower_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0,
                "setmaxnreg takes multiples of 8 from 24 to 256");
  emulator::set_registers(kRegisters, false);
}

template <int kRegisters>
BERTKERN_DEVICE void raise_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0,
                "setmaxnreg takes multiples of 8 from 24 to 256");
  emulator::set_registers(kRegisters, true);
}

}  // namespace bertkern::ptx
