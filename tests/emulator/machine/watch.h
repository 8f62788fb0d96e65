// Every access of a kernel to memory: is it inside, aligned, of bytes that somebody has written,
// and in order with what other threads do there?
//
// Plain loads and stores come from the compiler's instrumentation (watch.cpp); functions of the
// machine that touch memory report it themselves.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine/clock.h"

namespace bertkern::emulator {

// Accesses of the running thread to its own stack are nobody else's; between threads nothing is
// watched.
void watch_thread(const char* stack, size_t bytes);
void watch_nothing();

// An access of 16 bytes, aligned to 16, by the running thread: to the shared memory of its block,
// or to global memory. A copy's is ordered by the wait for its group, not by the thread.
struct Act {
  bool write;
  Kind kind;
  uint32_t time;  // of the component
  const void* place;
};
void touch_shared_16(const void* address, const Act& act);
void touch_global_16(const void* address, const Act& act);

// A global address of which nothing is read, but which must be that of some tensor.
void check_global_16(const void* address, const void* place);

}  // namespace bertkern::emulator
