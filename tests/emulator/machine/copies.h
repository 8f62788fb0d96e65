// Copies of a thread that are on their way to shared memory (cp.async).
#pragma once

#include <cstdint>
#include <vector>

#include "machine/machine.h"
#include "machine/random.h"

namespace bertkern::emulator {

struct Copy {
  char* to;
  Words4 value;    // what was there when the copy started
  uint32_t group;  // the commit that it belongs to, counted from 1
  uint32_t place;
};

// The value of a copy arrives at some moment between its start and the wait that covers its group.
class Copies {
 public:
  void start(char* to, const Words4& value, uint32_t place) {
    under_way_.push_back({to, value, group(), place});
  }
  void commit() { ++committed_; }
  uint32_t wait(int pending_groups);  // lands all but the newest groups; how many are waited for
  void land_some(Random& random);     // each with a chance of one half
  uint32_t group() const { return committed_ + 1; }  // of a copy that starts now
  // One that no wait has covered, or null.
  const Copy* first() const { return under_way_.empty() ? nullptr : &under_way_.front(); }
  void clear();

 private:
  std::vector<Copy> under_way_;  // until a wait
  uint32_t committed_ = 0, waited_ = 0;
};

}  // namespace bertkern::emulator
