// Words of global memory by which blocks hand out work and take turns.
#include "machine/places.h"
#include "machine/threads.h"
#include "machine/watch.h"

namespace bertkern::emulator {
namespace {

void acquire(const int* address) {
  Machine& machine = Machine::get();
  const auto found = machine.words().find(address);
  if (found == machine.words().end()) return;
  Thread& thread = machine.running();
  const uint32_t own = thread.block->cluster->index;
  Learned learned;
  for (const auto& [cluster, told] : *found->second) {
    if (cluster == own) {
      learn(thread.clock, {told, nullptr}, learned);
    } else {
      auto beyond = std::make_shared<std::map<uint32_t, ClusterClock>>();
      (*beyond)[cluster] = told;
      thread.clock.beyond = together(thread.clock.beyond, beyond);
    }
  }
}

// All that the running thread knows, as others beyond its cluster will have it.
Beyond release() {
  Machine& machine = Machine::get();
  Thread& thread = machine.running();
  Gathering gathering;
  gathering.start(machine.components());
  gathering.add(thread.clock);
  const Knowledge all = gathering.take();
  auto own = std::make_shared<std::map<uint32_t, ClusterClock>>();
  (*own)[thread.block->cluster->index] = all.cluster;
  return together(all.beyond, own);
}

}  // namespace

int atomic_add(int* address, int value, bool acquires_and_releases) {
  const void* place = __builtin_return_address(0);
  Machine& machine = Machine::get();
  machine.yield();
  touch_word(address, true, place);
  const int before = *address;
  *address = before + value;
  if (acquires_and_releases) {
    acquire(address);
    Beyond& word = machine.words()[address];
    word = together(word, release());
  }
  return before;
}

int load_word(const int* address, bool acquires) {
  const void* place = __builtin_return_address(0);
  Machine& machine = Machine::get();
  Thread& thread = machine.running();
  touch_word(address, false, place);
  if (thread.spin_address == address && thread.spin_value == *address) {
    machine.spin(place);
  } else {
    thread.spins = 0;
  }
  thread.spin_address = address;
  thread.spin_value = *address;
  if (acquires) acquire(address);
  return thread.spin_value;
}

void store_word(int* address, int value) {
  const void* place = __builtin_return_address(0);
  Machine& machine = Machine::get();
  touch_word(address, true, place);
  machine.words()[address] = release();
  *address = value;
  machine.yield();
}

}  // namespace bertkern::emulator
