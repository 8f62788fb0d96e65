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

// What a thread did itself, into the components of its cluster or warp, which begin at `first`.
template <typename Into>
void raise_own(Into& into, const Clock& clock, size_t first) {
  for (int k = 0; k < kKinds; ++k) {
    const auto kind = static_cast<Kind>(k);
    const int whose = kind == Kind::kProduct ? clock.first_lane() : clock.thread;
    uint32_t& known = into[static_cast<size_t>(component(whose, kind)) - first];
    known = std::max(known, clock.at(kind));
  }
}

ClusterClock together(const ClusterClock& a, const ClusterClock& b) {
  Vector both = *a;
  raise(both, *b, 0);
  return std::make_shared<const Vector>(std::move(both));
}

}  // namespace

Beyond together(const Beyond& a, const Beyond& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  auto both = std::make_shared<std::map<uint32_t, ClusterClock>>(*a);
  for (const auto& [cluster, known] : *b) {
    ClusterClock& before = (*both)[cluster];
    before = before == nullptr || before == known ? known : together(before, known);
  }
  return both;
}

void Gathering::start(size_t components) {
  components_.assign(components, 0);
  beyond_.reset();
  last_cluster_.reset();
  last_warp_.reset();
}

void Gathering::add(Clock& clock) {
  if (clock.cluster != last_cluster_) {
    raise(components_, *clock.cluster, 0);
    last_cluster_ = clock.cluster;
  }
  if (clock.warp != nullptr && clock.warp != last_warp_) {
    raise(components_, *clock.warp, static_cast<size_t>(clock.first_lane()) * kKinds);
    last_warp_ = clock.warp;
  }
  if (clock.beyond != beyond_) beyond_ = together(beyond_, clock.beyond);
  raise_own(components_, clock, 0);
  ++clock.at(Kind::kOwn);
}

Knowledge Gathering::look() { return {std::make_shared<const Vector>(components_), beyond_}; }

Knowledge Gathering::take() {
  Knowledge taken = look();
  start(components_.size());
  return taken;
}

void learn(Clock& clock, const Knowledge& knowledge, Learned& learned) {
  clock.beyond = together(clock.beyond, knowledge.beyond);
  if (knowledge.cluster == nullptr || clock.cluster == knowledge.cluster) return;
  for (const auto& [before, after] : learned) {
    if (before == clock.cluster) {
      clock.cluster = after;
      return;
    }
  }
  const ClusterClock before = clock.cluster;
  clock.cluster = together(before, knowledge.cluster);
  learned.emplace_back(before, clock.cluster);
}

void join_warp(const std::array<Clock*, kWarpThreads>& clocks) {
  std::array<uint32_t, kWarpComponents> known = {};
  WarpClock last_warp;
  bool same_cluster = true;
  Beyond beyond = clocks[0]->beyond;
  for (Clock* clock : clocks) {
    if (clock->warp != nullptr && clock->warp != last_warp) {
      raise(known, *clock->warp, 0);
      last_warp = clock->warp;
    }
    same_cluster = same_cluster && clock->cluster == clocks[0]->cluster;
    beyond = together(beyond, clock->beyond);
  }
  ClusterClock cluster = clocks[0]->cluster;
  if (!same_cluster) {
    Vector together = *cluster;
    ClusterClock last = cluster;
    for (Clock* clock : clocks) {
      if (clock->cluster == last) continue;
      raise(together, *clock->cluster, 0);
      last = clock->cluster;
    }
    cluster = std::make_shared<const Vector>(std::move(together));
  }
  for (Clock* clock : clocks) {
    raise_own(known, *clock, static_cast<size_t>(clocks[0]->first_lane()) * kKinds);
    ++clock->at(Kind::kOwn);
  }
  const auto warp = std::make_shared<const std::array<uint32_t, kWarpComponents>>(known);
  for (Clock* clock : clocks) {
    clock->cluster = cluster;
    clock->beyond = beyond;
    clock->warp = warp;
  }
}

}  // namespace bertkern::emulator
