// What is known of memory, in cells of 16 bytes: which bytes are there, which have been written,
// and the accesses that a later one could race with.
//
// Two accesses race when they touch a common byte, one of them writes, not both are atomic, and
// neither is before the other. What is before an access depends on who makes it: see the orders
// below. An access is forgotten when a later write comes behind it and covers its bytes: whatever
// races with the first then races with the second, too, or is told apart from both by the fence
// that the second needed. A read is also forgotten for a later one of the same thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "machine/clock.h"

namespace bertkern::emulator {

constexpr int kCellBytes = 16;
constexpr uint32_t kWholeCell = 0xFFFF;

struct Access {
  uint32_t cluster;     // of the grid
  uint32_t time;        // of the component
  uint16_t component;   // of the cluster's clocks
  uint16_t mask;        // bytes of the cell
  uint32_t place : 31;  // see place_of
  uint32_t atomic : 1;
};

// What is before a thread's own loads and stores.
struct ThreadOrder {
  const Clock& clock;
  uint32_t cluster;

  bool has_before(const Access& earlier) const {
    if (earlier.cluster == cluster) return clock.knows(earlier.component, earlier.time);
    return beyond(earlier, earlier.component);
  }
  bool beyond(const Access& earlier, int component) const {
    if (clock.beyond == nullptr) return false;
    const auto found = clock.beyond->find(earlier.cluster);
    return found != clock.beyond->end() &&
           earlier.time <= (*found->second)[static_cast<size_t>(component)];
  }
};

// What is before an asynchronous access that a thread starts.
struct EngineOrder {
  ThreadOrder starts;
  int rank, threads;  // of the block whose shared memory it is, -1: global memory; of a block

  bool has_before(const Access& earlier) const {
    // fence_async_shared is for the shared memory of the fencing thread's own block.
    const bool own_block = rank >= 0 && earlier.component / kKinds / threads == rank;
    const int seen = seen_by_engine(earlier.component, !own_block, starts.clock.threads);
    if (earlier.cluster == starts.cluster) return starts.clock.knows(seen, earlier.time);
    return starts.beyond(earlier, seen);
  }
};

// What is before the asynchronous access of a warpgroup: what each of its threads was told.
struct ProductOrder {
  const std::vector<const Clock*>& clocks;  // of its threads, one for all that know the same
  uint32_t cluster;

  bool has_before(const Access& earlier) const {
    if (earlier.cluster != cluster) return false;  // shared memory is of one cluster
    const int seen = seen_by_engine(earlier.component, false, clocks[0]->threads);
    for (const Clock* clock : clocks) {
      if (!clock->was_told(seen, earlier.time)) return false;
    }
    return true;
  }
};

struct Accesses {
  Access* first = nullptr;
  uint32_t count = 0, room = 0;
};

struct Cell {
  Accesses writes, reads;
  uint16_t valid = 0, written = 0;  // masks of bytes
  uint16_t barrier = 0;             // that are an mbarrier: not for plain accesses
};

// Memory of Accesses: handed out piece by piece, taken back all at once between grids.
class Pool {
 public:
  Access* take(uint32_t count);
  void reset();

 private:
  static constexpr size_t kChunk = 1 << 14;
  std::vector<std::unique_ptr<Access[]>> chunks_;
  std::vector<std::unique_ptr<Access[]>> large_;
  size_t next_ = 0, used_ = kChunk;  // chunks in use, entries of the last one
};

struct Race {
  Access earlier;
  bool wrote;
};

// Remembers an access; returns what it races with, if at all.
template <typename Order>
std::optional<Race> touch(Cell& cell, const Access& access, bool write, const Order& order,
                          Pool& pool);

}  // namespace bertkern::emulator
