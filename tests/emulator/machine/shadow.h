// What is known of memory, in cells of 16 bytes: which bytes are there, which have been written,
// and the accesses that a later one could race with.
//
// Two accesses race when they touch a common byte, one of them writes, and neither knows of the
// other. An access is forgotten when a later one knows of it, covers its bytes and writes if it
// does: whatever races with the first then races with the second, too.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "machine/clock.h"

namespace bertkern::emulator {

constexpr int kCellBytes = 16;
constexpr uint32_t kWholeCell = 0xFFFF;

struct Access {
  uint32_t block;      // of the grid
  uint32_t time;       // of the component
  uint16_t component;  // of the block's clocks
  uint16_t mask;       // bytes of the cell
  uint32_t place;      // see place_of
};

struct Accesses {
  Access* first = nullptr;
  uint32_t count = 0, room = 0;
};

struct Cell {
  Accesses writes, reads;
  uint16_t valid = 0, written = 0;  // masks of bytes
};

// Memory of Accesses: handed out piece by piece, taken back all at once between grids.
class Pool {
 public:
  Access* take(uint32_t count);
  void reset();

 private:
  static constexpr size_t kChunk = 1 << 14;
  std::vector<std::unique_ptr<Access[]>> chunks_;
  std::vector<std::unique_ptr<Access[]>> large_;
  size_t next_ = 0, used_ = kChunk;  // chunks in use, entries of the last one
};

struct Race {
  Access earlier;
  bool wrote;
};

// Remembers an access of the thread that `clock` belongs to; returns what it races with, if at all.
std::optional<Race> touch(Cell& cell, const Access& access, bool write, const Clock& clock,
                          Pool& pool);

}  // namespace bertkern::emulator
