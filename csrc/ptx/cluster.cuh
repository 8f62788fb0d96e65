// Clusters: blocks that run at the same time and reach each other's shared memory.
//
// A block's shared memory is sound from when the block has started until it exits: a cluster_arrive
// and cluster_wait of all threads stand before the first access from outside and after the last.
#pragma once

#include <cstring>
#include <type_traits>

#include "ptx/memory.cuh"

namespace bertkern::ptx {

// %cluster_ctarank and %cluster_nctarank: which block of its cluster this is, and of how many;
// 0 and 1 where the launch asks for no clusters.
BERTKERN_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
BERTKERN_DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// barrier.cluster.arrive.release and barrier.cluster.wait.acquire: no thread of the cluster is past
// the wait before all have arrived; what a thread did before it arrived, to global memory and to
// shared memory of any block, is then seen by all. Each thread that has not exited does both, in
// turn.
BERTKERN_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
BERTKERN_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// An address in the shared memory of some block of the cluster.
struct ClusterAddress {
  uint32_t bits;
};

// mapa: where block `rank` has what this block has at `shared`. 0 <= rank < cluster_size().
BERTKERN_DEVICE ClusterAddress cluster_address(const void* shared, int rank) {
  ClusterAddress address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address.bits)
      : "r"(shared_address(shared)), "r"(rank));
  return address;
}

// ld.shared::cluster of 2, 4 or 16 bytes; the address is a multiple of the size. Weak: it sees what
// another block wrote only after a cluster_wait or a barrier_wait_cluster that came after it.
template <typename T>
BERTKERN_DEVICE T load_cluster(ClusterAddress address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 16, "b16, b32 or v4.b32");
  static_assert(std::is_trivially_copyable_v<T>, "it is moved as bits");
  T value;
  if constexpr (sizeof(T) == 2) {
    uint16_t word;
    asm volatile("ld.shared::cluster.b16 %0, [%1];" : "=h"(word) : "r"(address.bits) : "memory");
    memcpy(&value, &word, sizeof(value));
  } else if constexpr (sizeof(T) == 4) {
    uint32_t word;
    asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(word) : "r"(address.bits) : "memory");
    memcpy(&value, &word, sizeof(value));
  } else {
    uint32_t word[4];
    asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(address.bits)
                 : "memory");
    memcpy(&value, word, sizeof(value));
  }
  return value;
}

// st.shared::cluster of 2, 4 or 16 bytes; the address is a multiple of the size. Weak: the other
// block sees it after a cluster_arrive or a barrier_arrive_cluster of this thread. Both wait for
// all its stores (MEMBAR.ALL.GPU): more than a few words are better moved by bulk_copy_cluster.
template <typename T>
BERTKERN_DEVICE void store_cluster(ClusterAddress address, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 16, "b16, b32 or v4.b32");
  static_assert(std::is_trivially_copyable_v<T>, "it is moved as bits");
  if constexpr (sizeof(T) == 2) {
    uint16_t word;
    memcpy(&word, &value, sizeof(value));
    asm volatile("st.shared::cluster.b16 [%0], %1;" ::"r"(address.bits), "h"(word) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t word;
    memcpy(&word, &value, sizeof(value));
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address.bits), "r"(word) : "memory");
  } else {
    uint32_t word[4];
    memcpy(word, &value, sizeof(value));
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address.bits),
                 "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
  }
}

}  // namespace bertkern::ptx
