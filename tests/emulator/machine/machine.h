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

// Runs a grid to its end: entry(kernel, arguments) in every thread. Throws std::runtime_error, with
// what is wrong and where, for whatever the machine finds.
struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes;
  const char* name;
};
using Entry = void (*)(void (*kernel)(), const void* arguments);
void run_grid(const Grid& grid, Entry entry, void (*kernel)(), const void* arguments);

}  // namespace bertkern::emulator
