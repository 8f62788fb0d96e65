// Barriers of blocks and warps.
#include <string>

#include "machine/places.h"
#include "machine/threads.h"

namespace bertkern::emulator {
namespace {

// Counts the running thread in. The last one lets the others go on; for it this is true.
bool arrive(Barrier& barrier, int expected, const char* what, const void* place) {
  Machine& machine = Machine::get();
  if (barrier.arrived != 0 && barrier.expected != expected) {
    machine.fail(name_of(machine.running()) + " comes to " + what + " of " +
                 std::to_string(expected) + " threads at " + where(place_of(place)) +
                 ", where others wait for " + std::to_string(barrier.expected));
  }
  barrier.expected = expected;
  const int thread = machine.running().index;
  if (barrier.came[thread]) {
    machine.fail(name_of(machine.running()) + " comes to " + what + " at " +
                 where(place_of(place)) + " for the second time, where others wait for " +
                 "threads that have not come");
  }
  barrier.came[thread] = true;
  barrier.known.add(machine.running().clock);
  return ++barrier.arrived == expected;
}

// What a thread knows now that it has told the others all that it knew.
void learn(Clock& clock, const Knowledge& known) {
  clock.cluster = known.cluster;
  clock.beyond = known.beyond;
  clock.warp.reset();
}

// The barrier is complete: those who wait know what all who came knew.
Knowledge open(Barrier& barrier) {
  const Knowledge known = barrier.known.take();
  for (Thread* thread : barrier.waiting) {
    learn(thread->clock, known);
    Machine::get().wake(*thread);
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.came.assign(barrier.came.size(), false);
  return known;
}

void sync(Barrier& barrier, int expected, Wait wait, int id, const void* place) {
  Machine& machine = Machine::get();
  Thread& thread = machine.running();
  if (arrive(barrier, expected, name_of(wait), place)) {
    learn(thread.clock, open(barrier));
    return;
  }
  barrier.waiting.push_back(&thread);
  machine.wait(wait, place, id);
}

void check_named(int id, int threads, const void* place) {
  Machine& machine = Machine::get();
  if (id < 1 || id >= kNamedBarriers || threads <= 0 || threads % kWarpThreads != 0 ||
      threads > machine.grid().threads) {
    machine.fail("named barrier " + std::to_string(id) + " of " + std::to_string(threads) +
                 " threads at " + where(place_of(place)) +
                 ": ids are 1 to 15, threads whole warps of " +
                 std::to_string(machine.grid().threads));
  }
}

}  // namespace

void block_barrier() {
  Machine& machine = Machine::get();
  sync(machine.running().block->barriers[0], machine.grid().threads, Wait::kBlockBarrier, 0,
       __builtin_return_address(0));
}

void named_barrier_sync(int id, int threads) {
  const void* place = __builtin_return_address(0);
  check_named(id, threads, place);
  sync(Machine::get().running().block->barriers[id], threads, Wait::kNamedBarrier, id, place);
}

void named_barrier_arrive(int id, int threads) {
  Machine& machine = Machine::get();
  const void* place = __builtin_return_address(0);
  check_named(id, threads, place);
  Barrier& barrier = machine.running().block->barriers[id];
  if (arrive(barrier, threads, name_of(Wait::kNamedBarrier), place)) open(barrier);
  machine.yield();
}

}  // namespace bertkern::emulator
