// What the machine knows of its threads, warps and blocks, and the order in which they run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "machine/clock.h"
#include "machine/copies.h"
#include "machine/fiber.h"
#include "machine/machine.h"
#include "machine/random.h"
#include "machine/regions.h"
#include "machine/shadow.h"

namespace bertkern::emulator {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kNamedBarriers = 16;

// What a thread waits for.
enum class Wait : uint8_t {
  kNothing,
  kBlockBarrier,
  kNamedBarrier,
  kWarpBarrier,
  kShuffleXor,
  kShuffleIndex,
  kVoteAny,
  kLoadMatrix,
  kMma,
  kEnded,
};
const char* name_of(Wait wait);

struct Block;
struct Warp;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;  // in the block
  int lane = 0;
  char* stack = nullptr;
  Wait wait = Wait::kNothing;
  int detail = 0;               // the named barrier's number
  const void* place = nullptr;  // where it waits
  // What it brings to, and takes from, something that its warp does together.
  Words4 words = {};
  Words2 more_words = {};
  Accumulators sum = {};
  const void* address = nullptr;
  Copies copies;
  Clock clock;
};

struct Warp {
  Block* block = nullptr;
  Thread* lanes = nullptr;
  uint32_t ready = 0;    // lanes that can run
  uint32_t arrived = 0;  // lanes at `wait`
  Wait wait = Wait::kNothing;
  int option = 0;     // what else must be the same in all lanes
  int position = -1;  // among the machine's warps that can run
};

struct Barrier {
  int arrived = 0, expected = 0;
  std::vector<bool> came;  // threads
  std::vector<Thread*> waiting;
  Gathering known;
};

struct Block {
  int index = -1;  // in the grid
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kNamedBarriers];
  char* shared = nullptr;
  std::vector<Cell> cells;  // of shared memory
  int ended = 0;            // threads
  bool running = false;
};

// One grid at a time, on the thread that launched it.
class Machine {
 public:
  static Machine& get() { return the_machine_; }

  void run(const Grid& grid, Entry entry, void (*kernel)(), const void* arguments);
  void configure(uint64_t seed, int resident_blocks, bool find_races);

  // Of the thread that runs.
  Thread& running() { return *running_; }
  const Grid& grid() const { return grid_; }
  Regions& regions() { return regions_; }
  Pool& pool() { return pool_; }
  bool finds_races() const { return find_races_; }
  std::string describe(uintptr_t address) const;  // for errors: what is there

  void wait(Wait wait, const void* place, int detail = 0);  // until somebody calls wake
  void wake(Thread& thread);
  void wake(Warp& warp, uint32_t lanes);
  void yield();  // lets others run, now and then
  [[noreturn]] void fail(const std::string& what);

 private:
  static Machine the_machine_;
  static void enter();
  void set_up();
  void map_shared(int blocks);
  void start(Block& block);
  void loop();
  void pause();
  void go_on(Fiber& from);
  Thread* pick();
  [[noreturn]] void end_thread();
  void make_ready(Warp& warp, uint32_t lanes);
  std::string stuck() const;

  Grid grid_ = {};
  Entry entry_ = nullptr;
  void (*kernel_)() = nullptr;
  const void* arguments_ = nullptr;

  std::vector<Block> blocks_;  // those that are resident
  std::vector<int> order_;     // in which the grid's blocks start, the last first
  std::vector<Warp*> ready_;
  Stacks stacks_;
  char* shared_ = nullptr;
  size_t shared_bytes_ = 0;  // of all of them
  Regions regions_;
  Pool pool_;
  BlockClock nothing_;  // what a block's threads know of each other when it starts
  Thread* running_ = nullptr;
  Fiber scheduler_;
  std::string error_;
  bool failed_ = false;

  Random random_;
  uint64_t seed_ = 0, launches_ = 0;
  int resident_ = 2;
  bool find_races_ = true;
  uint32_t leave_warp_ = 0;  // a warp goes on unless 32 random bits are below it
};

// "thread 0 of block 3", "threads 0-31, 40 of block 3".
std::string name_of(const Thread& thread);
std::string name_of(const std::vector<const Thread*>& threads);

}  // namespace bertkern::emulator
