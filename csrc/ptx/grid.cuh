// What the blocks of a grid share: counters in global memory, by which they hand out work and take
// turns; and the order of a grid after the one before it.
//
// Release and acquire carry what the whole block did: writes of its threads before a block barrier
// are seen, when one thread then releases, by every thread of the block whose one thread acquired,
// after a block barrier there.
#pragma once

#include "ptx/thread.cuh"

namespace bertkern::ptx {

// atom.add.relaxed.gpu: adds and gives what was there. One step, but orders nothing else: for
// handing out work.
BERTKERN_DEVICE int atomic_add(int* address, int value) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(address)), "r"(value)
               : "memory");
  return before;
}

// atom.add.acq_rel.gpu: what this thread did before is seen by whoever reads the sum by an acquire;
// and this thread sees what those did who released before it.
BERTKERN_DEVICE int atomic_add_acq_rel(int* address, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(address)), "r"(value)
               : "memory");
  return before;
}

// ld.acquire.gpu: when it reads what a release wrote, this thread sees what was done before that.
BERTKERN_DEVICE int load_acquire(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
}

// ld.relaxed.gpu: what some thread of the device stored last; orders nothing.
BERTKERN_DEVICE int load_relaxed(const int* address) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
}

// Waits until the value is there and loads it with acquire. Only then: each acquire empties the
// multiprocessor's first-level cache. Nobody may change the value before this thread goes on, and
// the block that stores it must be sure to run: one of a smaller index, or of a grid that is
// resident as a whole.
BERTKERN_DEVICE void wait_until_equal(const int* address, int value) {
  do {
    while (load_relaxed(address) != value) {
    }
  } while (load_acquire(address) != value);
}

// st.release.gpu: what this thread did before is seen by whoever reads the value by an acquire.
BERTKERN_DEVICE void store_release(int* address, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)),
               "r"(value)
               : "memory");
}

// griddepcontrol.launch_dependents: once every block has done this or exited, the grid that was
// launched to overlap with this one may start. It says nothing of memory.
BERTKERN_DEVICE void grid_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// griddepcontrol.wait: until the grids before this one are over and all that they wrote is seen; at
// once where the launch did not ask for overlap.
BERTKERN_DEVICE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace bertkern::ptx
