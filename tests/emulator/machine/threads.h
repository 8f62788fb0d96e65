// What the machine knows of its threads, warps and blocks, and the order in which they run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "machine/clock.h"
#include "machine/copies.h"
#include "machine/engine.h"
#include "machine/fiber.h"
#include "machine/machine.h"
#include "machine/phases.h"
#include "machine/products.h"
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
  kStoreMatrix,
  kElectOne,
  kPhase,
  kCluster,
  kProduct,
  kCommit,
  kProductWait,
  kRegisters,
  kSpin,
  kEnded,
};
const char* name_of(Wait wait);

struct Block;
struct Cluster;
struct Warp;
struct Warpgroup;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  Warpgroup* warpgroup = nullptr;  // null in the last warps of a block that are not four
  int index = 0;                   // in the block
  int lane = 0;
  char* stack = nullptr;
  Wait wait = Wait::kNothing;
  int detail = 0;               // the named barrier's number, the parity
  const void* place = nullptr;  // where it waits
  // What it brings to, and takes from, something that its warp does together.
  Words4 words = {};
  Words2 more_words = {};
  Accumulators sum = {};
  const void* address = nullptr;
  Copies copies;
  BulkGroups bulk;
  Accumulations accumulations;
  Brought product = {};
  bool between_arrive_and_wait = false;  // of the cluster's barrier
  uint32_t cluster_barrier = 0;          // which one: how many had been passed
  uint32_t spins = 0;                    // looks at something that did not change
  const int* spin_address = nullptr;
  int spin_value = 0;
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

// Four warps, for what they do together.
struct Warpgroup {
  Thread* threads = nullptr;
  int arrived = 0;
  Wait wait = Wait::kNothing;
  int option = 0;
  const Thread* first = nullptr;  // that came
  int registers = 0;              // of each thread
  Products products;
};

struct Barrier {
  int arrived = 0, expected = 0;
  std::vector<bool> came;  // threads
  std::vector<Thread*> waiting;
  Gathering known;
};

struct Block {
  int index = -1;  // in the grid
  Cluster* cluster = nullptr;
  int rank = 0;  // in the cluster
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Barrier barriers[kNamedBarriers];
  PhaseBarriers phase_barriers;
  RemoteAccesses remote;  // of others to this block's shared memory
  int free_registers = 0;
  std::vector<Thread*> want_registers;
  char* shared = nullptr;
  std::vector<Cell> cells;  // of shared memory
  int ended = 0;            // threads
};

// Blocks that run at the same time and reach each other's shared memory; alone, a block.
struct Cluster {
  uint32_t index = 0;  // in the grid
  Block* blocks = nullptr;
  bool running = false;
  int arrived = 0, ended = 0;  // threads
  Gathering known;
  Knowledge told;  // at the barrier that was passed last
  Learned learned;
  uint32_t passed = 0;
  std::vector<Thread*> waiting;
};

// One grid at a time, on the thread that launched it.
class Machine {
 public:
  static Machine& get() { return the_machine_; }

  void run(const Grid& grid, Entry entry, void (*kernel)(), const void* arguments);
  void configure(uint64_t seed, int resident_blocks, bool find_races, int capability);
  int resident_blocks() const { return resident_; }
  int capability() const { return capability_; }

  // Of the thread that runs.
  Thread& running() { return *running_; }
  const Grid& grid() const { return grid_; }
  Regions& regions() { return regions_; }
  Pool& pool() { return pool_; }
  Engine& engine() { return engine_; }
  Random& random() { return random_; }
  Words& words() { return words_; }
  size_t components() const;  // of a cluster's clocks
  bool finds_races() const { return find_races_; }
  std::string describe(uintptr_t address) const;  // for errors: what is there

  void wait(Wait wait, const void* place, int detail = 0);  // until somebody calls wake
  void wake(Thread& thread);
  void wake(Warp& warp, uint32_t lanes);
  void yield();                                 // lets others run, now and then
  void pass_cluster_barrier(Cluster& cluster);  // if all have come
  void spin(const void* place);                 // lets others run, since the thread saw nothing new
  [[noreturn]] void fail(const std::string& what);

 private:
  static Machine the_machine_;
  static void enter();
  void set_up();
  void set_up(int block);
  void map_shared(int blocks);
  void start(Cluster& cluster);
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

  std::vector<Cluster> clusters_;  // those that are resident
  std::vector<Block> blocks_;      // theirs
  int64_t started_ = 0;            // clusters, in the order of their indices
  std::vector<Thread*> spinning_;
  std::vector<Warp*> ready_;
  Stacks stacks_;
  char* shared_ = nullptr;
  size_t shared_bytes_ = 0;  // of all of them
  Regions regions_;
  Pool pool_;
  Engine engine_;
  Words words_;
  ClusterClock nothing_;  // what a cluster's threads know of each other when it starts
  Thread* running_ = nullptr;
  Fiber scheduler_;
  bool in_thread_ = false;  // not in the scheduler
  std::string error_;
  bool failed_ = false;

  Random random_;
  uint64_t seed_ = 0, launches_ = 0;
  int resident_ = 2, capability_ = 80;
  bool find_races_ = true;
  uint32_t leave_warp_ = 0;  // a warp goes on unless 32 random bits are below it
};

// "thread 0 of block 3", "threads 0-31, 40 of block 3".
std::string name_of(const Thread& thread);
std::string name_of(const std::vector<const Thread*>& threads);

}  // namespace bertkern::emulator
