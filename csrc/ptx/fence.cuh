// Fences between the generic proxy (what threads load and store) and the asynchronous proxy (what
// the copy engine, bulk copies and wgmma load and store). A barrier alone does not order the two.
// The other way round needs none: the wait for a copy or a product brings its results to the
// generic proxy.
#pragma once

#include "ptx/thread.cuh"

namespace bertkern::ptx {

// fence.proxy.async.shared::cta: this thread's loads and stores of its block's shared memory before
// it come before asynchronous accesses after it, and, with a barrier after the fence, before those
// that other threads start after the barrier. For tiles that threads write and wgmma or a copy
// reads.
BERTKERN_DEVICE void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// fence.proxy.async: the same for all memory: global, and the shared memory of the cluster.
BERTKERN_DEVICE void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

}  // namespace bertkern::ptx
