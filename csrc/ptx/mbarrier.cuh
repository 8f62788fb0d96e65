// mbarrier: a barrier in shared memory whose phase ends when all arrivals that it expects have come
// and all bytes that it was told to expect have been written by asynchronous copies.
//
// Phases are counted from 0; a wait names the parity of the phase that it waits for. It returns at
// once when the phase under way has the other parity, so waiting for parity 1 of a new barrier does
// not wait. A thread may be at most one phase behind: the parity of phase n + 2 is that of n.
#pragma once

#include "ptx/cluster.cuh"

namespace bertkern::ptx {

// In shared memory; only the functions below look at the bits.
struct alignas(8) Barrier {
  uint64_t bits;
};

// mbarrier.init: phase 0 begins, each phase expects `arrivals`, 1 to 2^20 - 1. By one thread;
// others touch the barrier after a barrier_init_fence of that thread and a block or cluster
// barrier.
BERTKERN_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// fence.mbarrier_init.release.cluster: orders this thread's barrier_init before what follows. With
// a block barrier after it the block and its asynchronous copies may use the barriers, with a
// cluster barrier the whole cluster.
BERTKERN_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.inval: the eight bytes may be used for something else. No thread waits on the barrier,
// no copy counts on it, any more.
BERTKERN_DEVICE void barrier_invalidate(Barrier* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// mbarrier.arrive.release.cta: one arrival. What this thread did before is seen by those of the
// block who wait for the phase.
BERTKERN_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// mbarrier.arrive.release.cluster: one arrival at a barrier of any block of the cluster. What this
// thread did before is seen by those who barrier_wait_cluster for the phase. It waits for all
// stores of this thread (MEMBAR.ALL.GPU).
BERTKERN_DEVICE void barrier_arrive_cluster(ClusterAddress barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier.bits)
               : "memory");
}

// mbarrier.expect_tx.relaxed.cta: this phase ends only after `bytes` more, 0 to 2^20 - 1, have been
// written. Orders nothing.
BERTKERN_DEVICE void barrier_expect_bytes(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// mbarrier.arrive.expect_tx.release.cta: barrier_expect_bytes, then barrier_arrive, as one step:
// the phase cannot end between them.
BERTKERN_DEVICE void barrier_arrive_expect_bytes(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity.acquire.cta: whether the phase of this parity (0 or 1) is over; it may
// wait a little for that. Once it is, this thread sees what was done by the threads of this block
// before they arrived, and all bytes that asynchronous copies of this block wrote.
BERTKERN_DEVICE bool barrier_try_wait(Barrier* barrier, int parity) {
  uint32_t over;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; "
      "selp.u32 %0, 1, 0, p; }"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over != 0;
}

// How long the thread may sleep at a time while it waits, in nanoseconds; it wakes when the phase
// ends. Long, since nothing else is to be done.
constexpr uint32_t kWaitNanoseconds = 10'000'000;

// Waits until barrier_try_wait would be true.
BERTKERN_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{ .reg .pred p; again: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1, "
      "%2; "
      "@!p bra again; }" ::"r"(shared_address(barrier)),
      "r"(parity), "n"(kWaitNanoseconds)
      : "memory");
}

// barrier_wait with .acquire.cluster: this thread also sees what threads of other blocks did before
// their barrier_arrive_cluster. It empties the first-level cache, so it is for those alone.
BERTKERN_DEVICE void barrier_wait_cluster(Barrier* barrier, int parity) {
  asm volatile(
      "{ .reg .pred p; again: "
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1, %2; "
      "@!p bra again; }" ::"r"(shared_address(barrier)),
      "r"(parity), "n"(kWaitNanoseconds)
      : "memory");
}

}  // namespace bertkern::ptx
