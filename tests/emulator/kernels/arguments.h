// Arguments of the test kernels: what faults.cu and products.cu compute, as Python starts it.
#pragma once

#include <cstdint>
#include <string>

namespace bertkern::emulator::test {

struct Arguments {
  float* x;
  float* y;
  int fault;  // 0: none
};

// Runs the kernel of a name. Throws std::invalid_argument for another.
void run_fault(const std::string& name, const Arguments& arguments, int blocks, int threads,
               int shared_bytes);

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

// A program that threads interpret: in each step every thread does something, then all synchronise.
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

}  // namespace bertkern::emulator::test
