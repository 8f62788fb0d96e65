// csrc/ptx/cluster.cuh on the emulator's machine.
#pragma once

#include <cstring>
#include <type_traits>

#include "ptx/memory.cuh"

namespace bertkern::ptx {

BERTKERN_DEVICE int cluster_rank() { return emulator::cluster_rank(); }
BERTKERN_DEVICE int cluster_size() { return emulator::cluster_size(); }

BERTKERN_DEVICE void cluster_arrive() { emulator::cluster_arrive(); }
BERTKERN_DEVICE void cluster_wait() { emulator::cluster_wait(); }

struct ClusterAddress {
  uint32_t bits;
};

BERTKERN_DEVICE ClusterAddress cluster_address(const void* shared, int rank) {
  return {emulator::cluster_address(shared, rank)};
}

template <typename T>
BERTKERN_DEVICE T load_cluster(ClusterAddress address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 16, "b16, b32 or v4.b32");
  static_assert(std::is_trivially_copyable_v<T>, "it is moved as bits");
  const Words4 words = emulator::load_cluster(address.bits, sizeof(T));
  T value;
  __builtin_memcpy(&value, &words, sizeof(value));
  return value;
}

template <typename T>
BERTKERN_DEVICE void store_cluster(ClusterAddress address, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 16, "b16, b32 or v4.b32");
  static_assert(std::is_trivially_copyable_v<T>, "it is moved as bits");
  Words4 words = {};
  __builtin_memcpy(&words, &value, sizeof(value));
  emulator::store_cluster(address.bits, words, sizeof(T));
}

}  // namespace bertkern::ptx
