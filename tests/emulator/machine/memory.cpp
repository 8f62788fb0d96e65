// Accesses that name their space: 16 bytes of global memory, and copies to shared memory.
#include <cstring>

#include "machine/places.h"
#include "machine/threads.h"
#include "machine/watch.h"

namespace bertkern::emulator {
namespace {

Act copy_act(bool write, const void* place) {
  const Thread& thread = Machine::get().running();
  return {write, component(thread.clock.thread, Kind::kCopy), thread.copies.group(), place};
}

}  // namespace

Words4 load_global_16(const void* address) {
  touch_global_16(address, own_act(false, __builtin_return_address(0)));
  Words4 value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}

void store_global_16(void* address, Words4 value) {
  touch_global_16(address, own_act(true, __builtin_return_address(0)));
  std::memcpy(address, &value, sizeof(value));
}

void copy_async_16(void* shared, const void* global, bool valid) {
  Machine& machine = Machine::get();
  Copies& copies = machine.running().copies;
  const void* place = __builtin_return_address(0);
  Words4 value = {};
  if (valid) {
    touch_global_16(global, copy_act(false, place));
    std::memcpy(&value, global, sizeof(value));
  } else {
    check_global_16(global, copy_act(false, place));
  }
  touch_shared_16(shared, copy_act(true, place));
  copies.start(static_cast<char*>(shared), value, place_of(place));
  machine.yield();
}

void copy_async_commit() { Machine::get().running().copies.commit(); }

void copy_async_wait(int pending) {
  Thread& thread = Machine::get().running();
  thread.clock.at(Kind::kCopy) = thread.copies.wait(pending);
}

}  // namespace bertkern::emulator
