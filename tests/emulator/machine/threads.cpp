#include "machine/threads.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "machine/places.h"
#include "machine/watch.h"

namespace bertkern::emulator {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxBlocks = 0x7FFFFFFF;
constexpr int kMaxSharedBytes = 227 * 1024;  // of compute capability 9.0
constexpr size_t kSharedStride = 256 * 1024;
constexpr int kMaxCluster = 16;
constexpr int kMaxComponents = 1 << 16;  // as an Access names them
constexpr int kRegisters = 65536;        // of a multiprocessor
constexpr uint32_t kMaxSpins = 100000;

// As many as the launch bounds leave each thread when a block has a multiprocessor for itself.
int registers_of_thread(int threads) { return std::min(255, kRegisters / threads) / 8 * 8; }

std::mutex one_grid;

struct Failed {};  // outside the threads

}  // namespace

Machine Machine::the_machine_;

void Machine::configure(uint64_t seed, int resident_blocks, bool find_races, int capability) {
  if (resident_blocks < 1) throw std::invalid_argument("resident_blocks must be at least 1");
  const std::lock_guard<std::mutex> lock(one_grid);
  seed_ = seed;
  launches_ = 0;
  resident_ = resident_blocks;
  find_races_ = find_races;
  capability_ = capability;
}

void run_grid(const Grid& grid, Entry entry, void (*kernel)(), const void* arguments) {
  Machine::get().run(grid, entry, kernel, arguments);
}

void Machine::run(const Grid& grid, Entry entry, void (*kernel)(), const void* arguments) {
  const std::string name = grid.name;
  if (grid.blocks < 1 || grid.blocks > kMaxBlocks) {
    throw std::invalid_argument(name + ": a grid of " + std::to_string(grid.blocks) + " blocks");
  }
  if (grid.threads < 1 || grid.threads > kMaxThreads || grid.threads % kWarpThreads != 0) {
    throw std::invalid_argument(name + ": blocks of " + std::to_string(grid.threads) +
                                " threads; the machine takes whole warps up to 1024 threads");
  }
  if (grid.shared_bytes < 0 || grid.shared_bytes > kMaxSharedBytes) {
    throw std::invalid_argument(name + ": " + std::to_string(grid.shared_bytes) +
                                " bytes of shared memory; at most " +
                                std::to_string(kMaxSharedBytes));
  }
  if (grid.cluster < 1 || grid.cluster > kMaxCluster || grid.blocks % grid.cluster != 0) {
    throw std::invalid_argument(name + ": " + std::to_string(grid.blocks) +
                                " blocks in clusters of " + std::to_string(grid.cluster) +
                                "; clusters have 1 to 16 blocks and are whole");
  }
  const std::lock_guard<std::mutex> lock(one_grid);
  grid_ = grid;
  if (components() > kMaxComponents) {
    throw std::invalid_argument(name + ": clusters of " +
                                std::to_string(grid.cluster * grid.threads) +
                                " threads; the machine takes fewer");
  }
  entry_ = entry;
  kernel_ = kernel;
  arguments_ = arguments;
  set_up();
  loop();
  if (failed_) throw std::runtime_error(name + ": " + error_);
}

void Machine::set_up() {
  random_ = Random(seed_ * 0x9E3779B97F4A7C15u + ++launches_);
  // From a warp that leaves at every second chance to one that runs until it must wait.
  leave_warp_ = kAllLanes >> (1 + random_.below(12));
  failed_ = false;
  running_ = nullptr;
  const int64_t in_grid = grid_.blocks / grid_.cluster;
  const int clusters =
      static_cast<int>(std::min<int64_t>(std::max(1, resident_ / grid_.cluster), in_grid));
  const int blocks = clusters * grid_.cluster;
  stacks_.reserve(blocks * grid_.threads);
  map_shared(blocks);
  clusters_.assign(static_cast<size_t>(clusters), Cluster{});
  blocks_.resize(static_cast<size_t>(blocks));
  started_ = 0;
  pool_.reset();
  engine_.clear();
  words_.clear();
  spinning_.clear();
  regions_.start_grid();
  nothing_ = std::make_shared<const Vector>(components(), 0);
  ready_.clear();
  for (int c = 0; c < clusters; ++c) clusters_[c].blocks = &blocks_[c * grid_.cluster];
  for (int b = 0; b < blocks; ++b) set_up(b);
}

size_t Machine::components() const {
  return static_cast<size_t>(grid_.cluster) * (grid_.threads * kKinds + kBarriersOfBlock);
}

void Machine::set_up(int index) {
  Block& block = blocks_[index];
  const int warps = grid_.threads / kWarpThreads;
  block.cluster = &clusters_[index / grid_.cluster];
  block.rank = index % grid_.cluster;
  block.threads.resize(grid_.threads);
  block.warps.resize(warps);
  block.warpgroups.assign(grid_.threads / kWarpgroupThreads, Warpgroup{});
  block.shared = shared_ + (index + 1) * kSharedStride;
  block.cells.assign((grid_.shared_bytes + kCellBytes - 1) / kCellBytes, Cell{});
  for (int t = 0; t < grid_.threads; ++t) {
    Thread& thread = block.threads[t];
    const size_t group = t / kWarpgroupThreads;
    thread.block = &block;
    thread.warp = &block.warps[t / kWarpThreads];
    thread.warpgroup = group < block.warpgroups.size() ? &block.warpgroups[group] : nullptr;
    thread.index = t;
    thread.lane = t % kWarpThreads;
    thread.stack = stacks_.low(index * grid_.threads + t);
  }
  for (int w = 0; w < warps; ++w) {
    block.warps[w].block = &block;
    block.warps[w].lanes = &block.threads[w * kWarpThreads];
  }
  for (size_t g = 0; g < block.warpgroups.size(); ++g) {
    block.warpgroups[g].threads = &block.threads[g * kWarpgroupThreads];
  }
}

void Machine::map_shared(int blocks) {
  // There is nothing before and behind each block's.
  const size_t bytes = (blocks + 2) * kSharedStride;
  if (shared_bytes_ >= bytes) return;
  if (shared_ != nullptr) munmap(shared_, shared_bytes_);
  shared_bytes_ = 0;
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  shared_ = static_cast<char*>(mapped);
  shared_bytes_ = bytes;
}

void Machine::start(Cluster& cluster) {
  cluster.index = static_cast<uint32_t>(started_++);
  cluster.running = true;
  cluster.arrived = cluster.ended = 0;
  cluster.known.start(components());
  cluster.waiting.clear();
  for (int rank = 0; rank < grid_.cluster; ++rank) start(cluster.blocks[rank]);
}

void Machine::start(Block& block) {
  block.index = static_cast<int>(block.cluster->index) * grid_.cluster + block.rank;
  block.ended = 0;
  std::memset(block.shared, 0xFF, grid_.shared_bytes);  // NaN in every format
  for (Cell& cell : block.cells) {
    cell.writes.count = cell.reads.count = 0;
    cell.written = cell.barrier = 0;
  }
  for (Barrier& barrier : block.barriers) {
    barrier.arrived = 0;
    barrier.came.assign(grid_.threads, false);
    barrier.waiting.clear();
    barrier.known.start(components());
  }
  block.phase_barriers = {};
  block.remote.clear();
  const int registers = registers_of_thread(grid_.threads);
  block.free_registers = 0;
  block.want_registers.clear();
  for (Thread& thread : block.threads) {
    thread.wait = Wait::kNothing;
    thread.copies.clear();
    thread.bulk.clear();
    thread.accumulations.clear();
    thread.between_arrive_and_wait = false;
    thread.spin_address = nullptr;
    thread.spins = 0;
    thread.clock.start(block.rank * grid_.threads + thread.index, grid_.cluster * grid_.threads,
                       nothing_);
    // Tops at different distances from a page, so that stacks do not meet in the same cache sets.
    const size_t shift = static_cast<size_t>(thread.index % 32) * 128;
    prepare(thread.fiber, thread.stack, Stacks::kBytes - shift, &Machine::enter);
  }
  for (Warpgroup& group : block.warpgroups) {
    group.arrived = 0;
    group.registers = registers;
    group.products.clear();
  }
  for (Warp& warp : block.warps) {
    warp.ready = warp.arrived = 0;
    warp.position = -1;
    make_ready(warp, kAllLanes);
  }
}

void Machine::loop() {
  try {
    for (;;) {
      bool some = false;
      for (Cluster& cluster : clusters_) {
        if (cluster.running && cluster.ended == grid_.threads * grid_.cluster) {
          cluster.running = false;
        }
        if (!cluster.running && started_ < grid_.blocks / grid_.cluster) start(cluster);
        some = some || cluster.running;
      }
      if (!some) {
        // Stores of which only the reads were waited for are done by the grid's end.
        while (!engine_.idle()) engine_.finish_one(random_);
        return;
      }
      Thread* next = pick();
      if (next == nullptr) {
        // Only what goes on without threads can help.
        if (engine_.idle()) fail(stuck());
        engine_.finish_one(random_);
        continue;
      }
      running_ = next;
      watch_thread(running_->stack, Stacks::kBytes);
      in_thread_ = true;
      switch_fiber(scheduler_, running_->fiber);
      in_thread_ = false;
      watch_nothing();
      if (failed_) return;
    }
  } catch (const Failed&) {
  }
}

void Machine::enter() {
  Machine& machine = get();
  machine.entry_(machine.kernel_, machine.arguments_);
  machine.end_thread();
}

void Machine::end_thread() {
  Thread& thread = *running_;
  if (const Copy* copy = thread.copies.first()) {
    fail(name_of(thread) + " ends while a copy is under way that it started at " +
         where(copy->place) + ": it has not waited for it");
  }
  if (thread.bulk.last > thread.clock.at(Kind::kStoreRead)) {
    fail(name_of(thread) + " ends while a store is under way that it started at " +
         where(thread.bulk.place) + ": it has not waited until its tile was read");
  }
  if (!thread.accumulations.under_way.empty()) {
    fail(name_of(thread) + " ends while a product is under way that it started at " +
         where(thread.accumulations.place) + ": it has not waited for it");
  }
  if (!thread.accumulations.not_held.empty()) {
    fail(name_of(thread) + " ends, and no wgmma_wait has had the registers of a product that it " +
         "started at " + where(thread.accumulations.place) +
         ": the compiler may use them before the wait");
  }
  thread.wait = Wait::kEnded;
  Cluster& cluster = *thread.block->cluster;
  const bool counted = thread.between_arrive_and_wait && cluster.passed == thread.cluster_barrier;
  if (counted) --cluster.arrived;
  ++cluster.ended;
  if (cluster.arrived > 0) pass_cluster_barrier(cluster);
  if (++thread.block->ended == grid_.threads) {
    check_end_of_block(thread);
    switch_fiber(thread.fiber, scheduler_);
  } else {
    go_on(thread.fiber);
  }
  __builtin_unreachable();
}

Thread* Machine::pick() {
  if (ready_.empty() || (!spinning_.empty() && random_.below(16) == 0)) {
    for (Thread* thread : spinning_) wake(*thread);
    spinning_.clear();
  }
  if (ready_.empty()) return nullptr;
  Warp* warp = running_ != nullptr ? running_->warp : nullptr;
  const uint64_t bits = random_.bits();
  if (warp == nullptr || warp->ready == 0 || static_cast<uint32_t>(bits) < leave_warp_) {
    warp = ready_[random_.below(static_cast<uint32_t>(ready_.size()))];
  }
  // The first ready lane from a random one on.
  const int first = static_cast<int>(bits >> 59);
  const uint64_t twice = static_cast<uint64_t>(warp->ready) << 32 | warp->ready;
  const int lane = (__builtin_ctzll(twice >> first) + first) % kWarpThreads;
  warp->ready &= ~(1u << lane);
  if (warp->ready == 0) {
    ready_.back()->position = warp->position;
    std::swap(ready_[warp->position], ready_.back());
    ready_.pop_back();
    warp->position = -1;
  }
  return &warp->lanes[lane];
}

// Leaves `from` for a thread that can run, or for the loop if there is none.
void Machine::go_on(Fiber& from) {
  Thread* next = pick();
  if (next == nullptr) {
    switch_fiber(from, scheduler_);
    return;
  }
  running_ = next;
  watch_thread(next->stack, Stacks::kBytes);
  switch_fiber(from, next->fiber);
}

void Machine::pause() {
  Thread& thread = *running_;
  if (thread.copies.first() != nullptr && random_.below(4) == 0) thread.copies.land_some(random_);
  if (!engine_.idle() && random_.below(4) == 0) engine_.step(random_);
  go_on(thread.fiber);
}

void Machine::wait(Wait wait, const void* place, int detail) {
  Thread& thread = *running_;
  thread.wait = wait;
  thread.place = place;
  thread.detail = detail;
  pause();
}

void Machine::yield() {
  if (random_.below(16) != 0) return;
  Thread& thread = *running_;
  make_ready(*thread.warp, 1u << thread.lane);
  pause();
}

void Machine::spin(const void* place) {
  Thread& thread = *running_;
  thread.wait = Wait::kSpin;
  thread.place = place;
  if (++thread.spins == kMaxSpins) fail(stuck());
  spinning_.push_back(&thread);
  wait(Wait::kSpin, place);
}

void Machine::wake(Thread& thread) {
  thread.wait = Wait::kNothing;
  make_ready(*thread.warp, 1u << thread.lane);
}

void Machine::wake(Warp& warp, uint32_t lanes) {
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    warp.lanes[__builtin_ctz(left)].wait = Wait::kNothing;
  }
  make_ready(warp, lanes);
}

void Machine::make_ready(Warp& warp, uint32_t lanes) {
  if (warp.ready == 0 && lanes != 0) {
    warp.position = static_cast<int>(ready_.size());
    ready_.push_back(&warp);
  }
  warp.ready |= lanes;
}

void Machine::fail(const std::string& what) {
  error_ = what;
  failed_ = true;
  if (!in_thread_) throw Failed{};
  switch_fiber(running_->fiber, scheduler_);
  __builtin_unreachable();
}

// Indices ---------------------------------------------------------------------------------------

int thread_index() { return Machine::get().running().index; }
int block_index() { return Machine::get().running().block->index; }
int block_count() { return static_cast<int>(Machine::get().grid().blocks); }
char* shared_memory() { return Machine::get().running().block->shared; }

}  // namespace bertkern::emulator
