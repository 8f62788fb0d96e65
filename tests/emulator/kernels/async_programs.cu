// Random programs with mbarriers and the copy engine: what each thread does, and how it
// synchronises, as tables say. test_async_races.py knows which of them race.
#include "common/dtype.h"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "kernels/arguments.h"
#include "ptx/copy_async.cuh"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/thread.cuh"
#include "ptx/tma.cuh"

namespace bertkern::emulator::test {
namespace {

struct AsyncArguments {
  AsyncProgram program;
  TensorMap stored;  // boxes of one row
};

BERTKERN_DEVICE float act(const AsyncArguments& a, int code, int row, char* shared,
                          ptx::Barrier* barriers) {
  char* place = shared + (code >> 4) % 4096;
  ptx::Barrier* barrier = barriers + (code >> 16);
  float value = 0.0f;
  switch (code % 16) {
    case kAsyncReadWord:
      value = *reinterpret_cast<float*>(place);
      break;
    case kAsyncWriteWord:
      *reinterpret_cast<float*>(place) = 1.0f;
      break;
    case kAsyncReadByte:
      value = *place;
      break;
    case kAsyncWriteByte:
      *place = 1;
      break;
    case kAsyncCopy:
      ptx::copy_async_16(place, a.program.source, true);
      ptx::copy_async_commit();
      break;
    case kAsyncCopyWait:
      ptx::copy_async_wait<0>();
      break;
    case kAsyncFence:
      ptx::fence_async_shared();
      break;
    case kAsyncLoad:
      ptx::barrier_expect_bytes(barrier, 16);
      ptx::bulk_load(place, a.program.source, 16, barrier);
      break;
    case kAsyncStore:
      ptx::tma_store(a.stored, {0, row}, place);
      ptx::bulk_commit();
      break;
    case kAsyncStoreWait:
      ptx::bulk_wait_read<0>();
      break;
    default:
      break;
  }
  return value;
}

BERTKERN_DEVICE void sync(int code, ptx::Barrier* barriers) {
  ptx::Barrier* barrier = barriers + (code >> 4) % 16;
  switch (code % 16) {
    case kAsyncBlock:
      ptx::block_barrier();
      break;
    case kAsyncWarp:
      ptx::warp_barrier();
      break;
    case kAsyncArrive:
      ptx::barrier_arrive(barrier);
      break;
    case kAsyncWait:
      ptx::barrier_wait(barrier, code >> 8);
      break;
    default:
      break;
  }
}

BERTKERN_KERNEL(kAsyncThreads) interpret(BERTKERN_GRID_CONSTANT AsyncArguments a) {
  const AsyncProgram& p = a.program;
  const int t = ptx::thread_index();
  char* shared = ptx::shared_memory();
  auto* barriers = reinterpret_cast<ptx::Barrier*>(shared + kAsyncSharedBytes);
  if (t == 0) {
    for (int i = 0; i < kAsyncBarriers; ++i) ptx::barrier_init(barriers + i, p.arrivals[i]);
    ptx::barrier_init_fence();
  }
  for (int i = t; i < kAsyncSharedBytes; i += kAsyncThreads) shared[i] = 0;
  ptx::fence_async_shared();
  ptx::block_barrier();
  float sum = 0.0f;
  for (int step = 0; step < p.steps; ++step) {
    const int row = step * kAsyncThreads + t;
    sum += act(a, p.acts[row], row, shared, barriers);
    sync(p.syncs[row], barriers);
  }
  for (int i = 0; i < kAsyncBarriers; ++i) {
    ptx::barrier_wait(barriers + i, p.parities[i]);
  }
  ptx::copy_async_wait<0>();
  ptx::bulk_wait_read<0>();
  p.sink[t] = sum;
}

}  // namespace

void run_async_program(const AsyncProgram& program) {
  const TensorMap stored = cuda::make_tensor_map({program.stored,
                                                  DType::kFloat16,
                                                  2,
                                                  {8, program.steps * kAsyncThreads},
                                                  {1, 8},
                                                  {8, 1},
                                                  Swizzle::kNone},
                                                 "async program");
  constexpr int kBytes =
      kAsyncSharedBytes + kAsyncBarriers * static_cast<int>(sizeof(ptx::Barrier));
  cuda::launch(interpret, {1, kAsyncThreads, kBytes, 1}, AsyncArguments{program, stored}, nullptr,
               "async program");
}

}  // namespace bertkern::emulator::test
