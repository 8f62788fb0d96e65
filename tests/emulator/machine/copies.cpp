#include "machine/copies.h"

#include <algorithm>
#include <cstring>

namespace bertkern::emulator {
namespace {

// A second time changes nothing: who touches these bytes before the wait is in a race.
void land(const Copy& copy) { std::memcpy(copy.to, &copy.value, sizeof(copy.value)); }

}  // namespace

uint32_t Copies::wait(int pending_groups) {
  const int64_t covered = static_cast<int64_t>(committed_) - pending_groups;
  if (covered <= waited_) return waited_;
  waited_ = static_cast<uint32_t>(covered);
  const auto late = std::partition(under_way_.begin(), under_way_.end(),
                                   [&](const Copy& copy) { return copy.group > waited_; });
  std::for_each(late, under_way_.end(), &land);
  under_way_.erase(late, under_way_.end());
  return waited_;
}

void Copies::land_some(Random& random) {
  uint64_t bits = 0;
  for (size_t i = 0; i < under_way_.size(); ++i) {
    if (i % 64 == 0) bits = random.bits();
    if ((bits >> i % 64 & 1) != 0) land(under_way_[i]);
  }
}

void Copies::clear() {
  under_way_.clear();
  committed_ = waited_ = 0;
}

}  // namespace bertkern::emulator
