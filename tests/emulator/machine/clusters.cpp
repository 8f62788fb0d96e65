// Clusters: their barrier, and accesses to the shared memory of another block.
#include <cstring>
#include <string>

#include "machine/places.h"
#include "machine/shared.h"
#include "machine/threads.h"
#include "machine/watch.h"

namespace bertkern::emulator {
namespace {

constexpr int kRankShift = 24;  // of a block's window in the cluster's shared memory

int threads_of_cluster() {
  const Grid& grid = Machine::get().grid();
  return grid.threads * grid.cluster;
}

// Another block is there from when this thread knows of something that one of its threads did.
bool knows_started(const Clock& clock, const Block& block) {
  const int threads = Machine::get().grid().threads;
  for (int t = 0; t < threads; ++t) {
    if (clock.was_told(component(block.rank * threads + t, Kind::kOwn), 1)) return true;
  }
  return false;
}

}  // namespace

uint32_t shared_address(const void* address) {
  const Block& block = *Machine::get().running().block;
  return kFirstSharedAddress +
         static_cast<uint32_t>(static_cast<const char*>(address) - block.shared);
}

int cluster_rank() { return Machine::get().running().block->rank; }
int cluster_size() { return Machine::get().grid().cluster; }

uint32_t cluster_address(const void* shared, int rank) {
  if (rank < 0 || rank >= cluster_size()) {
    fail_at("asks for shared memory of rank " + std::to_string(rank), __builtin_return_address(0),
            "the cluster has " + std::to_string(cluster_size()) + " blocks");
  }
  return static_cast<uint32_t>(rank) << kRankShift | shared_address(shared);
}

std::pair<Block*, uintptr_t> in_cluster(uint32_t address, int bytes, const char* does,
                                        const void* place) {
  Machine& machine = Machine::get();
  const Thread& thread = machine.running();
  const uint32_t rank = address >> kRankShift;
  const uintptr_t offset = (address & ((1u << kRankShift) - 1)) - kFirstSharedAddress;
  const auto shared_bytes = static_cast<uintptr_t>(machine.grid().shared_bytes);
  const auto refuse = [&](const std::string& what) {
    fail_at(std::string(does) + " in shared memory + " + std::to_string(offset) + " of rank " +
                std::to_string(rank),
            place, what);
  };
  if (rank >= static_cast<uint32_t>(machine.grid().cluster) || offset > shared_bytes ||
      offset + static_cast<uintptr_t>(bytes) > shared_bytes) {
    refuse("out of bounds");
  }
  if (offset % static_cast<uintptr_t>(bytes) != 0) {
    refuse("not aligned to " + std::to_string(bytes) + " bytes");
  }
  Block& block = thread.block->cluster->blocks[rank];
  if (block.ended == machine.grid().threads) refuse("that block has ended");
  if (&block != thread.block) {
    if (!knows_started(thread.clock, block)) {
      refuse("that block may not have started: no cluster_wait came before");
    }
    block.remote[component(thread.clock.thread, Kind::kOwn)] = thread.clock.now();
  }
  return {&block, offset};
}

void cluster_arrive() {
  Machine& machine = Machine::get();
  Thread& thread = machine.running();
  if (thread.between_arrive_and_wait) {
    fail_at("does cluster_arrive", __builtin_return_address(0),
            "it has not done cluster_wait since the last one");
  }
  thread.between_arrive_and_wait = true;
  thread.cluster_barrier = thread.block->cluster->passed;
  thread.block->cluster->known.add(thread.clock);
  ++thread.block->cluster->arrived;
  machine.pass_cluster_barrier(*thread.block->cluster);
  machine.yield();
}

void cluster_wait() {
  Machine& machine = Machine::get();
  Thread& thread = machine.running();
  Cluster& cluster = *thread.block->cluster;
  const void* place = __builtin_return_address(0);
  if (!thread.between_arrive_and_wait) {
    fail_at("does cluster_wait", place, "it has not done cluster_arrive");
  }
  const uint32_t before = thread.cluster_barrier;
  while (cluster.passed == before) {
    cluster.waiting.push_back(&thread);
    machine.wait(Wait::kCluster, place);
  }
  thread.between_arrive_and_wait = false;
  learn(thread.clock, cluster.told, cluster.learned);
}

void Machine::pass_cluster_barrier(Cluster& cluster) {
  if (cluster.arrived + cluster.ended < threads_of_cluster()) return;
  cluster.told = cluster.known.take();
  cluster.learned.clear();
  cluster.arrived = 0;
  ++cluster.passed;
  for (Thread* thread : cluster.waiting) wake(*thread);
  cluster.waiting.clear();
}

Words4 load_cluster(uint32_t address, int bytes) {
  const void* place = __builtin_return_address(0);
  const auto [block, offset] = in_cluster(address, bytes, "reads", place);
  const char* from = block->shared + offset;
  touch_cluster(*block, reinterpret_cast<uintptr_t>(from), static_cast<size_t>(bytes),
                own_act(false, place));
  Words4 value = {};
  std::memcpy(&value, from, static_cast<size_t>(bytes));
  return value;
}

void store_cluster(uint32_t address, Words4 value, int bytes) {
  const void* place = __builtin_return_address(0);
  const auto [block, offset] = in_cluster(address, bytes, "writes", place);
  char* to = block->shared + offset;
  touch_cluster(*block, reinterpret_cast<uintptr_t>(to), static_cast<size_t>(bytes),
                own_act(true, place));
  std::memcpy(to, &value, static_cast<size_t>(bytes));
}

}  // namespace bertkern::emulator
