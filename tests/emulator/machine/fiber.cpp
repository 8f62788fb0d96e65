#include "machine/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace bertkern::emulator {

#if defined(__x86_64__)

// What a callee keeps under the System V ABI: six registers and the stack pointer. The control
// words of the floating-point units are the same in all fibers.
asm(R"(
.text
.p2align 4
.type bertkern_switch_fiber, @function
bertkern_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size bertkern_switch_fiber, .-bertkern_switch_fiber
)");

void prepare(Fiber& fiber, char* low, size_t bytes, void (*entry)()) {
  // As switch_fiber leaves a stack: six registers, the return address; above it a return address
  // that is never used, so that the stack is aligned as after a call.
  auto* top = reinterpret_cast<uintptr_t*>(low + bytes);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.stack_pointer = top;
}

#elif defined(__aarch64__)

// What a callee keeps under AAPCS64: x19 to x30, d8 to d15 and the stack pointer.
asm(R"(
.text
.p2align 4
.type bertkern_switch_fiber, %function
bertkern_switch_fiber:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  ldr x9, [x1]
  mov sp, x9
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size bertkern_switch_fiber, .-bertkern_switch_fiber
)");

void prepare(Fiber& fiber, char* low, size_t bytes, void (*entry)()) {
  constexpr int kSaved = 20, kLinkRegister = 11;  // words, in the order above
  auto* top = reinterpret_cast<uintptr_t*>(low + bytes) - kSaved;
  for (int i = 0; i < kSaved; ++i) top[i] = 0;
  top[kLinkRegister] = reinterpret_cast<uintptr_t>(entry);
  fiber.stack_pointer = top;
}

#endif

#if defined(__x86_64__) || defined(__aarch64__)

extern "C" void bertkern_switch_fiber(void** from, void** to);
void switch_fiber(Fiber& from, Fiber& to) {
  bertkern_switch_fiber(&from.stack_pointer, &to.stack_pointer);
}

#else

void prepare(Fiber& fiber, char* low, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = low;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

namespace {

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

Stacks::~Stacks() { release(); }

void Stacks::release() {
  if (mapped_ != nullptr) munmap(mapped_, count_ * (kBytes + page_bytes()));
  mapped_ = nullptr;
  count_ = 0;
}

void Stacks::reserve(int count) {
  if (count <= count_) return;
  release();
  const size_t page = page_bytes(), each = kBytes + page;
  void* mapped = mmap(nullptr, count * each, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  mapped_ = static_cast<char*>(mapped);
  count_ = count;
  for (int i = 0; i < count; ++i) mprotect(mapped_ + i * each, page, PROT_NONE);
}

char* Stacks::low(int index) const {
  const size_t page = page_bytes();
  return mapped_ + index * (kBytes + page) + page;
}

}  // namespace bertkern::emulator
