#include "machine/watch.h"

#include <algorithm>
#include <string>

#include "machine/places.h"
#include "machine/shared.h"
#include "machine/threads.h"

namespace bertkern::emulator {
namespace {

// Of the running thread; where none runs, everything is its stack. One comparison sorts out what
// is most frequent.
struct Stack {
  uintptr_t first, bytes;
};
thread_local Stack own_stack __attribute__((tls_model("initial-exec"))) = {0, UINTPTR_MAX};

bool on_own_stack(uintptr_t address) { return address - own_stack.first < own_stack.bytes; }

Kind kind_of(int component, const Clock& clock) {
  // What counts on a barrier is written by the copy engine.
  if (component >= clock.threads * kKinds) return Kind::kStoreWritten;
  return static_cast<Kind>(component % kKinds);
}

[[noreturn]] void fail(uintptr_t address, size_t bytes, const Act& act, const std::string& what) {
  Machine& machine = Machine::get();
  const Kind kind = kind_of(act.component, machine.running().clock);
  const bool copy = kind != Kind::kOwn && kind != Kind::kProduct;
  const std::string does = copy ? "copies " : act.write ? "writes " : "reads ";
  const char* towards = act.write ? "to " : copy ? "from " : "of ";
  fail_at(does + std::to_string(bytes) + (bytes == 1 ? " byte " : " bytes ") + towards +
              machine.describe(address) +
              (kind == Kind::kProduct ? " for a product"
               : act.atomic           ? " in one step"
                                      : ""),
          act.place, what);
}

[[noreturn]] void out_of_bounds(uintptr_t address, size_t bytes, const Act& act) {
  fail(address, bytes, act, "out of bounds");
}

[[noreturn]] void misaligned(uintptr_t address, size_t bytes, const Act& act) {
  fail(address, bytes, act, "not aligned to " + std::to_string(bytes) + " bytes");
}

// Whose access it was: "thread 3 of block 0", "a copy of thread 3 of block 0".
std::string name_of(const Access& access) {
  const Machine& machine = Machine::get();
  const int threads = machine.grid().threads, size = machine.grid().cluster;
  const std::string block = " of block ";
  const int first_block = static_cast<int>(access.cluster) * size;
  const int barrier = access.component - threads * size * kKinds;
  if (barrier >= 0) {
    return "a load that counts on a barrier" + block +
           std::to_string(first_block + barrier / kBarriersOfBlock);
  }
  const int thread = access.component / kKinds;
  const std::string name =
      std::to_string(thread % threads) + block + std::to_string(first_block + thread / threads);
  switch (static_cast<Kind>(access.component % kKinds)) {
    case Kind::kOwn:
      return "thread " + name;
    case Kind::kCopy:
      return "a copy of thread " + name;
    case Kind::kProduct:
      return "a product of the warp of thread " + name;
    default:
      return "a store of thread " + name;
  }
}

[[noreturn]] void race(uintptr_t address, size_t bytes, const Act& act, const Race& race) {
  fail(address, bytes, act,
       "a race on them with " + name_of(race.earlier) +
           (race.wrote ? ", which writes there at " : ", which reads there at ") +
           where(race.earlier.place) + ", and nothing orders the two");
}

ThreadOrder order_of(const Thread& thread) { return {thread.clock, thread.block->cluster->index}; }

// Bytes of one cell.
template <typename Order>
inline void touch_cell(Cell& cell, uint32_t mask, uintptr_t address, size_t bytes, const Act& act,
                       const Order& order) {
  Machine& machine = Machine::get();
  if ((mask & cell.barrier) != 0) fail(address, bytes, act, "a barrier is there");
  if (act.write) {
    cell.written |= static_cast<uint16_t>(mask);
  } else if ((mask & ~cell.written) != 0) {
    fail(address, bytes, act, "nobody has written all of them");
  }
  if (!machine.finds_races()) return;
  const Access access{machine.running().block->cluster->index, act.time,
                      static_cast<uint16_t>(act.component),    static_cast<uint16_t>(mask),
                      place_of(act.place) & 0x7FFFFFFFu,       act.atomic ? 1u : 0u};
  const auto found = touch(cell, access, act.write, order, machine.pool());
  if (found) race(address, bytes, act, *found);
}
inline void touch_cell(Cell& cell, uint32_t mask, uintptr_t address, size_t bytes, const Act& act) {
  touch_cell(cell, mask, address, bytes, act, order_of(Machine::get().running()));
}

uint32_t mask_of(uintptr_t address, size_t bytes) {
  return ((1u << bytes) - 1) << address % kCellBytes;
}

// The cell of bytes that lie in one; null where they are not shared memory of the block.
Cell* shared_cell(Block& block, uintptr_t address, size_t bytes) {
  const auto size = static_cast<uintptr_t>(Machine::get().grid().shared_bytes);
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(block.shared);
  return offset < size && offset + bytes <= size ? &block.cells[offset / kCellBytes] : nullptr;
}

// The same; null where they are not memory of the running thread.
inline Cell* find_cell(uintptr_t address, size_t bytes, uint32_t mask) {
  Machine& machine = Machine::get();
  Block& block = *machine.running().block;
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(block.shared);
  if (offset < static_cast<uintptr_t>(machine.grid().shared_bytes)) {
    return shared_cell(block, address, bytes);
  }
  Cell* cell = machine.regions().find(address);
  return cell != nullptr && (mask & ~cell->valid) == 0 ? cell : nullptr;
}

void touch_bytes(uintptr_t address, size_t bytes, const Act& act) {
  for (uintptr_t at = address; at < address + bytes;) {
    const uintptr_t end = std::min(address + bytes, (at / kCellBytes + 1) * kCellBytes);
    const uint32_t mask = mask_of(at, end - at);
    Cell* cell = find_cell(at, end - at, mask);
    if (cell != nullptr) {
      touch_cell(*cell, mask, at, end - at, act);
    } else if (act.write || !is_constant(at, end - at)) {
      out_of_bounds(at, end - at, act);
    }
    at = end;
  }
}

// Plain accesses -------------------------------------------------------------------------------

template <size_t kBytes, bool kWrite>
__attribute__((noinline)) void touch_aligned(uintptr_t address, const void* place) {
  const Act act = own_act(kWrite, place);
  constexpr uint32_t kMask = (1u << kBytes) - 1;
  if (address % kBytes == 0) {
    const uint32_t mask = kMask << address % kCellBytes;
    if (Cell* cell = find_cell(address, kBytes, mask)) {
      touch_cell(*cell, mask, address, kBytes, act);
      return;
    }
  }
  if (!kWrite && is_constant(address, kBytes)) return;
  if (find_cell(address, 1, 1u << address % kCellBytes) != nullptr && address % kBytes != 0) {
    misaligned(address, kBytes, act);
  }
  out_of_bounds(address, kBytes, act);
}

__attribute__((noinline)) void touch_range(uintptr_t address, size_t bytes, bool write,
                                           const void* place) {
  touch_bytes(address, bytes, own_act(write, place));
}

template <size_t kBytes, bool kWrite>
inline void aligned(const void* pointer, const void* place) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (!on_own_stack(address)) touch_aligned<kBytes, kWrite>(address, place);
}

inline void range(const void* pointer, size_t bytes, bool write, const void* place) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (!on_own_stack(address)) touch_range(address, bytes, write, place);
}

// An address that a type may not have, whatever the width of the accesses that it is used for.
void misaligned_type(uintptr_t address, const char* type, unsigned alignment, const void* place) {
  Machine& machine = Machine::get();
  if (own_stack.bytes == UINTPTR_MAX) return;
  machine.fail(name_of(machine.running()) + " takes " + machine.describe(address) + " for " + type +
               " at " + where(place_of(place)) + ": not aligned to " + std::to_string(alignment) +
               " bytes");
}

}  // namespace

void watch_thread(const char* stack, size_t bytes) {
  own_stack = {reinterpret_cast<uintptr_t>(stack), bytes};
}
void watch_nothing() { own_stack = {0, UINTPTR_MAX}; }

Act own_act(bool write, const void* place) {
  const Clock& clock = Machine::get().running().clock;
  return {write, component(clock.thread, Kind::kOwn), clock.now(), place};
}

void fail_at(const std::string& does, const void* place, const std::string& what) {
  Machine& machine = Machine::get();
  machine.fail(name_of(machine.running()) + " " + does + " at " + where(place_of(place)) + ": " +
               what);
}

void touch_shared_16(const void* pointer, const Act& act) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Cell* cell = shared_cell(*Machine::get().running().block, address, kCellBytes);
  if (cell == nullptr) out_of_bounds(address, kCellBytes, act);
  if (address % kCellBytes != 0) misaligned(address, kCellBytes, act);
  touch_cell(*cell, kWholeCell, address, kCellBytes, act);
}

namespace {

Cell& global_cell(uintptr_t address, const Act& act) {
  Cell* cell = Machine::get().regions().find(address);
  if (cell != nullptr && address % kCellBytes != 0) misaligned(address, kCellBytes, act);
  if (cell == nullptr || cell->valid != kWholeCell) out_of_bounds(address, kCellBytes, act);
  return *cell;
}

}  // namespace

void touch_global_16(const void* pointer, const Act& act) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  touch_cell(global_cell(address, act), kWholeCell, address, kCellBytes, act);
}

void check_global_16(const void* pointer, const Act& act) {
  global_cell(reinterpret_cast<uintptr_t>(pointer), act);
}

void touch_engine_shared(Block& block, uintptr_t address, size_t bytes, const Act& act) {
  const Thread& thread = Machine::get().running();
  Cell* cell = shared_cell(block, address, bytes);
  if (cell == nullptr) out_of_bounds(address, bytes, act);
  const EngineOrder order{order_of(thread), block.rank, Machine::get().grid().threads};
  touch_cell(*cell, mask_of(address, bytes), address, bytes, act, order);
}

void touch_engine_global(uintptr_t address, size_t bytes, const Act& act) {
  const uint32_t mask = mask_of(address, bytes);
  Cell* cell = Machine::get().regions().find(address);
  if (cell == nullptr || (mask & ~cell->valid) != 0) out_of_bounds(address, bytes, act);
  const EngineOrder order{order_of(Machine::get().running()), -1, Machine::get().grid().threads};
  touch_cell(*cell, mask, address, bytes, act, order);
}

void touch_product(Block& block, uintptr_t address, const Act& act, const ProductOrder& order) {
  Cell* cell = shared_cell(block, address, kCellBytes);
  if (cell == nullptr) out_of_bounds(address, kCellBytes, act);
  touch_cell(*cell, kWholeCell, address, kCellBytes, act, order);
}

void touch_cluster(Block& block, uintptr_t address, size_t bytes, const Act& act) {
  Cell* cell = shared_cell(block, address, bytes);
  if (cell == nullptr) out_of_bounds(address, bytes, act);
  if (address % bytes != 0) misaligned(address, bytes, act);
  touch_cell(*cell, mask_of(address, bytes), address, bytes, act);
}

void touch_barrier(const void* pointer, bool makes, const void* place) {
  Block& block = *Machine::get().running().block;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Cell& cell = *shared_cell(block, address, sizeof(uint64_t));
  const auto mask = static_cast<uint16_t>(mask_of(address, sizeof(uint64_t)));
  if (!makes) cell.barrier &= static_cast<uint16_t>(~mask);
  touch_cluster(block, address, sizeof(uint64_t), own_act(true, place));
  if (makes) cell.barrier |= mask;
}

void touch_word(const int* pointer, bool write, const void* place) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Act act = own_act(write, place);
  act.atomic = true;
  const uint32_t mask = mask_of(address, sizeof(int));
  Cell* cell = Machine::get().regions().find(address);
  if (address % sizeof(int) != 0) misaligned(address, sizeof(int), act);
  if (cell == nullptr || (mask & ~cell->valid) != 0) out_of_bounds(address, sizeof(int), act);
  touch_cell(*cell, mask, address, sizeof(int), act);
}

}  // namespace bertkern::emulator

// What -fsanitize=thread calls, before each access, and -fsanitize=alignment where an address does
// not suit its type. The names are those of GCC's and Clang's instrumentation.
extern "C" {

#define BERTKERN_CALLER __builtin_return_address(0)
#define BERTKERN_ACCESSES(bytes)                                    \
  void __tsan_read##bytes(void* at) {                               \
    bertkern::emulator::aligned<bytes, false>(at, BERTKERN_CALLER); \
  }                                                                 \
  void __tsan_write##bytes(void* at) {                              \
    bertkern::emulator::aligned<bytes, true>(at, BERTKERN_CALLER);  \
  }                                                                 \
  void __tsan_unaligned_read##bytes(void* at) {                     \
    bertkern::emulator::range(at, bytes, false, BERTKERN_CALLER);   \
  }                                                                 \
  void __tsan_unaligned_write##bytes(void* at) {                    \
    bertkern::emulator::range(at, bytes, true, BERTKERN_CALLER);    \
  }
BERTKERN_ACCESSES(1)
BERTKERN_ACCESSES(2)
BERTKERN_ACCESSES(4)
BERTKERN_ACCESSES(8)
BERTKERN_ACCESSES(16)
#undef BERTKERN_ACCESSES

void __tsan_read_range(void* at, size_t bytes) {
  bertkern::emulator::range(at, bytes, false, BERTKERN_CALLER);
}
void __tsan_write_range(void* at, size_t bytes) {
  bertkern::emulator::range(at, bytes, true, BERTKERN_CALLER);
}

// Clang makes these of copies that are too large for the above.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  bertkern::emulator::range(from, bytes, false, BERTKERN_CALLER);
  bertkern::emulator::range(to, bytes, true, BERTKERN_CALLER);
  return __builtin_memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  bertkern::emulator::range(from, bytes, false, BERTKERN_CALLER);
  bertkern::emulator::range(to, bytes, true, BERTKERN_CALLER);
  return __builtin_memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  bertkern::emulator::range(to, bytes, true, BERTKERN_CALLER);
  return __builtin_memset(to, value, bytes);
}

// The guard of a function's static variable, in host code.
unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) {
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

// The first members of what both compilers hand over (compiler-rt, ubsan_handlers.h).
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const struct {
    uint16_t kind, information;
    char name[1];
  }* type;
  unsigned char log_alignment;
};
void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t address) {
  bertkern::emulator::misaligned_type(address, data->type->name, 1u << data->log_alignment,
                                      BERTKERN_CALLER);
}

// Nothing of these concerns kernels; compilers call them nevertheless.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#undef BERTKERN_CALLER
}
