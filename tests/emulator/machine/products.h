// Products of a warpgroup that are under way (wgmma).
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <vector>

#include "machine/clock.h"
#include "machine/machine.h"

namespace bertkern::emulator {

struct Thread;
struct Warpgroup;

constexpr int kWarpgroupThreads = 4 * kWarpThreads;

// Accumulators of one thread that products are adding to.
struct Accumulation {
  float* registers;
  std::vector<float> value;  // what the products before have made of them
  uint32_t group;            // of the newest product
};

// Registers as they were at a fence, or as a product left them.
struct FencedRegisters {
  const uint32_t* registers;
  std::vector<uint32_t> value;
};

// Of one thread. In its registers is NaN until the wait, in those of left operands, too.
struct Accumulations {
  std::vector<Accumulation> under_way;
  std::vector<FencedRegisters> fenced;
  struct Operand {
    uint32_t* registers;
    std::array<uint32_t, 4> value;
    uint32_t group;
  };
  std::vector<Operand> operands;
  std::vector<const void*> not_held;  // registers of products that are over, before a wait has them
  uint32_t committed = 0, waited = 0;
  uint32_t place = 0;  // of the newest product
  void clear() { *this = {}; }
};

// What a thread brings to a product.
struct Brought {
  WarpgroupOperands operands;
  float* accumulators;
};

struct Product {
  WarpgroupOperands operands;
  int words;  // accumulators of a thread
  uint32_t group;
  std::vector<std::array<uint32_t, 4>> a_registers;  // by thread; empty: from a tile
  std::array<float*, kWarpgroupThreads> registers;   // the accumulators'
};

// In their order; the first that are done have left.
using Products = std::deque<Product>;

// Does the oldest product of a warpgroup.
void multiply_next(Warpgroup& warpgroup);

}  // namespace bertkern::emulator
