// What a thread knows to have happened: vector clocks (Fidge 1988, Mattern 1989) in the form that
// barriers make cheap.
//
// Those who can reach each other's shared memory, the threads of a cluster (of a block, where there
// are no clusters), have one vector. A thread has several components in it, one for each kind of
// what it does: see Kind. Behind them stand those of the mbarriers, whose times are phases. The
// vector is shared by those that left the same barrier; barriers of a warp add one for the warp
// alone. Of other clusters a thread knows what a release and an acquire in global memory told it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "machine/machine.h"

namespace bertkern::emulator {

enum class Kind : int {
  // Times of accesses.
  kOwn,           // plain loads and stores: in order
  kCopy,          // cp.async, by groups: in order only behind a wait
  kStoreRead,     // what stores of the copy engine read, by groups
  kStoreWritten,  // what they write
  kProduct,       // what wgmma reads, by groups; of the warp, so its first lane's
  // Up to which time the asynchronous proxy sees the thread's accesses.
  kFenced,      // kOwn, in its block's shared memory
  kFencedAll,   // kOwn, in all memory
  kFencedCopy,  // kCopy
};
constexpr int kKinds = 8;
constexpr int kWarpComponents = kWarpThreads * kKinds;
constexpr int kBarriersOfBlock = 64;  // mbarriers, for their components

// Components of a thread are neighbours, so that those of a warp are, too.
constexpr int component(int thread, Kind kind) { return thread * kKinds + static_cast<int>(kind); }

using Vector = std::vector<uint32_t>;
using ClusterClock = std::shared_ptr<const Vector>;
using WarpClock = std::shared_ptr<const std::array<uint32_t, kWarpComponents>>;
using Beyond =
    std::shared_ptr<const std::map<uint32_t, ClusterClock>>;  // by cluster; null: nothing

// What can be handed on.
struct Knowledge {
  ClusterClock cluster;
  Beyond beyond;
};

struct Clock {
  int thread = 0;   // whose it is, in the cluster
  int threads = 0;  // of the cluster
  std::array<uint32_t, kKinds> own = {};
  ClusterClock cluster;
  Beyond beyond;
  WarpClock warp;  // null: nothing newer than `cluster`

  void start(int thread_in_cluster, int cluster_threads, const ClusterClock& nothing) {
    thread = thread_in_cluster;
    threads = cluster_threads;
    own = {};
    at(Kind::kOwn) = 1;
    cluster = nothing;
    beyond.reset();
    warp.reset();
  }

  uint32_t& at(Kind kind) { return own[static_cast<size_t>(kind)]; }
  uint32_t at(Kind kind) const { return own[static_cast<size_t>(kind)]; }
  uint32_t now() const { return at(Kind::kOwn); }

  // What this thread did until now comes before asynchronous accesses, once they know of it.
  void fence(bool all_memory) {
    at(Kind::kFenced) = now();
    if (all_memory) at(Kind::kFencedAll) = now();
    at(Kind::kFencedCopy) = at(Kind::kCopy);
    ++at(Kind::kOwn);
  }

  // Whether the time of a component is before now, for what others have told this thread.
  bool was_told(int of, uint32_t time) const {
    if (time <= (*cluster)[static_cast<size_t>(of)]) return true;
    return warp != nullptr && of / kWarpComponents == thread / kWarpThreads &&
           of < threads * kKinds && time <= (*warp)[static_cast<size_t>(of % kWarpComponents)];
  }

  // And for what it did itself.
  bool knows(int of, uint32_t time) const {
    const bool own_access = of / kKinds == thread;
    if (own_access && of % kKinds == static_cast<int>(Kind::kOwn)) return true;
    if (own_access && time <= own[static_cast<size_t>(of % kKinds)]) return true;
    if (of % kKinds == static_cast<int>(Kind::kProduct) && of / kKinds == first_lane() &&
        time <= at(Kind::kProduct)) {
      return true;
    }
    return was_told(of, time);
  }

  int first_lane() const { return thread / kWarpThreads * kWarpThreads; }
};

// The component that says how far the asynchronous proxy sees another one: for accesses that are
// asynchronous themselves, that one.
inline int seen_by_engine(int of, bool all_memory, int threads) {
  if (of >= threads * kKinds) return of;
  const auto kind = static_cast<Kind>(of % kKinds);
  if (kind == Kind::kOwn) {
    return component(of / kKinds, all_memory ? Kind::kFencedAll : Kind::kFenced);
  }
  return kind == Kind::kCopy ? component(of / kKinds, Kind::kFencedCopy) : of;
}

// What those who come to a barrier know together.
class Gathering {
 public:
  void start(size_t components);
  void add(Clock& clock);  // and what the thread does from now on is later
  void set(size_t component, uint32_t time) { components_[component] = time; }
  Knowledge look();
  Knowledge take();  // and starts anew

 private:
  Vector components_;
  Beyond beyond_;
  ClusterClock last_cluster_;
  WarpClock last_warp_;
};

// Both of two.
Beyond together(const Beyond& a, const Beyond& b);

// A thread learns. Those that knew the same before know the same vector afterwards: `learned` keeps
// the joins of one piece of knowledge.
using Learned = std::vector<std::pair<ClusterClock, ClusterClock>>;
void learn(Clock& clock, const Knowledge& knowledge, Learned& learned);

// The lanes of a warp tell each other all they know.
void join_warp(const std::array<Clock*, kWarpThreads>& clocks);

}  // namespace bertkern::emulator
