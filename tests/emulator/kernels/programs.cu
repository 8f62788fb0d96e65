// Random programs: accesses to shared memory and barriers as tables say. test_races.py knows which
// of them race.
#include "cuda/launch.h"
#include "kernels/arguments.h"
#include "ptx/copy_async.cuh"
#include "ptx/memory.cuh"
#include "ptx/thread.cuh"

namespace bertkern::emulator::test {
namespace {

BERTKERN_DEVICE float act(int what, char* place, const float* source) {
  float value = 0.0f;
  switch (what) {
    case kReadWord:
      value = *reinterpret_cast<float*>(place);
      break;
    case kWriteWord:
      *reinterpret_cast<float*>(place) = 1.0f;
      break;
    case kReadByte:
      value = *place;
      break;
    case kWriteByte:
      *place = 1;
      break;
    case kCopy:
      ptx::copy_async_16(place, source, true);
      ptx::copy_async_commit();
      break;
    case kWaitForAll:
      ptx::copy_async_wait<0>();
      break;
    case kWaitForAllButOne:
      ptx::copy_async_wait<1>();
      break;
    default:
      break;
  }
  return value;
}

BERTKERN_DEVICE void sync(int what) {
  const int warp = ptx::thread_index() / 32;
  if (what == kBlock) ptx::block_barrier();
  if (what == kWarps || (what == kFirstWarp && warp == 0)) ptx::warp_barrier();
  if (what == kTwoWarps && warp < 2) ptx::named_barrier_sync(1, 64);
  if (what == kHandOver && warp == 0) ptx::named_barrier_arrive(2, 64);
  if (what == kHandOver && warp == 1) ptx::named_barrier_sync(2, 64);
}

BERTKERN_KERNEL(kProgramThreads) interpret(const Program p) {
  const int t = ptx::thread_index();
  char* shared = ptx::shared_memory();
  for (int i = t; i < kProgramSharedBytes; i += kProgramThreads) shared[i] = 0;
  ptx::block_barrier();
  float sum = 0.0f;
  for (int step = 0; step < p.steps; ++step) {
    const int code = p.acts[step * kProgramThreads + t];
    sum += act(code % 16, shared + code / 16, p.source);
    sync(p.syncs[step]);
  }
  ptx::copy_async_wait<0>();
  p.sink[t] = sum;
}

}  // namespace

void run_program(const Program& program) {
  cuda::launch(interpret, {1, kProgramThreads, kProgramSharedBytes}, program, nullptr, "program");
}

}  // namespace bertkern::emulator::test
