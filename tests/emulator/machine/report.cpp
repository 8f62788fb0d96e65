// What errors say: which threads, where, waiting for what.
#include <map>
#include <string>
#include <tuple>

#include "machine/places.h"
#include "machine/threads.h"

namespace bertkern::emulator {

const char* name_of(Wait wait) {
  switch (wait) {
    case Wait::kNothing:
      return "nothing";
    case Wait::kBlockBarrier:
      return "block_barrier";
    case Wait::kNamedBarrier:
      return "named_barrier_sync";
    case Wait::kWarpBarrier:
      return "warp_barrier";
    case Wait::kShuffleXor:
      return "shuffle_xor";
    case Wait::kShuffleIndex:
      return "shuffle_index";
    case Wait::kVoteAny:
      return "vote_any";
    case Wait::kLoadMatrix:
      return "load_matrix";
    case Wait::kMma:
      return "mma_16x8x16";
    case Wait::kStoreMatrix:
      return "store_matrix";
    case Wait::kElectOne:
      return "elect_one";
    case Wait::kPhase:
      return "barrier_wait";
    case Wait::kCluster:
      return "cluster_wait";
    case Wait::kProduct:
      return "wgmma";
    case Wait::kCommit:
      return "wgmma_commit";
    case Wait::kProductWait:
      return "wgmma_wait";
    case Wait::kRegisters:
      return "raise_registers or lower_registers";
    case Wait::kSpin:
      return "a loop that waits for a change";
    case Wait::kEnded:
      return "its end";
  }
  return "";
}

std::string name_of(const Thread& thread) {
  return "thread " + std::to_string(thread.index) + " of block " +
         std::to_string(thread.block->index);
}

// "threads 0-31, 40": ascending indices of one block.
std::string name_of(const std::vector<const Thread*>& threads) {
  std::string text = threads.size() == 1 ? "thread " : "threads ";
  for (size_t first = 0; first < threads.size();) {
    size_t last = first;
    while (last + 1 < threads.size() && threads[last + 1]->index == threads[last]->index + 1) {
      ++last;
    }
    if (first != 0) text += ", ";
    text += std::to_string(threads[first]->index);
    if (last != first) text += "-" + std::to_string(threads[last]->index);
    first = last + 1;
  }
  return text + " of block " + std::to_string(threads.front()->block->index);
}

// As the running thread sees it.
std::string Machine::describe(uintptr_t address) const {
  const auto bytes = static_cast<uintptr_t>(grid_.shared_bytes);
  if (address - reinterpret_cast<uintptr_t>(shared_) < shared_bytes_) {
    for (const Block& block : blocks_) {
      const bool other = &block != running_->block;
      if (other && address - reinterpret_cast<uintptr_t>(block.shared) < bytes) {
        return "shared memory of another block";
      }
    }
    const auto offset =
        static_cast<intptr_t>(address - reinterpret_cast<uintptr_t>(running_->block->shared));
    if (offset < 0) return "shared memory - " + std::to_string(-offset);
    return "shared memory + " + std::to_string(offset) + " of " + std::to_string(bytes);
  }
  for (const Block& block : blocks_) {
    for (const Thread& thread : block.threads) {
      if (address - reinterpret_cast<uintptr_t>(thread.stack) < Stacks::kBytes) {
        return "a local variable of another thread";
      }
    }
  }
  return regions_.describe(address);
}

// Nobody can run: who waits for what.
std::string Machine::stuck() const {
  using Group = std::tuple<int, Wait, int, const void*>;
  std::map<Group, std::vector<const Thread*>> groups;
  for (const Block& block : blocks_) {
    if (!block.cluster->running) continue;
    for (const Thread& thread : block.threads) {
      const bool ended = thread.wait == Wait::kEnded;
      groups[{block.index, thread.wait, ended ? 0 : thread.detail, ended ? nullptr : thread.place}]
          .push_back(&thread);
    }
  }
  std::string text = "threads wait for ever";
  for (const auto& [group, threads] : groups) {
    const auto& [block, wait, detail, place] = group;
    text += "\n  " + name_of(threads);
    if (wait == Wait::kEnded) {
      text += threads.size() == 1 ? " has ended" : " have ended";
      continue;
    }
    text += std::string(threads.size() == 1 ? " waits" : " wait") + " at " + name_of(wait);
    if (wait == Wait::kNamedBarrier) text += " " + std::to_string(detail);
    if (wait == Wait::kPhase) text += " of parity " + std::to_string(detail);
    text += ", " + where(place_of(place));
  }
  return text;
}

}  // namespace bertkern::emulator
