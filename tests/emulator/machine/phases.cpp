// Barriers of phases (mbarrier): arrivals, bytes, waits.
#include "machine/phases.h"

#include <algorithm>

#include "machine/places.h"
#include "machine/shared.h"
#include "machine/threads.h"
#include "machine/watch.h"

namespace bertkern::emulator {
namespace {

constexpr int kMostArrivals = (1 << 20) - 1;
constexpr int kMostBytes = (1 << 20) - 1;

std::string name_of_barrier(const Block& block, uintptr_t offset) {
  return "the barrier at shared memory + " + std::to_string(offset) + " of block " +
         std::to_string(block.index);
}

// Where in the running thread's shared memory a barrier is.
uintptr_t barrier_offset(const void* barrier, const char* does, const void* place) {
  Machine& machine = Machine::get();
  const uintptr_t offset = reinterpret_cast<uintptr_t>(barrier) -
                           reinterpret_cast<uintptr_t>(machine.running().block->shared);
  if (offset + sizeof(uint64_t) > static_cast<uintptr_t>(machine.grid().shared_bytes) ||
      offset > static_cast<uintptr_t>(machine.grid().shared_bytes)) {
    fail_at(std::string(does) + " a barrier at " +
                machine.describe(reinterpret_cast<uintptr_t>(barrier)),
            place, "out of bounds");
  }
  if (offset % sizeof(uint64_t) != 0) {
    fail_at(std::string(does) + " " + name_of_barrier(*machine.running().block, offset), place,
            "not aligned to 8 bytes");
  }
  return offset;
}

// A barrier that is there, as the running thread knows. `by_others`: the copy engine, or a thread
// of another block, is to use it.
PhaseBarrier& barrier_at(Block& block, uintptr_t offset, const char* does, const void* place,
                         bool by_others) {
  const Clock& clock = Machine::get().running().clock;
  const auto found = block.phase_barriers.by_offset.find(offset);
  const bool there = found != block.phase_barriers.by_offset.end();
  const auto refuse = [&](const std::string& what) {
    std::string made;
    if (there) {
      const int threads = Machine::get().grid().threads;
      made = ", which thread " + std::to_string(found->second.initialiser % threads) + " made at " +
             where(found->second.place);
    }
    fail_at(std::string(does) + " " + name_of_barrier(block, offset), place, what + made);
  };
  if (!there) refuse("there is none: no barrier_init");
  PhaseBarrier& barrier = found->second;
  if (!clock.knows(component(barrier.initialiser, Kind::kOwn), barrier.initialised_at)) {
    refuse("a race with its barrier_init");
  }
  if (!barrier.fenced && (by_others || barrier.initialiser != clock.thread)) {
    refuse("no barrier_init_fence since its barrier_init");
  }
  return barrier;
}

PhaseBarrier& own_barrier(const void* barrier, const char* does, const void* place,
                          bool by_engine = false) {
  const uintptr_t offset = barrier_offset(barrier, does, place);
  return barrier_at(*Machine::get().running().block, offset, does, place, by_engine);
}

bool is_over(const PhaseBarrier& barrier, int parity) {
  return (barrier.phase & 1) != static_cast<uint32_t>(parity);
}

void end_phase_if_complete(PhaseBarrier& barrier) {
  Machine& machine = Machine::get();
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  if (barrier.copies_under_way != 0) {
    machine.fail("a phase of the barrier made at " + where(barrier.place) +
                 " ends while a copy that counts on it is under way, started at " +
                 where(barrier.copy_place) + ": nobody expected its bytes");
  }
  if (!barrier.woken.empty()) {
    const Thread& thread = *barrier.woken.front();
    machine.fail("phase " + std::to_string(barrier.phase) + " of the barrier made at " +
                 where(barrier.place) + " ends before " + name_of(thread) +
                 " has seen the end of the phase before, for which it waits at " +
                 where(place_of(thread.place)) + ": it could miss it");
  }
  const auto time = barrier.phase + 1;
  barrier.arrivals.set(static_cast<size_t>(barrier.component), time);
  barrier.told = barrier.arrivals.look();
  barrier.learned.clear();
  if (machine.grid().cluster > 1) {
    barrier.cluster_arrivals.set(static_cast<size_t>(barrier.component), time);
    barrier.cluster_told = barrier.cluster_arrivals.look();
    barrier.cluster_learned.clear();
  }
  ++barrier.phase;
  barrier.pending = barrier.expected;
  std::vector<Thread*> waiting;
  for (Thread* thread : barrier.waiting) {
    if (is_over(barrier, thread->detail)) {
      barrier.woken.push_back(thread);
      machine.wake(*thread);
    } else {
      waiting.push_back(thread);
    }
  }
  barrier.waiting = std::move(waiting);
}

void arrive(PhaseBarrier& barrier, bool from_cluster, const void* place) {
  if (barrier.pending == 0) {
    fail_at("arrives at the barrier made at " + where(barrier.place), place,
            "all " + std::to_string(barrier.expected) +
                " arrivals of this phase have come; its bytes have not");
  }
  Clock& clock = Machine::get().running().clock;
  const bool clusters = Machine::get().grid().cluster > 1;
  if (!from_cluster || !clusters) barrier.arrivals.add(clock);
  if (clusters) barrier.cluster_arrivals.add(clock);
  --barrier.pending;
  end_phase_if_complete(barrier);
}

void expect(PhaseBarrier& barrier, int bytes, const void* place) {
  if (bytes < 0 || bytes > kMostBytes) {
    fail_at("expects " + std::to_string(bytes) + " bytes", place, "allowed are 0 to 1048575");
  }
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes) {
    fail_at("expects " + std::to_string(barrier.bytes) + " bytes in all", place,
            "a phase counts up to 1048575");
  }
}

// The running thread has seen the end of a phase.
void see(PhaseBarrier& barrier, bool cluster) {
  Thread& thread = Machine::get().running();
  barrier.woken.erase(std::remove(barrier.woken.begin(), barrier.woken.end(), &thread),
                      barrier.woken.end());
  barrier.last_seen = barrier.phase;
  if (cluster && Machine::get().grid().cluster > 1) {
    learn(thread.clock, barrier.cluster_told, barrier.cluster_learned);
  } else {
    learn(thread.clock, barrier.told, barrier.learned);
  }
}

void check_parity(int parity, const void* place) {
  if (parity != 0 && parity != 1) {
    fail_at("waits for parity " + std::to_string(parity), place, "allowed are 0 and 1");
  }
}

}  // namespace

void count_bytes(PhaseBarrier& barrier, int bytes) {
  barrier.bytes -= bytes;
  --barrier.copies_under_way;
  end_phase_if_complete(barrier);
}

PhaseBarrier& start_copy(const void* pointer, const void* place) {
  return start_copy(own_barrier(pointer, "counts bytes on", place, true), place);
}

PhaseBarrier& start_copy(Block& block, uintptr_t offset, const void* place) {
  return start_copy(barrier_at(block, offset, "counts bytes on", place, true), place);
}

PhaseBarrier& start_copy(PhaseBarrier& barrier, const void* place) {
  ++barrier.copies_under_way;
  barrier.last_copy = barrier.phase + 1;
  barrier.copy_place = place_of(place);
  return barrier;
}

void check_end_of_block(Thread& thread) {
  Machine& machine = Machine::get();
  Block& block = *thread.block;
  for (const auto& [offset, barrier] : block.phase_barriers.by_offset) {
    if (barrier.last_copy > barrier.last_seen) {
      machine.fail("block " + std::to_string(block.index) + " ends, and nobody has waited for " +
                   "the copy that counts on " + name_of_barrier(block, offset) + ", started at " +
                   where(barrier.copy_place));
    }
  }
  for (const auto& [component, time] : block.remote) {
    bool known = false;
    for (const Thread& own : block.threads) known = known || own.clock.knows(component, time);
    if (!known) {
      const int threads = machine.grid().threads;
      const int other = component / kKinds;
      machine.fail("block " + std::to_string(block.index) + " ends while thread " +
                   std::to_string(other % threads) + " of block " +
                   std::to_string(block.index - block.rank + other / threads) +
                   " may not be done with its shared memory: nothing orders the two");
    }
  }
}

void phase_barrier_init(void* pointer, int arrivals) {
  Machine& machine = Machine::get();
  const void* place = __builtin_return_address(0);
  if (arrivals < 1 || arrivals > kMostArrivals) {
    fail_at("makes a barrier of " + std::to_string(arrivals) + " arrivals", place,
            "allowed are 1 to 1048575");
  }
  const uintptr_t offset = barrier_offset(pointer, "makes", place);
  Thread& thread = machine.running();
  Block& block = *thread.block;
  if (block.phase_barriers.by_offset.count(offset) != 0) {
    fail_at("makes " + name_of_barrier(block, offset), place,
            "there is one, and no barrier_invalidate came");
  }
  if (block.phase_barriers.made == kBarriersOfBlock) {
    fail_at("makes " + name_of_barrier(block, offset), place,
            "the machine takes " + std::to_string(kBarriersOfBlock) + " of a block");
  }
  touch_barrier(pointer, true, place);
  PhaseBarrier& barrier = block.phase_barriers.by_offset[offset];
  barrier.component =
      thread.clock.threads * kKinds + block.rank * kBarriersOfBlock + block.phase_barriers.made++;
  barrier.expected = barrier.pending = static_cast<uint32_t>(arrivals);
  barrier.initialiser = thread.clock.thread;
  barrier.initialised_at = thread.clock.now();
  barrier.place = place_of(place);
  barrier.arrivals.start(machine.components());
  barrier.cluster_arrivals.start(machine.grid().cluster > 1 ? machine.components() : 0);
  barrier.told = barrier.cluster_told = {};
}

void phase_barrier_init_fence() {
  const Thread& thread = Machine::get().running();
  for (auto& [offset, barrier] : thread.block->phase_barriers.by_offset) {
    if (barrier.initialiser == thread.clock.thread) barrier.fenced = true;
  }
}

void phase_barrier_invalidate(void* pointer) {
  const void* place = __builtin_return_address(0);
  Block& block = *Machine::get().running().block;
  const uintptr_t offset = barrier_offset(pointer, "invalidates", place);
  const PhaseBarrier& barrier = barrier_at(block, offset, "invalidates", place, false);
  if (!barrier.waiting.empty() || !barrier.woken.empty() || barrier.copies_under_way != 0) {
    fail_at("invalidates " + name_of_barrier(block, offset), place,
            "threads wait for it or copies count on it");
  }
  touch_barrier(pointer, false, place);
  block.phase_barriers.by_offset.erase(offset);
}

void phase_barrier_arrive(void* pointer, int bytes, bool arrives) {
  const void* place = __builtin_return_address(0);
  PhaseBarrier& barrier = own_barrier(pointer, arrives ? "arrives at" : "expects bytes on", place);
  expect(barrier, bytes, place);
  if (arrives) arrive(barrier, false, place);
  Machine::get().yield();
}

void phase_barrier_arrive_cluster(uint32_t address) {
  const void* place = __builtin_return_address(0);
  const auto [block, offset] = in_cluster(address, sizeof(uint64_t), "arrives at a barrier", place);
  arrive(barrier_at(*block, offset, "arrives at", place, block != Machine::get().running().block),
         true, place);
  Machine::get().yield();
}

bool phase_barrier_try_wait(void* pointer, int parity) {
  const void* place = __builtin_return_address(0);
  check_parity(parity, place);
  PhaseBarrier& barrier = own_barrier(pointer, "waits for", place);
  if (is_over(barrier, parity)) {
    Machine::get().running().spins = 0;
    see(barrier, false);
    return true;
  }
  Machine::get().spin(place);
  return false;
}

void phase_barrier_wait(void* pointer, int parity, bool cluster) {
  Machine& machine = Machine::get();
  const void* place = __builtin_return_address(0);
  check_parity(parity, place);
  PhaseBarrier& barrier = own_barrier(pointer, "waits for", place);
  while (!is_over(barrier, parity)) {
    Thread& thread = machine.running();
    barrier.woken.erase(std::remove(barrier.woken.begin(), barrier.woken.end(), &thread),
                        barrier.woken.end());
    barrier.waiting.push_back(&thread);
    machine.wait(Wait::kPhase, place, parity);
  }
  see(barrier, cluster);
}

}  // namespace bertkern::emulator
