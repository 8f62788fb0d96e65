// Products of a warpgroup (wgmma), the registers that they work on, and setmaxnreg.
#include "machine/products.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "common/shared_tile.h"
#include "machine/number.h"
#include "machine/places.h"
#include "machine/shared.h"
#include "machine/threads.h"
#include "machine/watch.h"

namespace bertkern::emulator {
namespace {

constexpr int kRows = 64, kDepth = 16, kMostColumns = 256;
constexpr uint32_t kPoison = 0xFFFFFFFFu;  // NaN

// As gather in warps.cpp, for the four warps of a warpgroup.
bool gather_warpgroup(Wait wait, int option, const void* place) {
  Machine& machine = Machine::get();
  Thread& thread = machine.running();
  Warpgroup* group = thread.warpgroup;
  if (group == nullptr) {
    fail_at(std::string("does ") + name_of(wait), place, "its warp is in no warpgroup");
  }
  thread.place = place;
  if (group->arrived == 0) {
    group->wait = wait;
    group->option = option;
    group->first = &thread;
  } else if (group->wait != wait || group->option != option) {
    const char* same = group->wait == wait ? " of another kind" : "";
    machine.fail("a warpgroup has parted: " + name_of(thread) + " is at " + name_of(wait) + ", " +
                 where(place_of(place)) + ", where " + name_of(*group->first) + " waits at " +
                 name_of(group->wait) + same + ", " + where(place_of(group->first->place)));
  }
  if (++group->arrived == kWarpgroupThreads) return true;
  machine.wait(wait, place);
  return false;
}

void release_warpgroup(Thread& last) {
  Warpgroup& group = *last.warpgroup;
  group.arrived = 0;
  for (int t = 0; t < kWarpgroupThreads; ++t) {
    if (&group.threads[t] != &last) Machine::get().wake(group.threads[t]);
  }
}

// All threads of the warpgroup come to the same instruction.
void meet(Wait wait, const void* place) {
  if (gather_warpgroup(wait, static_cast<int>(place_of(place)), place)) {
    release_warpgroup(Machine::get().running());
  }
}

// A tile of 16-bit elements in shared memory, as the bits of a descriptor say (PTX ISA, "Matrix
// Descriptor" of wgmma; common/shared_tile.h). `across` counts rows of a left or columns of a right
// operand.
class Tile {
 public:
  Tile(uint64_t bits, bool transposed)
      : start_(static_cast<int>(bits & 0x3FFF) << 4),
        leading_(static_cast<int>(bits >> 16 & 0x3FFF) << 4),
        stride_(static_cast<int>(bits >> 32 & 0x3FFF) << 4),
        transposed_(transposed) {
    constexpr Swizzle kModes[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32};
    swizzle_ = kModes[bits >> 62];
  }

  // Where in shared memory, from the block's first byte on, the 16 bytes are that hold the element
  // of which the index along the contiguous dimension is a multiple of 8.
  int chunk(int across, int k) const {
    const int span = swizzle_span(swizzle_);
    int address = start_;
    if (!transposed_) {
      address += across / 8 * stride_ + across % 8 * span;
      address += swizzle_ == Swizzle::kNone ? k / 8 * leading_ : k * 2;
    } else if (swizzle_ == Swizzle::kNone) {
      address += k / 8 * leading_ + k % 8 * span + across / 8 * stride_;
    } else {
      address += k / 8 * stride_ + k % 8 * span;
      address += across / (span / 2) * leading_ + across % (span / 2) * 2;
    }
    return swizzled(address, swizzle_) - static_cast<int>(kFirstSharedAddress);
  }

  // body(across, k, offset) for all chunks of `count` rows or columns from `first` on.
  template <typename Body>
  void for_chunks(int first, int count, Body body) const {
    if (!transposed_) {
      for (int across = first; across < first + count; ++across) {
        for (int k = 0; k < kDepth; k += 8) body(across, k, chunk(across, k));
      }
    } else {
      for (int k = 0; k < kDepth; ++k) {
        for (int across = first; across < first + count; across += 8) {
          body(across, k, chunk(across, k));
        }
      }
    }
  }

  bool transposed() const { return transposed_; }

 private:
  int start_, leading_, stride_;
  bool transposed_;
  Swizzle swizzle_;
};

bool contains(const FencedRegisters& fenced, const uint32_t* registers, size_t words) {
  return registers >= fenced.registers &&
         registers + words <= fenced.registers + fenced.value.size();
}

// The thread's registers are as they were when a fence, or a product, had them last.
void check_fenced(Thread& thread, const uint32_t* registers, size_t words, const char* what,
                  const void* place) {
  for (const FencedRegisters& fenced : thread.accumulations.fenced) {
    if (!contains(fenced, registers, words)) continue;
    const uint32_t* then = fenced.value.data() + (registers - fenced.registers);
    if (std::memcmp(then, registers, words * sizeof(uint32_t)) == 0) return;
    fail_at("starts a product", place,
            std::string("its ") + what + " have been touched since the last wgmma_fence");
  }
  fail_at("starts a product", place, std::string("no wgmma_fence has had its ") + what);
}

// The waiting lanes' accumulators are handed over to the product.
void start_accumulation(Thread& thread, float* registers, int words, uint32_t group,
                        const void* place) {
  Accumulations& own = thread.accumulations;
  const auto count = static_cast<size_t>(words);
  for (Accumulation& running : own.under_way) {
    if (running.registers == registers && running.value.size() == count) {
      running.group = group;
      return;
    }
    if (registers < running.registers + running.value.size() &&
        running.registers < registers + count) {
      fail_at("starts a product", place, "its accumulators are a part of a running product's");
    }
  }
  check_fenced(thread, reinterpret_cast<const uint32_t*>(registers), count, "accumulators", place);
  own.not_held.erase(std::remove(own.not_held.begin(), own.not_held.end(), registers),
                     own.not_held.end());
  own.under_way.push_back({registers, {registers, registers + count}, group});
  std::memset(registers, 0xFF, count * sizeof(float));
}

const Accumulations::Operand* find_operand(const Accumulations& own, const uint32_t* registers) {
  for (const Accumulations::Operand& left : own.operands) {
    if (left.registers == registers) return &left;
  }
  return nullptr;
}

// Registers of a left operand are the product's until the wait, as the accumulators are.
void take_left_operand(Thread& thread, const uint32_t* registers, uint32_t group,
                       const void* place) {
  Accumulations& own = thread.accumulations;
  for (Accumulations::Operand& running : own.operands) {
    if (running.registers == registers) {
      running.group = group;
      return;
    }
  }
  check_fenced(thread, registers, 4, "left operands", place);
  Accumulations::Operand left{const_cast<uint32_t*>(registers), {}, group};
  std::copy_n(registers, 4, left.value.begin());
  std::fill_n(left.registers, 4, kPoison);
  own.not_held.erase(std::remove(own.not_held.begin(), own.not_held.end(), registers),
                     own.not_held.end());
  own.operands.push_back(left);
}

// The next product may add to what this one has left, as long as nobody touches it.
void note_result(Accumulations& own, const Accumulation& done) {
  const auto* registers = reinterpret_cast<const uint32_t*>(done.registers);
  for (FencedRegisters& fenced : own.fenced) {
    if (!contains(fenced, registers, done.value.size())) continue;
    std::memcpy(fenced.value.data() + (registers - fenced.registers), done.registers,
                done.value.size() * sizeof(float));
  }
}

// Each warp reads its own rows of the left tile, and all of the right one.
void touch_tiles(const Warpgroup& group, const WarpgroupOperands& operands, int columns,
                 uint32_t number, const void* place) {
  Machine& machine = Machine::get();
  Block& block = *machine.running().block;
  std::vector<const Clock*> clocks;
  for (int t = 0; t < kWarpgroupThreads; ++t) {
    const Clock& clock = group.threads[t].clock;
    const bool same = std::any_of(clocks.begin(), clocks.end(), [&](const Clock* other) {
      return other->cluster == clock.cluster && other->warp == clock.warp &&
             other->first_lane() == clock.first_lane();
    });
    if (!same) clocks.push_back(&clock);
  }
  const ProductOrder order{clocks, block.cluster->index};
  const auto touch = [&](int warp, int offset) {
    const Thread& lane = group.threads[warp * kWarpThreads];
    touch_product(block, reinterpret_cast<uintptr_t>(block.shared) + static_cast<uintptr_t>(offset),
                  {false, component(lane.clock.thread, Kind::kProduct), number, place}, order);
  };
  const int warps = kWarpgroupThreads / kWarpThreads;
  const Tile b(operands.b_tile, operands.transpose_b);
  b.for_chunks(0, columns, [&](int, int, int offset) {
    for (int warp = 0; warp < warps; ++warp) touch(warp, offset);
  });
  if (operands.a_registers != nullptr) return;
  const Tile a(operands.a_tile, operands.transpose_a);
  for (int warp = 0; warp < warps; ++warp) {
    a.for_chunks(16 * warp, 16, [&](int, int, int offset) { touch(warp, offset); });
  }
}

void check_descriptor(uint64_t bits, const char* which, const void* place) {
  if ((bits >> 49 & 7) != 0 || (bits & 0x3FFF) << 4 < kFirstSharedAddress) {
    fail_at("starts a product", place,
            std::string("the descriptor of its ") + which + " operand says no tile that is there");
  }
}

using Decode = float (*)(uint16_t);

// The 16 bytes of a chunk go to out(across, k).
template <typename Out>
void load_tile(const Tile& tile, const char* shared, int count, Decode decode, Out out) {
  tile.for_chunks(0, count, [&](int across, int k, int offset) {
    uint16_t element[8];
    std::memcpy(element, shared + offset, sizeof(element));
    for (int i = 0; i < 8; ++i) {
      const bool along_k = !tile.transposed();
      out(across + (along_k ? 0 : i), k + (along_k ? i : 0)) = decode(element[i]);
    }
  });
}

}  // namespace

void multiply_next(Warpgroup& group) {
  const Product product = std::move(group.products.front());
  group.products.pop_front();
  const WarpgroupOperands& operands = product.operands;
  const Decode decode = operands.format == Format::kHalf ? &float_of_half : &float_of_bfloat16;
  const char* shared = group.threads->block->shared;
  const int tiles = product.words / 4, columns = 8 * tiles;
  static float a[kRows][kDepth];
  alignas(32) static float b[kDepth][kMostColumns], d[kRows][kMostColumns];
  load_tile(Tile(operands.b_tile, operands.transpose_b), shared, columns, decode,
            [](int n, int k) -> float& { return b[k][n]; });
  if (product.a_registers.empty()) {
    load_tile(Tile(operands.a_tile, operands.transpose_a), shared, kRows, decode,
              [](int m, int k) -> float& { return a[m][k]; });
  }
  std::array<float*, kWarpgroupThreads> sums;
  for (int t = 0; t < kWarpgroupThreads; ++t) {
    std::vector<Accumulation>& under_way = group.threads[t].accumulations.under_way;
    const auto found =
        std::find_if(under_way.begin(), under_way.end(), [&](const Accumulation& running) {
          return running.registers == product.registers[static_cast<size_t>(t)];
        });
    sums[static_cast<size_t>(t)] = found->value.data();
    const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
    for (int i = 0; i < product.words; ++i) {
      float& sum = d[row + i % 4 / 2 * 8][i / 4 * 8 + column + i % 2];
      sum = operands.accumulate ? found->value[static_cast<size_t>(i)] : 0.0f;
    }
    if (product.a_registers.empty()) continue;
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = product.a_registers[static_cast<size_t>(t)][static_cast<size_t>(i)];
      float* pair = &a[row + i % 2 * 8][column + i / 2 * 8];
      pair[0] = decode(static_cast<uint16_t>(word));
      pair[1] = decode(static_cast<uint16_t>(word >> 16));
    }
  }
  typedef float Eight __attribute__((vector_size(32)));
  for (int row = 0; row < kRows; ++row) {
    for (int n = 0; n < columns; n += 8) {
      Eight sum;
      std::memcpy(&sum, &d[row][n], sizeof(sum));
      for (int k = 0; k < kDepth; ++k) {
        Eight right;
        std::memcpy(&right, &b[k][n], sizeof(right));
        sum += a[row][k] * right;
      }
      std::memcpy(&d[row][n], &sum, sizeof(sum));
    }
  }
  for (int t = 0; t < kWarpgroupThreads; ++t) {
    const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
    for (int i = 0; i < product.words; ++i) {
      sums[static_cast<size_t>(t)][i] = d[row + i % 4 / 2 * 8][i / 4 * 8 + column + i % 2];
    }
  }
}

void check_tile(const void* tile, int alignment) {
  if (shared_address(tile) % static_cast<uint32_t>(alignment) != 0) {
    fail_at("describes a tile at " + Machine::get().describe(reinterpret_cast<uintptr_t>(tile)),
            __builtin_return_address(0), "not aligned to " + std::to_string(alignment) + " bytes");
  }
}

void warpgroup_hold(const void* registers, int words) {
  std::vector<const void*>& waiting = Machine::get().running().accumulations.not_held;
  const auto* first = static_cast<const uint32_t*>(registers);
  waiting.erase(
      std::remove_if(waiting.begin(), waiting.end(),
                     [&](const void* other) { return other >= first && other < first + words; }),
      waiting.end());
}

void warpgroup_fence(const void* registers, int words) {
  Thread& thread = Machine::get().running();
  warpgroup_hold(registers, words);
  const auto* first = static_cast<const uint32_t*>(registers);
  Accumulations& own = thread.accumulations;
  for (const Accumulation& running : own.under_way) {
    if (static_cast<const void*>(running.registers) == registers) return;
  }
  const auto count = static_cast<size_t>(words);
  FencedRegisters now{first, {first, first + count}};
  for (const Accumulations::Operand& left : own.operands) {  // as they will be again
    if (contains(now, left.registers, left.value.size())) {
      std::copy(left.value.begin(), left.value.end(), now.value.begin() + (left.registers - first));
    }
  }
  own.fenced.erase(std::remove_if(own.fenced.begin(), own.fenced.end(),
                                  [&](const FencedRegisters& fenced) {
                                    return first < fenced.registers + fenced.value.size() &&
                                           fenced.registers < first + count;
                                  }),
                   own.fenced.end());
  own.fenced.push_back(std::move(now));
}

void warpgroup_product(float* d, int words, WarpgroupOperands operands) {
  Machine& machine = Machine::get();
  Thread& thread = machine.running();
  const void* place = __builtin_return_address(0);
  Accumulations& own = thread.accumulations;
  const uint32_t number = own.committed + 1;
  check_descriptor(operands.b_tile, "right", place);
  if (operands.a_registers == nullptr) {
    check_descriptor(operands.a_tile, "left", place);
  } else {
    take_left_operand(thread, operands.a_registers, number, place);
  }
  start_accumulation(thread, d, words, number, place);
  own.place = place_of(place);
  thread.product = {operands, d};
  const int kind = words * 16 + (operands.a_registers != nullptr ? 8 : 0) +
                   (operands.transpose_a ? 4 : 0) + (operands.transpose_b ? 2 : 0) +
                   (operands.accumulate ? 1 : 0);
  if (!gather_warpgroup(Wait::kProduct, kind, place)) return;
  Warpgroup& group = *thread.warpgroup;
  Product product{operands, words, number, {}, {}};
  for (int t = 0; t < kWarpgroupThreads; ++t) {
    const Thread& other = group.threads[t];
    const WarpgroupOperands& theirs = other.product.operands;
    if (theirs.b_tile != operands.b_tile || theirs.a_tile != operands.a_tile) {
      fail_at("starts a product", place,
              "thread " + std::to_string(other.index) + " has another descriptor");
    }
    if (other.accumulations.committed != own.committed) {
      fail_at("starts a product", place,
              "thread " + std::to_string(other.index) + " has committed " +
                  std::to_string(other.accumulations.committed) + " groups, this one " +
                  std::to_string(own.committed));
    }
    product.registers[static_cast<size_t>(t)] = other.product.accumulators;
    if (operands.a_registers != nullptr) {
      product.a_registers.push_back(find_operand(other.accumulations, theirs.a_registers)->value);
    }
  }
  touch_tiles(group, operands, 2 * words, number, place);
  group.products.push_back(std::move(product));
  while (!group.products.empty() && machine.random().below(4) == 0) multiply_next(group);
  release_warpgroup(thread);
}

void warpgroup_commit() {
  meet(Wait::kCommit, __builtin_return_address(0));
  ++Machine::get().running().accumulations.committed;
}

void warpgroup_wait(int pending) {
  Machine& machine = Machine::get();
  Thread& thread = machine.running();
  const void* place = __builtin_return_address(0);
  meet(Wait::kProductWait, place);
  Accumulations& own = thread.accumulations;
  const int64_t covered = static_cast<int64_t>(own.committed) - pending;
  if (covered <= own.waited) return;
  own.waited = static_cast<uint32_t>(covered);
  Warpgroup& group = *thread.warpgroup;
  while (!group.products.empty() && group.products.front().group <= own.waited) {
    multiply_next(group);
  }
  for (size_t i = 0; i < own.under_way.size();) {
    Accumulation& running = own.under_way[i];
    if (running.group > own.waited) {
      ++i;
      continue;
    }
    for (size_t w = 0; w < running.value.size(); ++w) {
      uint32_t bits;
      std::memcpy(&bits, running.registers + w, sizeof(bits));
      if (bits != kPoison) {
        fail_at("waits for a product", place,
                "its accumulators have been written while it was under way");
      }
    }
    std::copy(running.value.begin(), running.value.end(), running.registers);
    note_result(own, running);
    own.not_held.push_back(running.registers);
    own.under_way.erase(own.under_way.begin() + static_cast<std::ptrdiff_t>(i));
  }
  for (size_t i = 0; i < own.operands.size();) {
    const Accumulations::Operand& left = own.operands[i];
    if (left.group > own.waited) {
      ++i;
      continue;
    }
    for (uint32_t word = 0; word < left.value.size(); ++word) {
      if (left.registers[word] != kPoison) {
        fail_at("waits for a product", place,
                "its left operands have been written while it was under way");
      }
      left.registers[word] = left.value[word];
    }
    own.not_held.push_back(left.registers);
    own.operands.erase(own.operands.begin() + static_cast<std::ptrdiff_t>(i));
  }
  thread.clock.at(Kind::kProduct) = own.waited;
}

void set_registers(int registers, bool raise) {
  Machine& machine = Machine::get();
  Thread& thread = machine.running();
  const void* place = __builtin_return_address(0);
  if (!gather_warpgroup(Wait::kRegisters, registers * 2 + (raise ? 1 : 0), place)) return;
  Warpgroup& group = *thread.warpgroup;
  Block& block = *thread.block;
  const std::string act = std::string(raise ? "raises" : "lowers") + " its registers from " +
                          std::to_string(group.registers) + " to " + std::to_string(registers);
  if (raise ? registers < group.registers : registers > group.registers) {
    fail_at(act, place,
            raise ? "raise_registers does not lower" : "lower_registers does not raise");
  }
  const int more = (registers - group.registers) * kWarpgroupThreads;
  while (block.free_registers < more) {
    block.want_registers.push_back(&thread);
    machine.wait(Wait::kRegisters, place, registers);
  }
  block.free_registers -= more;
  group.registers = registers;
  for (Thread* waiting : block.want_registers) machine.wake(*waiting);
  block.want_registers.clear();
  release_warpgroup(thread);
}

}  // namespace bertkern::emulator
