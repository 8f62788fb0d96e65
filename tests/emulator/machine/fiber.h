// Fibers: stacks of their own on one operating-system thread, switched by hand.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace bertkern::emulator {

// A place where execution can go on.
struct Fiber {
#if defined(__x86_64__) || defined(__aarch64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Makes `fiber` start in entry(), which must never return, on the stack [low, low + bytes).
void prepare(Fiber& fiber, char* low, size_t bytes, void (*entry)());

// Goes on in `to`; returns when something switches to `from` again.
void switch_fiber(Fiber& from, Fiber& to);

// Stacks for fibers, each with a page below it that faults.
class Stacks {
 public:
  static constexpr size_t kBytes = 64 * 1024;

  ~Stacks();
  void reserve(int count);  // at least so many; those given out before are no longer valid
  char* low(int index) const;

 private:
  void release();
  char* mapped_ = nullptr;
  int count_ = 0;
};

}  // namespace bertkern::emulator
