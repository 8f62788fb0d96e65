// What a thread knows to have happened: vector clocks (Fidge 1988, Mattern 1989) in the form that
// barriers make cheap.
//
// A thread has one component for each kind of its accesses: its own loads and stores, which are in
// order, and its copies, which are in order only behind a wait. The components of all threads of
// the block are one vector, shared by those that left the same barrier; barriers of a warp add one
// for the warp alone. Between blocks nothing is ordered: no function of the machine does that.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "machine/machine.h"

namespace bertkern::emulator {

enum class Kind : int { kOwn, kCopy };
constexpr int kKinds = 2;
constexpr int kWarpComponents = kWarpThreads * kKinds;

// Components of a thread are neighbours, so that those of a warp are, too.
constexpr int component(int thread, Kind kind) { return thread * kKinds + static_cast<int>(kind); }

using BlockClock = std::shared_ptr<const std::vector<uint32_t>>;
using WarpClock = std::shared_ptr<const std::array<uint32_t, kWarpComponents>>;

struct Clock {
  int thread = 0;       // whose it is
  uint32_t now = 1;     // counts what others can be told of at a barrier
  uint32_t copied = 0;  // groups of copies that a wait has covered
  BlockClock block;
  WarpClock warp;  // null: nothing newer than `block`

  void start(int thread_index, const BlockClock& nothing) {
    thread = thread_index;
    now = 1;
    copied = 0;
    block = nothing;
    warp.reset();
  }

  // Whether what a thread of the block did at `time` of one of its components is before now.
  bool knows(int of, uint32_t time) const {
    if (of / kKinds == thread) return of % kKinds == 0 || time <= copied;
    if (time <= (*block)[of]) return true;
    return warp != nullptr && of / kWarpComponents == thread / kWarpThreads &&
           time <= (*warp)[of % kWarpComponents];
  }
};

// What those who come to a barrier know together.
class Gathering {
 public:
  void start(int threads);
  void add(Clock& clock);  // and what the thread does from now on is later
  BlockClock take();

 private:
  std::vector<uint32_t> components_;
  BlockClock last_block_;
  WarpClock last_warp_;
};

// The lanes of a warp tell each other all they know.
void join_warp(const std::array<Clock*, kWarpThreads>& clocks);

}  // namespace bertkern::emulator
