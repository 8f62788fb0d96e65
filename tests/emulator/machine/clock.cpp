#include "machine/clock.h"

#include <algorithm>

namespace bertkern::emulator {
namespace {

template <typename Into, typename From>
void raise(Into& into, const From& from, size_t first) {
  for (size_t i = 0; i < from.size(); ++i) {
    into[first + i] = std::max(into[first + i], from[i]);
  }
}

}  // namespace

void Gathering::start(int threads) {
  components_.assign(static_cast<size_t>(threads) * kKinds, 0);
  last_block_.reset();
  last_warp_.reset();
}

void Gathering::add(Clock& clock) {
  if (clock.block != last_block_) {
    raise(components_, *clock.block, 0);
    last_block_ = clock.block;
  }
  if (clock.warp != nullptr && clock.warp != last_warp_) {
    raise(components_, *clock.warp, clock.thread / kWarpThreads * kWarpComponents);
    last_warp_ = clock.warp;
  }
  components_[component(clock.thread, Kind::kOwn)] = clock.now++;
  components_[component(clock.thread, Kind::kCopy)] = clock.copied;
}

BlockClock Gathering::take() {
  auto taken = std::make_shared<const std::vector<uint32_t>>(components_);
  start(static_cast<int>(components_.size()) / kKinds);
  return taken;
}

void join_warp(const std::array<Clock*, kWarpThreads>& clocks) {
  std::array<uint32_t, kWarpComponents> known = {};
  WarpClock last_warp;
  bool same_block = true;
  for (Clock* clock : clocks) {
    if (clock->warp != nullptr && clock->warp != last_warp) {
      raise(known, *clock->warp, 0);
      last_warp = clock->warp;
    }
    same_block = same_block && clock->block == clocks[0]->block;
  }
  BlockClock block = clocks[0]->block;
  if (!same_block) {
    std::vector<uint32_t> together = *block;
    BlockClock last_block = block;
    for (Clock* clock : clocks) {
      if (clock->block == last_block) continue;
      raise(together, *clock->block, 0);
      last_block = clock->block;
    }
    block = std::make_shared<const std::vector<uint32_t>>(std::move(together));
  }
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    known[component(lane, Kind::kOwn)] = clocks[lane]->now++;
    known[component(lane, Kind::kCopy)] = clocks[lane]->copied;
  }
  const auto warp = std::make_shared<const std::array<uint32_t, kWarpComponents>>(known);
  for (Clock* clock : clocks) {
    clock->block = block;
    clock->warp = warp;
  }
}

}  // namespace bertkern::emulator
