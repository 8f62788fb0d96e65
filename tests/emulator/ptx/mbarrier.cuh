// csrc/ptx/mbarrier.cuh on the emulator's machine.
#pragma once

#include "ptx/cluster.cuh"

namespace bertkern::ptx {

struct alignas(8) Barrier {
  uint64_t bits;
};

BERTKERN_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  emulator::phase_barrier_init(barrier, arrivals);
}
BERTKERN_DEVICE void barrier_init_fence() { emulator::phase_barrier_init_fence(); }
BERTKERN_DEVICE void barrier_invalidate(Barrier* barrier) {
  emulator::phase_barrier_invalidate(barrier);
}

BERTKERN_DEVICE void barrier_arrive(Barrier* barrier) {
  emulator::phase_barrier_arrive(barrier, 0, true);
}
BERTKERN_DEVICE void barrier_arrive_cluster(ClusterAddress barrier) {
  emulator::phase_barrier_arrive_cluster(barrier.bits);
}
BERTKERN_DEVICE void barrier_expect_bytes(Barrier* barrier, int bytes) {
  emulator::phase_barrier_arrive(barrier, bytes, false);
}
BERTKERN_DEVICE void barrier_arrive_expect_bytes(Barrier* barrier, int bytes) {
  emulator::phase_barrier_arrive(barrier, bytes, true);
}

BERTKERN_DEVICE bool barrier_try_wait(Barrier* barrier, int parity) {
  return emulator::phase_barrier_try_wait(barrier, parity);
}
BERTKERN_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  emulator::phase_barrier_wait(barrier, parity, false);
}
BERTKERN_DEVICE void barrier_wait_cluster(Barrier* barrier, int parity) {
  emulator::phase_barrier_wait(barrier, parity, true);
}

}  // namespace bertkern::ptx
