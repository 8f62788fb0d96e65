#include "machine/regions.h"

#include <algorithm>
#include <cstdio>

namespace bertkern::emulator {
namespace {

std::string hexadecimal(uintptr_t value) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

void Regions::add(uintptr_t address, const std::vector<int64_t>& sizes,
                  const std::vector<int64_t>& strides, int element_bytes, bool initialised,
                  const std::string& name) {
  // Strides may be 0 or in any order; dimensions inside which memory is dense become one run.
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // (stride, size)
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return;
    if (sizes[i] > 1 && strides[i] != 0) dimensions.emplace_back(strides[i], sizes[i]);
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t run = 1;
  size_t outer = 0;
  while (outer < dimensions.size() && dimensions[outer].first <= run) {
    run += dimensions[outer].first * (dimensions[outer].second - 1);
    ++outer;
  }
  std::vector<int64_t> index(dimensions.size(), 0);
  uintptr_t end = address;
  for (;;) {
    int64_t offset = 0;
    for (size_t i = outer; i < dimensions.size(); ++i) offset += index[i] * dimensions[i].first;
    const uintptr_t first = address + offset * element_bytes;
    mark(first, first + run * element_bytes, initialised);
    end = std::max(end, first + run * element_bytes);
    size_t i = outer;
    while (i < dimensions.size() && ++index[i] == dimensions[i].second) index[i++] = 0;
    if (i == dimensions.size()) break;
  }
  tensors_.push_back({address, end, name});
}

void Regions::rename(uintptr_t address, const std::string& name) {
  for (Tensor& tensor : tensors_) {
    if (tensor.first == address) tensor.name = name;
  }
}

void Regions::clear() {
  pages_.clear();
  tensors_.clear();
  std::fill(std::begin(recent_), std::end(recent_), Recent{});
}

void Regions::start_grid() { ++grid_; }

Regions::Page* Regions::look_up(uintptr_t page) {
  const auto found = pages_.find(page);
  if (found == pages_.end()) return nullptr;
  recent_[page % kRecent] = {page, found->second.get()};
  return found->second.get();
}

void Regions::forget_accesses(Page& page) const {
  for (Cell& cell : page.cells) cell.writes = cell.reads = {};
  page.grid = grid_;
}

void Regions::mark(uintptr_t first, uintptr_t end, bool initialised) {
  for (uintptr_t at = first; at < end;) {
    std::unique_ptr<Page>& page = pages_[at / kPageBytes];
    if (page == nullptr) page = std::make_unique<Page>();
    for (const uintptr_t page_end = (at / kPageBytes + 1) * kPageBytes;
         at < std::min(end, page_end);) {
      Cell& cell = page->cells[at % kPageBytes / kCellBytes];
      const uintptr_t cell_end = std::min(end, (at / kCellBytes + 1) * kCellBytes);
      const auto mask = static_cast<uint16_t>(((1u << (cell_end - at)) - 1) << at % kCellBytes);
      cell.valid |= mask;
      cell.written =
          static_cast<uint16_t>(initialised ? cell.written | mask : cell.written & ~mask);
      at = cell_end;
    }
  }
}

std::string Regions::describe(uintptr_t address) const {
  const Tensor* nearest = nullptr;
  uintptr_t distance = 0;
  for (const Tensor& tensor : tensors_) {
    if (address >= tensor.first && address < tensor.end) {
      return tensor.name + " + " + std::to_string(address - tensor.first);
    }
    const uintptr_t away = address < tensor.first ? tensor.first - address : address - tensor.end;
    if (nearest == nullptr || away < distance) {
      nearest = &tensor;
      distance = away;
    }
  }
  if (address == 0) return "null";
  constexpr uintptr_t kNear = 1 << 20;
  const std::string text = "address " + hexadecimal(address);
  if (nearest == nullptr || distance > kNear) return text + ", far from every tensor";
  return text + ", " + std::to_string(distance) + " bytes " +
         (address < nearest->first ? "before " : "behind the end of ") + nearest->name;
}

}  // namespace bertkern::emulator
