// What a warp does together: barriers, shuffles, votes, ldmatrix, mma.
#include <array>
#include <cstring>
#include <string>

#include "machine/number.h"
#include "machine/places.h"
#include "machine/threads.h"
#include "machine/watch.h"

namespace bertkern::emulator {
namespace {

// The running lane comes to something that takes all lanes of its warp. True for the last one: it
// does the work for all, then calls release. The others return false once that is done.
bool gather(Wait wait, int option, const void* place) {
  Machine& machine = Machine::get();
  Thread& thread = machine.running();
  Warp& warp = *thread.warp;
  thread.place = place;
  if (warp.arrived == 0) {
    warp.wait = wait;
    warp.option = option;
  } else if (warp.wait != wait || warp.option != option) {
    const Thread& other = warp.lanes[__builtin_ctz(warp.arrived)];
    const char* same = warp.wait == wait ? " of another kind" : "";
    machine.fail("a warp has parted: " + name_of(thread) + " is at " + name_of(wait) + ", " +
                 where(place_of(place)) + ", where " + name_of(other) + " waits at " +
                 name_of(warp.wait) + same + ", " + where(place_of(other.place)));
  }
  warp.arrived |= 1u << thread.lane;
  if (warp.arrived == kAllLanes) return true;
  machine.wait(wait, place);
  return false;
}

void release(Thread& last) {
  last.warp->arrived = 0;
  Machine::get().wake(*last.warp, kAllLanes & ~(1u << last.lane));
}

uint32_t shuffle(Wait wait, uint32_t value, int lane, const void* place) {
  Thread& thread = Machine::get().running();
  thread.words.word[0] = value;
  thread.words.word[1] = static_cast<uint32_t>(lane);
  if (gather(wait, 0, place)) {
    Thread* lanes = thread.warp->lanes;
    for (int i = 0; i < kWarpThreads; ++i) {
      lanes[i].words.word[2] = lanes[lanes[i].words.word[1]].words.word[0];
    }
    release(thread);
  }
  return thread.words.word[2];
}

// The 16 x 16 of a, the 16 x 8 of b and the 16 x 8 of d as matrices; see ptx/mma.cuh for who holds
// what. Products are exact in fp32; they are added one after the other, which is neither better nor
// worse than the order and the roundings of tensor cores, that no specification gives.
void multiply(Thread* lanes, float (*decode)(uint16_t)) {
  float a[16][16], b[16][8], d[16][8];
  const auto low = [&](uint32_t word) { return decode(static_cast<uint16_t>(word)); };
  const auto high = [&](uint32_t word) { return decode(static_cast<uint16_t>(word >> 16)); };
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const Thread& thread = lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = thread.words.word[i];
      const int row = g + 8 * (i % 2), k = 2 * t + 8 * (i / 2);
      a[row][k] = low(word);
      a[row][k + 1] = high(word);
      d[g + 8 * (i / 2)][2 * t + i % 2] = thread.sum.value[i];
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = thread.more_words.word[i];
      b[2 * t + 8 * i][g] = low(word);
      b[2 * t + 8 * i + 1][g] = high(word);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      lanes[lane].sum.value[i] = d[g + 8 * (i / 2)][2 * t + i % 2];
    }
  }
}

}  // namespace

void warp_barrier() {
  Thread& thread = Machine::get().running();
  if (!gather(Wait::kWarpBarrier, 0, __builtin_return_address(0))) return;
  std::array<Clock*, kWarpThreads> clocks;
  for (int i = 0; i < kWarpThreads; ++i) clocks[i] = &thread.warp->lanes[i].clock;
  join_warp(clocks);
  release(thread);
}

uint32_t shuffle_xor(uint32_t value, int mask) {
  Machine& machine = Machine::get();
  const void* place = __builtin_return_address(0);
  if (mask < 1 || mask >= kWarpThreads) {
    machine.fail("shuffle_xor with the mask " + std::to_string(mask) + " at " +
                 where(place_of(place)) + "; allowed are 1 to 31");
  }
  return shuffle(Wait::kShuffleXor, value, machine.running().lane ^ mask, place);
}

uint32_t shuffle_index(uint32_t value, int lane) {
  const void* place = __builtin_return_address(0);
  if (lane < 0 || lane >= kWarpThreads) {
    Machine::get().fail("shuffle_index from lane " + std::to_string(lane) + " at " +
                        where(place_of(place)) + "; allowed are 0 to 31");
  }
  return shuffle(Wait::kShuffleIndex, value, lane, place);
}

bool vote_any(bool predicate) {
  Thread& thread = Machine::get().running();
  thread.words.word[0] = predicate ? 1 : 0;
  if (gather(Wait::kVoteAny, 0, __builtin_return_address(0))) {
    Thread* lanes = thread.warp->lanes;
    uint32_t any = 0;
    for (int i = 0; i < kWarpThreads; ++i) any |= lanes[i].words.word[0];
    for (int i = 0; i < kWarpThreads; ++i) lanes[i].words.word[2] = any;
    release(thread);
  }
  return thread.words.word[2] != 0;
}

Words4 load_matrix(const void* row, int matrices, bool transposed) {
  Thread& thread = Machine::get().running();
  const void* place = __builtin_return_address(0);
  thread.address = row;
  if (thread.lane < 8 * matrices) {
    touch_shared_16(row, own_act(false, place));
  }
  if (gather(Wait::kLoadMatrix, 2 * matrices + (transposed ? 1 : 0), place)) {
    Thread* lanes = thread.warp->lanes;
    for (int m = 0; m < matrices; ++m) {
      uint16_t element[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(element[r], lanes[8 * m + r].address, 16);
      for (int lane = 0; lane < kWarpThreads; ++lane) {
        const int g = lane / 4, t = 2 * (lane % 4);
        const uint16_t first = transposed ? element[t][g] : element[g][t];
        const uint16_t second = transposed ? element[t + 1][g] : element[g][t + 1];
        lanes[lane].words.word[m] = static_cast<uint32_t>(second) << 16 | first;
      }
    }
    release(thread);
  }
  return thread.words;
}

void store_matrix(void* row, Words4 words, bool transposed) {
  Thread& thread = Machine::get().running();
  const void* place = __builtin_return_address(0);
  thread.address = row;
  thread.words = words;
  touch_shared_16(row, own_act(true, place));
  if (!gather(Wait::kStoreMatrix, transposed ? 1 : 0, place)) return;
  Thread* lanes = thread.warp->lanes;
  for (int m = 0; m < 4; ++m) {
    uint16_t element[8][8];
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint32_t word = lanes[lane].words.word[m];
      (transposed ? element[t][g] : element[g][t]) = static_cast<uint16_t>(word);
      (transposed ? element[t + 1][g] : element[g][t + 1]) = static_cast<uint16_t>(word >> 16);
    }
    for (int r = 0; r < 8; ++r) {
      std::memcpy(const_cast<void*>(lanes[8 * m + r].address), element[r], 16);
    }
  }
  release(thread);
}

bool elect_one() {
  Thread& thread = Machine::get().running();
  if (gather(Wait::kElectOne, 0, __builtin_return_address(0))) {
    Thread* lanes = thread.warp->lanes;
    const uint32_t elected = Machine::get().random().below(kWarpThreads);
    for (uint32_t i = 0; i < kWarpThreads; ++i) lanes[i].words.word[2] = i == elected ? 1 : 0;
    release(thread);
  }
  return thread.words.word[2] != 0;
}

Accumulators mma_16x8x16(Accumulators d, Words4 a, Words2 b, Format format) {
  Thread& thread = Machine::get().running();
  thread.sum = d;
  thread.words = a;
  thread.more_words = b;
  if (gather(Wait::kMma, static_cast<int>(format), __builtin_return_address(0))) {
    if (format == Format::kHalf) {
      multiply(thread.warp->lanes, &float_of_half);
    } else {
      multiply(thread.warp->lanes, &float_of_bfloat16);
    }
    release(thread);
  }
  return thread.sum;
}

}  // namespace bertkern::emulator
