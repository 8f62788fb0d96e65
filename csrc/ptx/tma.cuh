// The copy engine (TMA): boxes of a tensor between global and shared memory, by one thread.
// Elements outside the tensor are read as zeros and not written.
//
// Loads count the bytes of the whole box, zeros included, on an mbarrier. Stores are waited for in
// groups, as cp.async. Both work in the asynchronous proxy (see ptx/fence.cuh).
#pragma once

#include "common/tensor_map.h"
#include "ptx/mbarrier.cuh"

// Declares a kernel's only argument, so that tensor maps in it keep the address of the launch.
#define BERTKERN_GRID_CONSTANT const __grid_constant__

namespace bertkern::ptx {

// How the second-level cache is to treat what is loaded.
struct CachePolicy {
  uint64_t bits;
};

// createpolicy.fractional: normal; leaves first (read once); leaves last (read again by others).
BERTKERN_DEVICE CachePolicy cache_normally() {
  CachePolicy policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy.bits));
  return policy;
}
BERTKERN_DEVICE CachePolicy cache_briefly() {
  CachePolicy policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy.bits));
  return policy;
}
BERTKERN_DEVICE CachePolicy cache_long() {
  CachePolicy policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy.bits));
  return policy;
}

// elect.sync: true in one lane of the warp. All 32 lanes take part. Copies are started under it and
// not under `lane == 0`, since the compiler knows then that one thread is left: else it makes a
// loop over the active lanes of each copy.
BERTKERN_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
               : "=r"(elected));
  return elected != 0;
}

// prefetch.tensormap: has the copy engine read the map before the first copy needs it.
BERTKERN_DEVICE void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// cp.async.bulk.tensor from global to shared memory of the box that starts at the coordinates `at`,
// the innermost dimension first; they may be negative or past the end. `shared` is a multiple of
// 128, and of what the swizzle asks for. The phase of `barrier` under way gets the bytes; whoever
// waits for it sees them.
template <int kRank>
BERTKERN_DEVICE void tma_load(void* shared, const TensorMap& map, const int (&at)[kRank],
                              Barrier* barrier, CachePolicy policy) {
  static_assert(kRank >= 2 && kRank <= 5, "a row alone is copied by bulk_load");
  const uint32_t target = shared_address(shared), signal = shared_address(barrier);
  if constexpr (kRank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(target),
        "l"(&map), "r"(signal), "l"(policy.bits), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(target),
        "l"(&map), "r"(signal), "l"(policy.bits), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(target),
        "l"(&map), "r"(signal), "l"(policy.bits), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(target),
        "l"(&map), "r"(signal), "l"(policy.bits), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
        "r"(at[4])
        : "memory");
  }
}

// cp.async.bulk.tensor from shared to global memory, of this thread's current group. What threads
// have written to the tile comes first when each of them has done fence_async_shared and a barrier
// stands between.
template <int kRank>
BERTKERN_DEVICE void tma_store(const TensorMap& map, const int (&at)[kRank], const void* shared) {
  static_assert(kRank >= 2 && kRank <= 5, "boxes have 2 to 5 dimensions");
  const uint32_t source = shared_address(shared);
  if constexpr (kRank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
        "r"(source), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
            &map),
        "r"(source), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            &map),
        "r"(source), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], "
        "[%1];" ::"l"(&map),
        "r"(source), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
  }
}

// cp.async.bulk from global to shared memory of `bytes`, a multiple of 16 as both addresses are;
// counted on the barrier as tma_load does.
BERTKERN_DEVICE void bulk_load(void* shared, const void* global, int bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// cp.async.bulk from this block's shared memory to that of any block of the cluster, of `bytes`, a
// multiple of 16 as both addresses are; counted on a barrier of the target's block, whose waiters
// see them after a barrier_wait. What threads have written to the source comes first when each of
// them has done fence_async_shared and a barrier stands between.
BERTKERN_DEVICE void bulk_copy_cluster(ClusterAddress target, const void* shared, int bytes,
                                       ClusterAddress barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(target.bits),
      "r"(shared_address(shared)), "r"(bytes), "r"(barrier.bits)
      : "memory");
}

// cp.async.bulk.commit_group: this thread's tma_stores since the last commit become one group.
BERTKERN_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// cp.async.bulk.wait_group: waits until all but this thread's newest kPending groups are done; this
// thread then sees what they wrote, and hands it on by a release.
template <int kPending>
BERTKERN_DEVICE void bulk_wait() {
  static_assert(kPending >= 0, "a number of groups");
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// cp.async.bulk.wait_group.read: waits until they have read their tiles, which may then be
// overwritten; what they write may still be on its way.
template <int kPending>
BERTKERN_DEVICE void bulk_wait_read() {
  static_assert(kPending >= 0, "a number of groups");
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace bertkern::ptx
