// Every access of a kernel to memory: is it inside, aligned, of bytes that somebody has written,
// and in order with what other threads do there?
//
// Plain loads and stores come from the compiler's instrumentation (watch.cpp); functions of the
// machine that touch memory report it themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "machine/shadow.h"

namespace bertkern::emulator {

struct Block;

// Accesses of the running thread to its own stack are nobody else's; between threads nothing is
// watched.
void watch_thread(const char* stack, size_t bytes);
void watch_nothing();

// An access by the running thread, or one that it starts: as which component of its clock, when.
struct Act {
  bool write;
  int component;
  uint32_t time;
  const void* place;
  bool atomic = false;
};
Act own_act(bool write, const void* place);

// Accesses of 16 bytes, aligned to 16, to the shared memory of the thread's block or to global
// memory, in order with the thread's own.
void touch_shared_16(const void* address, const Act& act);
void touch_global_16(const void* address, const Act& act);

// A global address of which nothing is read, but which must be that of some tensor.
void check_global_16(const void* address, const Act& act);

// Of the copy engine: up to 16 bytes of one cell, in the order of asynchronous accesses.
void touch_engine_shared(Block& block, uintptr_t address, size_t bytes, const Act& act);
void touch_engine_global(uintptr_t address, size_t bytes, const Act& act);

// 16 bytes of the block's shared memory that a warp of a warpgroup reads for a product.
void touch_product(Block& block, uintptr_t address, const Act& act, const ProductOrder& order);

// Bytes of one cell in a block's shared memory, by a thread of its cluster.
void touch_cluster(Block& block, uintptr_t address, size_t bytes, const Act& act);

// A word of global memory; atomic.
void touch_word(const int* address, bool write, const void* place);

// Does not return: "thread 3 of block 0 <does> ... at <place>: <what>".
[[noreturn]] void fail_at(const std::string& does, const void* place, const std::string& what);

}  // namespace bertkern::emulator
