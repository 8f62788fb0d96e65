// The copy engine (TMA): boxes and rows between global and shared memory, stores in groups.
#include "machine/engine.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "common/shared_tile.h"
#include "machine/maps.h"
#include "machine/places.h"
#include "machine/shared.h"
#include "machine/threads.h"
#include "machine/watch.h"

namespace bertkern::emulator {
namespace {

void read(Piece& piece) { std::memcpy(&piece.value, piece.from, static_cast<size_t>(piece.bytes)); }
void write(const Piece& piece) {
  std::memcpy(piece.to, &piece.value, static_cast<size_t>(piece.bytes));
}

Act engine_act(bool write, int component, uint32_t time, const void* place) {
  return {write, component, time, place};
}

// An act of the running thread's current group of stores.
Act store_act(bool write, const void* place) {
  const Thread& thread = Machine::get().running();
  const Kind kind = write ? Kind::kStoreWritten : Kind::kStoreRead;
  return engine_act(write, component(thread.clock.thread, kind), thread.bulk.committed + 1, place);
}

Act load_act(bool write, const PhaseBarrier& barrier, const void* place) {
  return engine_act(write, barrier.component, barrier.phase + 1, place);
}

// Splits bytes so that each part lies in one cell.
template <typename Body>
void for_cells(uintptr_t address, size_t bytes, Body body) {
  for (uintptr_t at = address; at < address + bytes;) {
    const uintptr_t end = std::min(address + bytes, (at / kCellBytes + 1) * kCellBytes);
    body(at, end - at);
    at = end;
  }
}

// A box in shared memory and the elements of the tensor that it covers, by pieces of 16 bytes.
class Box {
 public:
  Box(const void* map, int rank, const BoxPosition& position, const void* shared, const char* does,
      const void* place)
      : map_(read_tensor_map(map, rank, place)), position_(position) {
    Machine& machine = Machine::get();
    Block& block = *machine.running().block;
    offset_ = reinterpret_cast<uintptr_t>(shared) - reinterpret_cast<uintptr_t>(block.shared);
    bytes_ = map_.box[0] * 2;
    for (int i = 1; i < map_.rank; ++i) bytes_ *= map_.box[i];
    const auto refuse = [&](const std::string& what) {
      fail_at(std::string(does) + " a box of " + std::to_string(bytes_) + " bytes at " +
                  machine.describe(reinterpret_cast<uintptr_t>(shared)),
              place, what);
    };
    const auto size = static_cast<uintptr_t>(machine.grid().shared_bytes);
    if (offset_ > size || offset_ + static_cast<uintptr_t>(bytes_) > size) {
      refuse("out of bounds");
    }
    const int alignment = std::max(128, swizzle_alignment(map_.swizzle));
    if (offset_ % static_cast<uintptr_t>(alignment) != 0) {
      refuse("not aligned to " + std::to_string(alignment) + " bytes");
    }
  }

  int bytes() const { return bytes_; }

  // body(bytes of the box in shared memory, elements of the tensor that belong there or null, how
  // many bytes of these are before and after what the tensor has) for each 16 bytes.
  template <typename Body>
  void for_pieces(Body body) const {
    Block& block = *Machine::get().running().block;
    const int row_bytes = map_.box[0] * 2;
    for (int row = 0; row < bytes_ / row_bytes; ++row) {
      int left = row;
      bool inside = true;
      int64_t start = 0;  // of the row, in elements
      for (int i = 1; i < map_.rank; ++i) {
        const int64_t index = position_.at[i] + left % map_.box[i];
        left /= map_.box[i];
        inside = inside && index >= 0 && index < map_.sizes[i];
        start += index * map_.strides[i - 1];
      }
      for (int chunk = 0; chunk < row_bytes; chunk += kCellBytes) {
        const int64_t first = position_.at[0] + chunk / 2;
        const int64_t low = std::clamp<int64_t>(-first, 0, 8);
        const int64_t high = std::clamp<int64_t>(map_.sizes[0] - first, 0, 8);
        const int place =
            swizzled(static_cast<int>(offset_) + row * row_bytes + chunk, map_.swizzle);
        const bool some = inside && low < high;
        const char* elements = map_.data + (start + first) * 2;
        body(block.shared + place, some ? elements : nullptr, static_cast<int>(low) * 2,
             static_cast<int>(high) * 2);
      }
    }
  }

 private:
  const EmulatedMap& map_;
  BoxPosition position_;
  uintptr_t offset_;
  int bytes_;
};

void check_bulk(const char* does, int bytes, uintptr_t first, uintptr_t second, const void* place) {
  if (bytes < 16 || bytes % 16 != 0 || first % 16 != 0 || second % 16 != 0) {
    fail_at(std::string(does) + " " + std::to_string(bytes) + " bytes at " +
                Machine::get().describe(first),
            place, "the number and both addresses must be multiples of 16");
  }
}

}  // namespace

void Engine::step(Random& random) {
  if (under_way_.empty()) return;
  const size_t index = random.below(static_cast<uint32_t>(under_way_.size()));
  Transfer& transfer = *under_way_[index];
  switch (random.below(4)) {
    case 0:  // some of it
      for (Piece& piece : transfer.pieces) {
        if (random.below(2) == 0) continue;
        if (!transfer.read) read(piece);
        write(piece);
      }
      return;
    case 1:
      finish(index);
      return;
    default:
      return;
  }
}

void Engine::finish_one(Random& random) {
  finish(random.below(static_cast<uint32_t>(under_way_.size())));
}

void Engine::finish(size_t index) {
  const std::unique_ptr<Transfer> transfer = std::move(under_way_[index]);
  under_way_[index] = std::move(under_way_.back());
  under_way_.pop_back();
  for (Piece& piece : transfer->pieces) {
    if (!transfer->read) read(piece);
    write(piece);
  }
  if (transfer->barrier != nullptr) count_bytes(*transfer->barrier, transfer->bytes);
}

void Engine::finish(const Thread& thread, uint32_t group, bool reads_only) {
  for (size_t i = 0; i < under_way_.size();) {
    Transfer& transfer = *under_way_[i];
    if (transfer.barrier != nullptr || transfer.thread != &thread || transfer.group > group) {
      ++i;
    } else if (!reads_only) {
      finish(i);
    } else {
      if (!transfer.read) {
        for (Piece& piece : transfer.pieces) read(piece);
      }
      transfer.read = true;
      ++i;
    }
  }
}

void fence_async(bool all_memory) { Machine::get().running().clock.fence(all_memory); }

void check_tensor_map(const void* map) {
  const void* place = __builtin_return_address(0);
  read_tensor_map(map, 0, place);
}

void box_load(void* shared, const void* map, int rank, BoxPosition from, void* barrier_pointer) {
  Machine& machine = Machine::get();
  const void* place = __builtin_return_address(0);
  PhaseBarrier& barrier = start_copy(barrier_pointer, place);
  const Box box(map, rank, from, shared, "loads", place);
  Transfer transfer{{}, &machine.running(), place_of(place), &barrier, box.bytes(), 0, true};
  const Act reads = load_act(false, barrier, place), writes = load_act(true, barrier, place);
  Block& block = *machine.running().block;
  box.for_pieces([&](char* to, const char* elements, int low, int high) {
    Piece piece{to, elements, kCellBytes, {}};
    if (elements != nullptr) {
      for_cells(reinterpret_cast<uintptr_t>(elements) + low, static_cast<size_t>(high - low),
                [&](uintptr_t at, size_t bytes) { touch_engine_global(at, bytes, reads); });
      std::memcpy(reinterpret_cast<char*>(&piece.value) + low, elements + low,
                  static_cast<size_t>(high - low));
    }
    touch_engine_shared(block, reinterpret_cast<uintptr_t>(to), kCellBytes, writes);
    transfer.pieces.push_back(piece);
  });
  machine.engine().start(std::move(transfer));
  machine.yield();
}

void box_store(const void* map, int rank, BoxPosition to, const void* shared) {
  Machine& machine = Machine::get();
  const void* place = __builtin_return_address(0);
  Thread& thread = machine.running();
  const Box box(map, rank, to, shared, "stores", place);
  Transfer transfer{{}, &thread, place_of(place), nullptr, 0, thread.bulk.committed + 1, false};
  const Act reads = store_act(false, place), writes = store_act(true, place);
  box.for_pieces([&](char* from, const char* elements, int low, int high) {
    if (elements == nullptr) return;  // nor is it read
    const auto bytes = static_cast<size_t>(high - low);
    touch_engine_shared(*thread.block, reinterpret_cast<uintptr_t>(from) + low, bytes, reads);
    for_cells(reinterpret_cast<uintptr_t>(elements) + low, bytes,
              [&](uintptr_t at, size_t part) { touch_engine_global(at, part, writes); });
    transfer.pieces.push_back(
        {const_cast<char*>(elements) + low, from + low, static_cast<int>(bytes), {}});
  });
  thread.bulk.last = thread.bulk.committed + 1;
  thread.bulk.place = place_of(place);
  machine.engine().start(std::move(transfer));
  machine.yield();
}

void bulk_load(void* shared, const void* global, int bytes, void* barrier_pointer) {
  Machine& machine = Machine::get();
  const void* place = __builtin_return_address(0);
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  check_bulk("loads", bytes, to, from, place);
  PhaseBarrier& barrier = start_copy(barrier_pointer, place);
  Transfer transfer{{}, &machine.running(), place_of(place), &barrier, bytes, 0, true};
  const Act reads = load_act(false, barrier, place), writes = load_act(true, barrier, place);
  for (int at = 0; at < bytes; at += kCellBytes) {
    touch_engine_global(from + at, kCellBytes, reads);
    touch_engine_shared(*machine.running().block, to + at, kCellBytes, writes);
    Piece piece{
        static_cast<char*>(shared) + at, static_cast<const char*>(global) + at, kCellBytes, {}};
    read(piece);
    transfer.pieces.push_back(piece);
  }
  machine.engine().start(std::move(transfer));
  machine.yield();
}

void bulk_copy_cluster(uint32_t target, const void* shared, int bytes, uint32_t barrier_address) {
  Machine& machine = Machine::get();
  const void* place = __builtin_return_address(0);
  const auto [block, offset] = in_cluster(target, 16, "copies to a row", place);
  const auto from = reinterpret_cast<uintptr_t>(shared);
  check_bulk("copies", bytes, from, offset, place);
  const auto [counts, barrier_offset] =
      in_cluster(barrier_address, sizeof(uint64_t), "counts bytes on a barrier", place);
  if (counts != block) {
    fail_at("copies to rank " + std::to_string(block->rank), place,
            "the bytes count on a barrier of rank " + std::to_string(counts->rank) +
                "; it must be the target's");
  }
  PhaseBarrier& barrier = start_copy(*block, barrier_offset, place);
  Transfer transfer{{}, &machine.running(), place_of(place), &barrier, bytes, 0, false};
  const Act reads = load_act(false, barrier, place), writes = load_act(true, barrier, place);
  for (int at = 0; at < bytes; at += kCellBytes) {
    char* to = block->shared + offset + at;
    touch_engine_shared(*machine.running().block, from + at, kCellBytes, reads);
    touch_engine_shared(*block, reinterpret_cast<uintptr_t>(to), kCellBytes, writes);
    transfer.pieces.push_back({to, static_cast<const char*>(shared) + at, kCellBytes, {}});
  }
  machine.engine().start(std::move(transfer));
  machine.yield();
}

void bulk_commit() { ++Machine::get().running().bulk.committed; }

void bulk_wait(int pending, bool reads_only) {
  Machine& machine = Machine::get();
  Thread& thread = machine.running();
  const int64_t covered = static_cast<int64_t>(thread.bulk.committed) - pending;
  if (covered <= 0) return;
  const auto group = static_cast<uint32_t>(covered);
  machine.engine().finish(thread, group, reads_only);
  uint32_t& read = thread.clock.at(Kind::kStoreRead);
  read = std::max(read, group);
  if (reads_only) return;
  uint32_t& written = thread.clock.at(Kind::kStoreWritten);
  written = std::max(written, group);
}

}  // namespace bertkern::emulator
