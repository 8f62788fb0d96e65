// Arguments of the test kernels, as Python starts them.
#pragma once

#include <cstdint>
#include <string>

#include "common/tensor_map.h"

namespace bertkern::emulator::test {

// Small kernels that are right or make one mistake (faults.cu and *_faults.cu).
struct Arguments {
  float* x;
  float* y;
  int fault;  // 0: none
  // x as [16, 64] and y as [4, 64] halves, in boxes of 4 rows; x with a swizzle; no tensor at all.
  TensorMap source, target, swizzled, nowhere;
};

struct Shape {
  int blocks, threads, shared_bytes, cluster;
};

// Runs the kernel of a name. Throws std::invalid_argument for another.
void run_fault(const std::string& name, float* x, float* y, int fault, const Shape& shape);

// Products of one warp and casts (products.cu).
struct Product {
  const uint16_t *a, *b;  // [16, 16], [16, 8]
  float* d;               // [16, 8]
  bool bfloat16;
};

enum class Operands : int { kFromGlobal, kMatrices, kTransposedMatrices };
void run_product(const Product& product, Operands operands);

struct Casts {
  const float* x;
  uint16_t *half, *bfloat16;
  float *from_half, *from_bfloat16;
  int count;  // a multiple of 32
};
void run_casts(const Casts& casts);

// Products of a warpgroup (warpgroup_products.cu): d (+)= a[step] b[step], one step after the
// other.
struct WarpgroupProducts {
  const uint32_t* shared;  // [shared_bytes / 4], what shared memory holds
  const uint32_t* a;       // [steps, 4, 128], the left operands' registers
  const int64_t* tiles;    // [steps, 2], descriptors of a and b without addresses
  const int32_t* at;       // [steps, 2], their addresses in shared memory
  float* d;                // [n / 2, 128], the accumulators' registers
  int shared_bytes, steps, n;
  bool bfloat16, a_in_registers, transpose_a, transpose_b;
  bool accumulate;  // from the first step on
};
void run_warpgroup_products(const WarpgroupProducts& products);

// A box of a tensor of 16-bit elements (boxes.cu), from the innermost dimension on.
struct Box {
  uint16_t* data;
  bool bfloat16;
  int rank;
  int64_t sizes[5], strides[5];
  int box[5], at[5];
  int swizzle;
};
// Loads the box into shared memory, from where it goes to `tile`; or stores it from there.
void run_box(const Box& box, uint32_t* tile, bool load);

// out = (q kᵀ) v of halves in rows of 64 (pipeline.cu).
struct Pipeline {
  const uint16_t *q, *k, *v;
  uint16_t* out;
  int queries, keys;
  int fault;  // 0: none
};
void run_pipeline(const Pipeline& pipeline);

// A program that threads interpret (programs.cu): in each step every thread does something, then
// all synchronise.
constexpr int kProgramThreads = 96, kProgramSharedBytes = 256;
struct Program {
  const int32_t* acts;   // [steps, threads]: an Act, the byte of shared memory in the bits above
  const int32_t* syncs;  // [steps]
  const float* source;   // what is copied, 4 floats
  float* sink;           // [threads]
  int steps;
};
enum ProgramAct : int {
  kNothing,
  kReadWord,
  kWriteWord,
  kReadByte,
  kWriteByte,
  kCopy,
  kWaitForAll,
  kWaitForAllButOne
};
enum ProgramSync : int { kNone, kBlock, kWarps, kFirstWarp, kTwoWarps, kHandOver };
void run_program(const Program& program);

// The same with mbarriers and the copy engine (async_programs.cu); every thread synchronises on its
// own.
constexpr int kAsyncThreads = 64, kAsyncBarriers = 6, kAsyncSharedBytes = 512;
struct AsyncProgram {
  const int32_t* acts;      // [steps, threads]: an AsyncAct, its byte and barrier above
  const int32_t* syncs;     // [steps, threads]: an AsyncSync, its barrier and parity above
  const int32_t* arrivals;  // [barriers], of each phase
  const int32_t* parities;  // [barriers], of the last phase
  const float* source;      // what is loaded, 4 floats
  float* sink;              // [threads]
  uint16_t* stored;         // [steps * threads, 8]: where each store goes
  int steps;
};
enum AsyncAct : int {
  kAsyncNothing,
  kAsyncReadWord,
  kAsyncWriteWord,
  kAsyncReadByte,
  kAsyncWriteByte,
  kAsyncCopy,  // cp.async
  kAsyncCopyWait,
  kAsyncFence,
  kAsyncLoad,   // the engine's, counted on a barrier
  kAsyncStore,  // the engine's
  kAsyncStoreWait
};
enum AsyncSync : int { kAsyncNone, kAsyncBlock, kAsyncWarp, kAsyncArrive, kAsyncWait };
void run_async_program(const AsyncProgram& program);

}  // namespace bertkern::emulator::test
