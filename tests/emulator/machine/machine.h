// The machine that kernels run on here: what the functions of csrc/ptx and the launch become.
//
// A thread of a kernel is a fiber. This header is what kernels see, and it is all they see: its
// functions are compiled without instrumentation, elsewhere in this folder. Operands travel by
// value in registers, so that the arrays of a kernel do not escape to memory and are not watched.
// Indices are `const` functions: a thread keeps its own however often threads change.
#pragma once

#include <cstdint>

namespace bertkern::emulator {

constexpr int kWarpThreads = 32;

enum class Format : int { kHalf, kBFloat16 };

struct Words2 {
  uint32_t word[2];
};
struct alignas(16) Words4 {
  uint32_t word[4];
};
struct Accumulators {
  float value[4];
};
struct BoxPosition {
  int at[5];  // innermost first
};
// Of a product: the tiles as bits of common/shared_tile.h.
struct WarpgroupOperands {
  uint64_t a_tile, b_tile;
  const uint32_t* a_registers;  // null: a_tile
  bool transpose_a, transpose_b, accumulate;
  Format format;
};

// Where a thread is.
__attribute__((const)) int thread_index();
__attribute__((const)) int block_index();
__attribute__((const)) int block_count();
__attribute__((const)) char* shared_memory();

// What orders memory between threads.
void block_barrier();
void warp_barrier();
void named_barrier_sync(int id, int threads);
void named_barrier_arrive(int id, int threads);

// What a warp does together; none of it orders memory.
uint32_t shuffle_xor(uint32_t value, int mask);
uint32_t shuffle_index(uint32_t value, int lane);
bool vote_any(bool predicate);
Words4 load_matrix(const void* row, int matrices, bool transposed);
Accumulators mma_16x8x16(Accumulators d, Words4 a, Words2 b, Format format);

// Accesses that name their space, and copies that take effect later.
Words4 load_global_16(const void* address);
void store_global_16(void* address, Words4 value);
void copy_async_16(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

// Shared memory as numbers, and that of the blocks of a cluster.
uint32_t shared_address(const void* address);
__attribute__((const)) int cluster_rank();
__attribute__((const)) int cluster_size();
uint32_t cluster_address(const void* shared, int rank);
void cluster_arrive();
void cluster_wait();
Words4 load_cluster(uint32_t address, int bytes);
void store_cluster(uint32_t address, Words4 value, int bytes);

// Barriers of phases in shared memory.
void phase_barrier_init(void* barrier, int arrivals);
void phase_barrier_init_fence();
void phase_barrier_invalidate(void* barrier);
void phase_barrier_arrive(void* barrier, int bytes, bool arrives);
void phase_barrier_arrive_cluster(uint32_t barrier);
bool phase_barrier_try_wait(void* barrier, int parity);
void phase_barrier_wait(void* barrier, int parity, bool cluster);

// The copy engine, and the fence towards it.
void fence_async(bool all_memory);
bool elect_one();
void check_tensor_map(const void* map);
void box_load(void* shared, const void* map, int rank, BoxPosition from, void* barrier);
void box_store(const void* map, int rank, BoxPosition to, const void* shared);
void bulk_load(void* shared, const void* global, int bytes, void* barrier);
void bulk_copy_cluster(uint32_t target, const void* shared, int bytes, uint32_t barrier);
void bulk_commit();
void bulk_wait(int pending, bool reads_only);

// Products of a warpgroup. d has `words` registers in each thread, in which nothing is before the
// wait; registers are where the kernel has them until then.
void check_tile(const void* tile, int alignment);
void warpgroup_fence(const void* registers, int words);
void warpgroup_product(float* d, int words, WarpgroupOperands operands);
void warpgroup_commit();
void warpgroup_wait(int pending);
void warpgroup_hold(const void* registers, int words);
void set_registers(int registers, bool raise);
void store_matrix(void* row, Words4 words, bool transposed);

// Single words of global memory that threads of all blocks change.
int atomic_add(int* address, int value, bool acquires_and_releases);
int load_word(const int* address, bool acquires);
void store_word(int* address, int value);

// Runs a grid to its end: entry(kernel, arguments) in every thread. Throws std::runtime_error, with
// what is wrong and where, for whatever the machine finds.
struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes;
  int cluster;  // blocks
  const char* name;
};
using Entry = void (*)(void (*kernel)(), const void* arguments);
void run_grid(const Grid& grid, Entry entry, void (*kernel)(), const void* arguments);

}  // namespace bertkern::emulator
