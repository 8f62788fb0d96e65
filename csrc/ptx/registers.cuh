// setmaxnreg: warpgroups of one block divide its registers anew, so that those who compute get what
// those who only copy do not need. It counts from the registers of a thread at the kernel's start,
// which BERTKERN_KERNEL's launch bounds fix: as many as one block on a multiprocessor can have.
#pragma once

#include "ptx/thread.cuh"

namespace bertkern::ptx {

// setmaxnreg.dec: this thread gives registers back and keeps kRegisters, at most what it has. All
// threads of the warpgroup take part, each warpgroup once in its branch of the kernel.
template <int kRegisters>
BERTKERN_DEVICE void lower_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0,
                "setmaxnreg takes multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// setmaxnreg.inc: waits until the block has as many free, then this thread has kRegisters, at least
// what it had. All threads of the warpgroup take part.
template <int kRegisters>
BERTKERN_DEVICE void raise_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0,
                "setmaxnreg takes multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace bertkern::ptx
