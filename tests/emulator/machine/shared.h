// Shared memory as the numbers that instructions take, and what phases.cpp offers the copy engine.
#pragma once

#include <cstdint>
#include <utility>

namespace bertkern::emulator {

struct Block;
struct PhaseBarrier;

// The first bytes of a block's shared memory are the system's own, as on a device.
constexpr uint32_t kFirstSharedAddress = 1024;

// The block and the offset of an address in the cluster's shared memory. Fails for one that is not
// there or not aligned to its bytes, and where the running thread cannot know that the block of
// another rank has started.
std::pair<Block*, uintptr_t> in_cluster(uint32_t address, int bytes, const char* does,
                                        const void* place);

// The running thread makes eight bytes of its block's shared memory a barrier, or plain bytes
// again.
void touch_barrier(const void* address, bool makes, const void* place);

// A copy starts that counts on the barrier's phase under way.
PhaseBarrier& start_copy(const void* barrier, const void* place);
PhaseBarrier& start_copy(Block& block, uintptr_t offset, const void* place);
PhaseBarrier& start_copy(PhaseBarrier& barrier, const void* place);

}  // namespace bertkern::emulator
