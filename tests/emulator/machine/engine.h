// What the copy engine has to do: boxes and rows on their way between global and shared memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "machine/clock.h"
#include "machine/random.h"

namespace bertkern::emulator {

struct Thread;
struct PhaseBarrier;

// Up to 16 bytes.
struct Piece {
  char* to;
  const char* from;
  int bytes;
  Words4 value;  // once it has been read
};

struct Transfer {
  std::vector<Piece> pieces;
  const Thread* thread;
  uint32_t place;
  // Loads count bytes, the whole box's, on a barrier; stores belong to a group.
  PhaseBarrier* barrier;
  int bytes;
  uint32_t group;
  bool read;  // all pieces
};

// A thread's groups of stores.
struct BulkGroups {
  uint32_t committed = 0, last = 0;  // last: the group of the newest store
  uint32_t place = 0;                // of the newest store
  void clear() { *this = {}; }
};

class Engine {
 public:
  void start(Transfer transfer) {
    under_way_.push_back(std::make_unique<Transfer>(std::move(transfer)));
  }
  bool idle() const { return under_way_.empty(); }
  void step(Random& random);  // does a part of something
  void finish_one(Random& random);
  // Finishes the stores of a thread up to a group, or only reads what they store.
  void finish(const Thread& thread, uint32_t group, bool reads_only);
  void clear() { under_way_.clear(); }

 private:
  void finish(size_t index);
  std::vector<std::unique_ptr<Transfer>> under_way_;
};

// What releases have told through words of global memory.
using Words = std::map<const int*, Beyond>;

}  // namespace bertkern::emulator
