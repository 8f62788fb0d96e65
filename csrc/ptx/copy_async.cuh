// cp.async: copies from global to shared memory that go on while the thread computes.
#pragma once

#include "ptx/memory.cuh"

namespace bertkern::ptx {

// cp.async.cg of 16 bytes; both addresses are multiples of 16. With `valid` false nothing is read
// and the 16 bytes become 0 (`global` must still be a sound address).
BERTKERN_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// cp.async.commit_group: this thread's copies since the last commit become one group.
BERTKERN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: waits until all but this thread's newest kPending groups have arrived. Other
// threads see them after a barrier.
template <int kPending>
BERTKERN_DEVICE void copy_async_wait() {
  static_assert(kPending >= 0, "a number of groups");
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace bertkern::ptx
