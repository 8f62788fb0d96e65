// Barriers of phases in shared memory (mbarrier), and what a block has of them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "machine/clock.h"

namespace bertkern::emulator {

struct Thread;

struct PhaseBarrier {
  int component = 0;  // of the cluster's clocks; its times are phases + 1
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;  // expected less written
  uint32_t phase = 0;
  int copies_under_way = 0;
  uint32_t last_copy = 0, last_seen = 0;  // phases + 1: that had copies, that somebody waited for
  uint32_t copy_place = 0;
  // Who made it.
  int initialiser = 0;  // thread of the cluster
  uint32_t initialised_at = 0;
  uint32_t place = 0;
  bool fenced = false;
  // What those who arrived knew: threads of the block, and of the cluster.
  Gathering arrivals, cluster_arrivals;
  Knowledge told, cluster_told;  // when the last phase ended
  Learned learned, cluster_learned;
  std::vector<Thread*> waiting;
  std::vector<Thread*> woken;  // that have not looked yet
};

// By their offsets in shared memory.
struct PhaseBarriers {
  std::map<uintptr_t, PhaseBarrier> by_offset;
  int made = 0;  // in all; each takes a component
};

// What threads of other blocks did to a block's shared memory: the last time of each component.
using RemoteAccesses = std::map<int, uint32_t>;

// Bytes of an asynchronous copy have been written.
void count_bytes(PhaseBarrier& barrier, int bytes);

// A block's threads have all ended: of its barriers and its shared memory nothing is left to do.
// Fails otherwise. `thread` was the last one.
void check_end_of_block(Thread& thread);

}  // namespace bertkern::emulator
