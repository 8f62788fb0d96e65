// Global memory: the bytes of the tensors that a call was given.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine/shadow.h"

namespace bertkern::emulator {

class Regions {
 public:
  // The elements of a tensor: sizes and strides (in elements) of its dimensions. Bytes between them
  // are not memory that kernels may touch.
  void add(uintptr_t address, const std::vector<int64_t>& sizes,
           const std::vector<int64_t>& strides, int element_bytes, bool initialised,
           const std::string& name);
  void rename(uintptr_t address, const std::string& name);
  void clear();

  // Accesses before this are of other grids, and over.
  void start_grid();

  // The cell of an address; null where no tensor is near.
  Cell* find(uintptr_t address) {
    const uintptr_t page = address / kPageBytes;
    const Recent& recent = recent_[page % kRecent];
    Page* found = recent.page == page ? recent.cells : look_up(page);
    if (found == nullptr) return nullptr;
    if (found->grid != grid_) forget_accesses(*found);
    return &found->cells[address % kPageBytes / kCellBytes];
  }

  // "q + 0x40", or how far from which tensor.
  std::string describe(uintptr_t address) const;

 private:
  static constexpr uintptr_t kPageBytes = 4096;
  static constexpr size_t kRecent = 64;
  struct Page {
    uint64_t grid = 0;
    Cell cells[kPageBytes / kCellBytes];
  };
  struct Recent {
    uintptr_t page = 0;
    Page* cells = nullptr;
  };
  struct Tensor {
    uintptr_t first, end;
    std::string name;
  };

  Page* look_up(uintptr_t page);
  void forget_accesses(Page& page) const;
  void mark(uintptr_t first, uintptr_t end, bool initialised);

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  Recent recent_[kRecent];
  std::vector<Tensor> tensors_;
  uint64_t grid_ = 0;
};

}  // namespace bertkern::emulator
