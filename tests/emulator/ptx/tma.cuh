// csrc/ptx/tma.cuh on the emulator's machine.
#pragma once

#include "common/tensor_map.h"
#include "ptx/mbarrier.cuh"

#define BERTKERN_GRID_CONSTANT const

namespace bertkern::ptx {

struct CachePolicy {
  uint64_t bits;
};
BERTKERN_DEVICE CachePolicy cache_normally() { return {0}; }
BERTKERN_DEVICE CachePolicy cache_briefly() { return {1}; }
BERTKERN_DEVICE CachePolicy cache_long() { return {2}; }

BERTKERN_DEVICE bool elect_one() { return emulator::elect_one(); }

BERTKERN_DEVICE void tma_prefetch(const TensorMap& map) { emulator::check_tensor_map(&map); }

template <int kRank>
BERTKERN_DEVICE emulator::BoxPosition box_position(const int (&at)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 5, "boxes have 2 to 5 dimensions");
  emulator::BoxPosition position = {};
  for (int i = 0; i < kRank; ++i) position.at[i] = at[i];
  return position;
}

template <int kRank>
BERTKERN_DEVICE void tma_load(void* shared, const TensorMap& map, const int (&at)[kRank],
                              Barrier* barrier, CachePolicy) {
  emulator::box_load(shared, &map, kRank, box_position(at), barrier);
}

template <int kRank>
BERTKERN_DEVICE void tma_store(const TensorMap& map, const int (&at)[kRank], const void* shared) {
  emulator::box_store(&map, kRank, box_position(at), shared);
}

BERTKERN_DEVICE void bulk_load(void* shared, const void* global, int bytes, Barrier* barrier) {
  emulator::bulk_load(shared, global, bytes, barrier);
}
BERTKERN_DEVICE void bulk_copy_cluster(ClusterAddress target, const void* shared, int bytes,
                                       ClusterAddress barrier) {
  emulator::bulk_copy_cluster(target.bits, shared, bytes, barrier.bits);
}

BERTKERN_DEVICE void bulk_commit() { emulator::bulk_commit(); }

template <int kPending>
BERTKERN_DEVICE void bulk_wait() {
  static_assert(kPending >= 0, "a number of groups");
  emulator::bulk_wait(kPending, false);
}
template <int kPending>
BERTKERN_DEVICE void bulk_wait_read() {
  static_assert(kPending >= 0, "a number of groups");
  emulator::bulk_wait(kPending, true);
}

}  // namespace bertkern::ptx
