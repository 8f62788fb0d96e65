// One small kernel for each thing that the machine must find (see faults.cuh) of what blocks and
// warps of every architecture do; and the table of all such kernels.
#include <map>
#include <stdexcept>

#include "cuda/tensor_map.h"
#include "kernels/faults.cuh"

namespace bertkern::emulator::test {
namespace {

// Barriers ---------------------------------------------------------------------------------------

// 1: no barrier between write and read; 2: one of a warp, where another warp reads; 3: a shuffle.
BERTKERN_KERNEL(128) write_then_read(const Arguments a) {
  const int t = ptx::thread_index();
  float* shared = shared_floats();
  shared[t] = 0.0f;
  ptx::block_barrier();
  shared[t] = a.x[t];  // first
  if (a.fault == 0) ptx::block_barrier();
  if (a.fault == 2) ptx::warp_barrier();
  if (a.fault == 3) ptx::shuffle_xor(0.0f, 1);
  a.y[t] = shared[(t + 40) % 128];  // second
}

// 1: no barrier between read and write.
BERTKERN_KERNEL(128) read_then_write(const Arguments a) {
  const int t = ptx::thread_index();
  float* shared = shared_floats();
  shared[t] = a.x[t];
  ptx::block_barrier();
  a.y[t] = shared[(t + 40) % 128];  // first
  if (a.fault == 0) ptx::block_barrier();
  shared[t] = 0.0f;  // second
}

// 1: no barrier between two writes.
BERTKERN_KERNEL(128) write_twice(const Arguments a) {
  const int t = ptx::thread_index();
  float* shared = shared_floats();
  if (t == 0) shared[0] = 1.0f;  // first
  if (a.fault == 0) ptx::block_barrier();
  if (t == 32) shared[0] = 2.0f;  // second
  ptx::block_barrier();
  a.y[t] = shared[0];
}

// Bytes of one word by different threads are no race. 1: they overlap.
BERTKERN_KERNEL(128) neighbouring_bytes(const Arguments a) {
  const int t = ptx::thread_index();
  char* bytes = ptx::shared_memory();
  bytes[a.fault == 1 && t == 7 ? 8 : t] = static_cast<char>(t);
  ptx::block_barrier();
  a.y[t] = bytes[t == 7 ? 8 : t];
}

// 1: nothing between lanes; 2, 3, 4: a shuffle, a vote, ldmatrix, which do not order memory.
BERTKERN_KERNEL(128) lanes(const Arguments a) {
  const int t = ptx::thread_index();
  float* shared = shared_floats();
  shared[t] = shared[128 + t] = 0.0f;
  ptx::warp_barrier();
  shared[t] = a.x[t];  // first
  uint32_t words[4];
  if (a.fault == 0) ptx::warp_barrier();
  if (a.fault == 2) ptx::shuffle_xor(0.0f, 1);
  if (a.fault == 3) ptx::vote_any(true);
  if (a.fault == 4) ptx::load_matrix_4(words, shared + 128 + warp_index() * 32 + t % 8 * 4);
  a.y[t] = shared[t ^ 1];  // second
}

// What a barrier of a warp tells, a later one of the block tells on. 1: it does not come.
BERTKERN_KERNEL(128) barriers_in_turn(const Arguments a) {
  const int t = ptx::thread_index();
  float* shared = shared_floats();
  for (int round = 0; round < 4; ++round) {
    shared[t] = a.x[t] + static_cast<float>(round);
    ptx::warp_barrier();
    const float neighbour = shared[t ^ 1];
    ptx::warp_barrier();
    shared[t] = neighbour;  // first
    if (a.fault == 0 || round < 2) ptx::block_barrier();
    a.y[t] = shared[(t + 64) % 128];  // second
    ptx::block_barrier();
  }
}

// Warp 0 produces, the others consume. 1: it arrives at another barrier; 2: it waits for nobody
// before it writes again.
BERTKERN_KERNEL(128) named_barriers(const Arguments a) {
  const int t = ptx::thread_index();
  constexpr int kFull = 1, kEmpty = 2;
  float* shared = shared_floats();
  for (int round = 0; round < 3; ++round) {
    if (warp_index() == 0) {
      if (round > 0 && a.fault != 2) ptx::named_barrier_sync(kEmpty, 128);
      shared[t] = a.x[t];  // second
      ptx::named_barrier_arrive(a.fault == 1 ? 3 : kFull, 128);
    } else {
      ptx::named_barrier_sync(kFull, 128);
      a.y[t] = shared[t % 32];  // first
      if (round < 2) ptx::named_barrier_arrive(kEmpty, 128);
    }
  }
}

// 1: an id, 2: a number of threads that no barrier has; 3: two numbers at one barrier.
BERTKERN_KERNEL(128) named_barrier_arguments(const Arguments a) {
  const int second = a.fault == 3 && warp_index() == 1 ? 96 : 128;
  ptx::named_barrier_sync(a.fault == 1 ? 16 : 1, a.fault == 2 ? 40 : second);
}

// 1: a warp ends, the others wait; 2: lanes of a warp do.
BERTKERN_KERNEL(128) everybody_waits(const Arguments a) {
  if (a.fault == 1 && warp_index() == 3) return;
  if (a.fault == 2 && ptx::thread_index() == 70) return;
  ptx::block_barrier();  // first
}

// Warps ------------------------------------------------------------------------------------------

// 1: half of the lanes vote while the others shuffle; 2: one lane ends; 3: one waits at a barrier
// of the block; 4: lanes load different numbers of matrices; 5: products of different formats.
BERTKERN_KERNEL(32) together(const Arguments a) {
  const int t = ptx::thread_index();
  float* shared = shared_floats();
  for (int i = t; i < 128; i += 32) shared[i] = 0.0f;
  ptx::warp_barrier();
  if (a.fault == 2 && t == 5) return;
  if (a.fault == 3 && t == 5) ptx::block_barrier();
  float value = 1.0f;
  if (a.fault == 1 && t < 16) {
    value = ptx::vote_any(true) ? 1.0f : 0.0f;
  } else {
    value = ptx::shuffle_xor(value, 1);
  }
  if (a.fault == 3 && t != 5) ptx::block_barrier();
  uint32_t four[4], two[2];
  if (a.fault == 4 && t == 9) {
    ptx::load_matrix_2_transposed(two, shared + t * 4);
  } else {
    ptx::load_matrix_4_transposed(four, shared + t * 4);
  }
  float d[4] = {};
  if (a.fault == 5 && t == 9) {
    ptx::mma_16x8x16(d, {0, 0, 0, 0}, {0, 0}, ptx::half{});
  } else {
    ptx::mma_16x8x16(d, {0, 0, 0, 0}, {0, 0}, ptx::bfloat16{});
  }
  a.y[t] = value + d[0];
}

// 1, 2: masks, 3: a lane, that no warp has.
BERTKERN_KERNEL(32) shuffle_arguments(const Arguments a) {
  const int t = ptx::thread_index();
  const float other = ptx::shuffle_xor(0.0f, a.fault == 1 ? 32 : a.fault == 2 ? 0 : 1);
  a.y[t] = other + static_cast<float>(ptx::shuffle_index(0, a.fault == 3 ? 32 : 0));
}

// Copies -----------------------------------------------------------------------------------------

// 1: no wait; 2: a wait that leaves this group out; 3: no commit, so that the wait covers nothing.
BERTKERN_KERNEL(128) own_copy(const Arguments a) {
  const int t = ptx::thread_index();
  float* shared = shared_floats();
  shared[4 * t] = 0.0f;
  ptx::copy_async_16(shared + 4 * t, a.x + 4 * t, true);  // first
  if (a.fault != 3) ptx::copy_async_commit();
  if (a.fault == 2) {
    ptx::copy_async_wait<1>();
  } else if (a.fault != 1) {
    ptx::copy_async_wait<0>();
  }
  a.y[t] = shared[4 * t];  // second
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
}

// Two tiles, one ahead. 1: the wait leaves one group too many out; 2: no barrier behind the wait;
// 3: no barrier before the stage is filled again.
BERTKERN_KERNEL(128) stages(const Arguments a) {
  constexpr int kSteps = 4;
  const int t = ptx::thread_index();
  float* shared = shared_floats();
  const auto fill = [&](int step) {
    ptx::copy_async_16(shared + step % 2 * 512 + 4 * t, a.x + 4 * t, true);  // first
    ptx::copy_async_commit();
  };
  for (int i = t; i < 1024; i += 128) shared[i] = 0.0f;
  ptx::block_barrier();
  fill(0);
  fill(1);
  float sum = 0.0f;
  for (int step = 0; step < kSteps; ++step) {
    if (a.fault == 1 && step == 1) {
      ptx::copy_async_wait<2>();
    } else {
      ptx::copy_async_wait<1>();
    }
    if (a.fault != 2) ptx::block_barrier();
    sum += shared[step % 2 * 512 + (4 * t + 129) % 512];  // second
    if (a.fault != 3) ptx::block_barrier();
    if (step + 2 < kSteps) {
      fill(step + 2);
    } else {
      ptx::copy_async_commit();
    }
  }
  a.y[t] = sum;
}

// 1: a copy is under way when its thread ends.
BERTKERN_KERNEL(128) last_copy(const Arguments a) {
  const int t = ptx::thread_index();
  ptx::copy_async_16(ptx::shared_memory() + 16 * t, a.x + 4 * t, true);  // first
  ptx::copy_async_commit();
  if (a.fault == 0) ptx::copy_async_wait<0>();
}

// Two copies to one place. 1: nothing between them.
BERTKERN_KERNEL(128) copy_twice(const Arguments a) {
  const int t = ptx::thread_index();
  for (int i = 0; i < 2; ++i) {
    ptx::copy_async_16(ptx::shared_memory() + 16 * t, a.x + 4 * t, true);
    ptx::copy_async_commit();
    if (a.fault == 0) ptx::copy_async_wait<0>();
  }
  ptx::copy_async_wait<0>();
}

// What is copied from is written again. 1: before the wait.
BERTKERN_KERNEL(128) copy_source(const Arguments a) {
  const int t = ptx::thread_index();
  ptx::copy_async_16(ptx::shared_memory() + 16 * t, a.x + 4 * t, true);  // first
  ptx::copy_async_commit();
  if (a.fault == 0) ptx::copy_async_wait<0>();
  a.x[4 * t] = 0.0f;  // second
  ptx::copy_async_wait<0>();
}

// Zeros for what is not valid. 1: from an address behind the tensor; 2: from null.
BERTKERN_KERNEL(128) copy_of_nothing(const Arguments a) {
  const int t = ptx::thread_index();
  float* shared = shared_floats();
  const float* source = a.fault == 0 ? a.x : a.fault == 1 ? a.x + 512 : nullptr;
  ptx::copy_async_16(shared + 4 * t, source, false);
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  a.y[t] = shared[4 * t] + shared[4 * t + 3];
}

// Bounds, alignment, bytes that nobody wrote -----------------------------------------------------

constexpr float kTable[] = {1.0f, 2.0f, 3.0f};  // constants are there
float variable = 0.0f;                          // in no memory of a device

// x has 512 floats, y 128, shared memory 4096 bytes.
BERTKERN_KERNEL(128) bounds(const Arguments a) {
  const int t = ptx::thread_index();
  float* shared = shared_floats();
  for (int i = t; i < 1024; i += 128) shared[i] = 0.0f;
  ptx::block_barrier();
  if (t != 64) return;
  const auto nothing = static_cast<uintptr_t>(ptx::block_index());  // nobody knows that it is 0
  switch (a.fault) {
    case 0:
      a.y[t] = shared[1023] + a.x[511] + kTable[a.fault];
      break;
    case 1:
      a.y[t] = shared[1024];
      break;
    case 2:
      shared[1024] = 0.0f;
      break;
    case 3:
      shared[-1] = 0.0f;
      break;
    case 4:
      a.y[t] = a.x[512];
      break;
    case 5:
      a.y[-1] = 0.0f;
      break;
    case 6:
      a.y[t] = static_cast<float>(ptx::load_global_16(a.x + 516).word[0]);
      break;
    case 7:
      a.y[t] = static_cast<float>(ptx::load_global_16(a.x + 512).word[0]);
      break;
    case 8:
      ptx::store_global_16(shared, {{0, 0, 0, 0}});  // shared memory is not global
      break;
    case 9:
      ptx::copy_async_16(shared + 1024, a.x, true);
      break;
    case 10:
      a.y[t] = *reinterpret_cast<float*>(nothing);
      break;
    case 11:
      variable += 1.0f;
      break;
    default:
      a.y[t] = shared[256 * 256];  // where another block's is
  }
}

// 1: a row of a matrix behind the end of shared memory.
BERTKERN_KERNEL(32) matrix_bounds(const Arguments a) {
  const int t = ptx::thread_index();
  float* shared = shared_floats();
  for (int i = t; i < 1024; i += 32) shared[i] = 0.0f;
  ptx::block_barrier();
  uint32_t words[4];
  ptx::load_matrix_4(words, shared + (a.fault == 1 && t == 31 ? 1024 : t * 4));
  a.y[t] = static_cast<float>(words[0]);
}

// y[2] of x [4, 100] with a stride of 128: 1: the first element between two rows.
BERTKERN_KERNEL(32) rows(const Arguments a) {
  if (ptx::thread_index() == 0) a.y[0] = a.x[128 + (a.fault == 1 ? 100 : 99)];
}

BERTKERN_KERNEL(32) alignment(const Arguments a) {
  const int t = ptx::thread_index();
  char* shared = ptx::shared_memory();
  for (int i = t; i < 1024; i += 32) shared_floats()[i] = 0.0f;
  ptx::block_barrier();
  uint32_t words[4];
  const int row = 16 * t + (a.fault == 1 && t == 3 ? 8 : 0);
  ptx::load_matrix_4(words, shared + row);
  a.y[t] = static_cast<float>(words[0]);
  if (t != 3) return;
  switch (a.fault) {
    case 2:
      a.y[t] = *reinterpret_cast<float*>(shared + 2);
      break;
    case 3:
      *reinterpret_cast<float*>(reinterpret_cast<char*>(a.y) + 1) = 0.0f;
      break;
    case 4:
      ptx::store_global_16(a.y + 2, {{0, 0, 0, 0}});
      break;
    case 5:
      ptx::copy_async_16(shared + 8, a.x, true);
      break;
    case 6:
      ptx::copy_async_16(shared, a.x + 1, true);
      break;
    case 7:
      a.y[t] = static_cast<float>(reinterpret_cast<ptx::Words4*>(shared + 8)->word[3]);
      break;
    case 8:
      *reinterpret_cast<ptx::Words4*>(shared + 8) = {{0, 0, 0, 0}};
      break;
    default:
      break;
  }
}

// 1: of shared memory; 2: of y, which was handed over without values; 3: one byte of 16; 4: of a
// matrix; 5: of the block that was in this memory before.
BERTKERN_KERNEL(32) unwritten(const Arguments a) {
  const int t = ptx::thread_index();
  char* shared = ptx::shared_memory();
  float* y = a.y + ptx::block_index() * 32;
  if (t == 0 && a.fault == 1) y[t] = shared_floats()[0];
  if (t == 0 && a.fault == 2) a.x[t] = y[0];
  for (int i = t; i < 512; i += 32) {
    if (!(a.fault == 3 && i == 21) && !(a.fault == 4 && i >= 496)) shared[i] = 1;
  }
  if (t == 0 && ptx::block_index() == 0) shared[600] = 1;
  ptx::block_barrier();
  if (a.fault == 3) y[t] = static_cast<float>(reinterpret_cast<ptx::Words4*>(shared + 16)->word[1]);
  uint32_t words[4];
  ptx::load_matrix_4(words, shared + 16 * t);
  y[t] = static_cast<float>(words[0]);
  if (a.fault == 5 && ptx::block_index() != 0) y[t] = shared[600];
}

// Blocks and threads -----------------------------------------------------------------------------

// Every block writes its own part of y. 1: and reads the next one's; 2: and writes its first; 3:
// all write one element.
BERTKERN_KERNEL(32) blocks(const Arguments a) {
  const int t = ptx::thread_index(), block = ptx::block_index(), count = ptx::block_count();
  a.y[block * 32 + t] = a.x[t];  // first
  ptx::block_barrier();
  if (a.fault == 1) a.x[256 + block * 32 + t] = a.y[(block + 1) % count * 32 + t];  // second
  if (a.fault == 2 && t == 0) a.y[(block + 1) % count * 32] = 0.0f;
  if (a.fault == 3 && t == 0) a.x[0] = 0.0f;
}

// 1: a thread reads another's local variable.
BERTKERN_KERNEL(64) locals(const Arguments a) {
  const int t = ptx::thread_index();
  float own[4] = {a.x[t], 0.0f, 0.0f, 0.0f};
  auto** pointers = reinterpret_cast<float**>(ptx::shared_memory());
  pointers[t] = own;
  ptx::block_barrier();
  const float value = *pointers[a.fault == 1 ? (t + 1) % 64 : t];
  ptx::block_barrier();
  a.y[t] = value;
}

std::map<std::string, FaultKernel>& kernels() {
  static std::map<std::string, FaultKernel> table;
  return table;
}

const bool added = add_faults({
    {"write_then_read", write_then_read},
    {"read_then_write", read_then_write},
    {"write_twice", write_twice},
    {"neighbouring_bytes", neighbouring_bytes},
    {"lanes", lanes},
    {"barriers_in_turn", barriers_in_turn},
    {"named_barriers", named_barriers},
    {"named_barrier_arguments", named_barrier_arguments},
    {"everybody_waits", everybody_waits},
    {"together", together},
    {"shuffle_arguments", shuffle_arguments},
    {"own_copy", own_copy},
    {"stages", stages},
    {"last_copy", last_copy},
    {"copy_twice", copy_twice},
    {"copy_source", copy_source},
    {"copy_of_nothing", copy_of_nothing},
    {"bounds", bounds},
    {"matrix_bounds", matrix_bounds},
    {"rows", rows},
    {"alignment", alignment},
    {"unwritten", unwritten},
    {"blocks", blocks},
    {"locals", locals},
});

// Memory that is no tensor's.
alignas(16) uint16_t nowhere[16 * 64];

TensorMap map_of(void* data, int rows, Swizzle swizzle) {
  return cuda::make_tensor_map({data, DType::kFloat16, 2, {64, rows}, {1, 64}, {64, 4}, swizzle},
                               "test kernel");
}

}  // namespace

bool add_faults(std::initializer_list<std::pair<const std::string, FaultKernel>> more) {
  kernels().insert(more);
  return true;
}

void run_fault(const std::string& name, float* x, float* y, int fault, const Shape& shape) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::invalid_argument("no kernel " + name);
  const Arguments arguments{x,
                            y,
                            fault,
                            map_of(x, 16, Swizzle::kNone),
                            map_of(y, 4, Swizzle::kNone),
                            map_of(x, 16, Swizzle::k128),
                            map_of(nowhere, 16, Swizzle::kNone)};
  cuda::launch(found->second, {shape.blocks, shape.threads, shape.shared_bytes, shape.cluster},
               arguments, nullptr, name.c_str());
}

}  // namespace bertkern::emulator::test
