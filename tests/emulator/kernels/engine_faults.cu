// Copies of the engine and fences towards it (ptx/tma.cuh, ptx/fence.cuh), used rightly and with
// faults; see faults.cuh.
#include "kernels/faults.cuh"

namespace bertkern::emulator::test {
namespace {

constexpr int kBoxBytes = 4 * 64 * 2;  // of source and target: 128 floats

BERTKERN_DEVICE void load_floats(float* to, const float* from, int floats, ptx::Barrier* barrier) {
  ptx::barrier_arrive_expect_bytes(barrier, 4 * floats);
  ptx::bulk_load(to, from, 4 * floats, barrier);
}

// Loads ------------------------------------------------------------------------------------------

// Threads write, the engine writes over it. 1: no fence; 2: thread 0 alone fences; 3: the fence
// stands behind the barrier; 4: there is no barrier.
BERTKERN_KERNEL(128) loaded_over_writes(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  make_barrier(barrier, 1);
  ptx::block_barrier();
  for (int i = t; i < 512; i += 128) values[i] = 0.0f;  // first
  if (a.fault == 0 || a.fault == 4 || (a.fault == 2 && t == 0)) ptx::fence_async_shared();
  if (a.fault != 4) ptx::block_barrier();
  if (a.fault == 3) ptx::fence_async_shared();
  if (t == 0) {
    ptx::barrier_arrive_expect_bytes(barrier, 2048);
    ptx::bulk_load(values, a.x, 2048, barrier);  // second
  }
  ptx::barrier_wait(barrier, 0);
  a.y[t] = values[(4 * t + 40) % 512];
}

// Two stages, a thread of warp 0 loads, the others read. 1: no fence between reading and saying so;
// 2: it comes after; 3: thread 0 does not wait for an empty stage; 4: the others do not wait.
BERTKERN_KERNEL(128) stages_of_loads(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier *full = shared_barriers(), *empty = full + 2;
  float* values = shared_values();
  for (int stage = 0; stage < 2; ++stage) {
    make_barrier(full + stage, 1);
    make_barrier(empty + stage, 96);
    values[128 * stage + t] = 0.0f;
  }
  ptx::fence_async_shared();
  ptx::block_barrier();
  if (warp_index() == 0) {
    if (!ptx::elect_one()) return;
    for (int round = 0; round < 4; ++round) {
      const int stage = round % 2;
      if (a.fault != 3) ptx::barrier_wait(empty + stage, (round / 2 & 1) ^ 1);
      ptx::barrier_arrive_expect_bytes(full + stage, kBoxBytes);
      ptx::tma_load(values + 128 * stage, a.source, {0, 4 * round}, full + stage,  // second
                    ptx::cache_briefly());
    }
    return;
  }
  float sum = 0.0f;
  for (int round = 0; round < 4; ++round) {
    const int stage = round % 2;
    if (a.fault != 4) ptx::barrier_wait(full + stage, round / 2 & 1);
    sum += values[128 * stage + t];  // first
    if (a.fault != 1 && a.fault != 2) ptx::fence_async_shared();
    ptx::barrier_arrive(empty + stage);
    if (a.fault == 2) ptx::fence_async_shared();
  }
  a.y[t] = sum;
}

// What the engine has loaded and a wait has shown, threads may write without a fence. 1: no wait.
BERTKERN_KERNEL(128) written_over_loads(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  make_barrier(barrier, 1);
  ptx::block_barrier();
  if (t == 0) {
    ptx::barrier_arrive_expect_bytes(barrier, 512);
    ptx::bulk_load(values, a.x, 512, barrier);  // first
  }
  if (a.fault == 0) ptx::barrier_wait(barrier, 0);
  values[t] = 1.0f;  // second
  ptx::barrier_wait(barrier, 0);
  a.y[t] = values[t];
}

// Two loads to one place. 1: the second does not wait for the first.
BERTKERN_KERNEL(32) loaded_twice(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  make_barrier(barrier, 1);
  make_barrier(barrier + 1, 1);
  ptx::block_barrier();
  if (t == 0) {
    load_floats(values, a.x, 64, barrier);
    if (a.fault == 0) ptx::barrier_wait(barrier, 0);
    load_floats(values + 32, a.x, 64, barrier + 1);
  }
  ptx::barrier_wait(barrier, 0);
  ptx::barrier_wait(barrier + 1, 0);
  a.y[t] = values[t] + values[t + 32];
}

// Threads write global memory, which is then loaded. 1: no fence; 2: one for shared memory only; 3:
// no barrier behind it.
BERTKERN_KERNEL(128) loaded_from_writes(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  make_barrier(barrier, 1);
  ptx::block_barrier();
  a.x[t] = static_cast<float>(2 * t);  // first
  if (a.fault == 0 || a.fault == 3) ptx::fence_async();
  if (a.fault == 2) ptx::fence_async_shared();
  if (a.fault != 3) ptx::block_barrier();
  if (t == 0) {
    ptx::barrier_arrive_expect_bytes(barrier, 512);
    ptx::bulk_load(values, a.x, 512, barrier);  // second
  }
  ptx::barrier_wait(barrier, 0);
  a.y[t] = values[127 - t];
}

// Global memory that was loaded is written. 1: before the wait.
BERTKERN_KERNEL(128) written_where_loaded_from(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  make_barrier(barrier, 1);
  ptx::block_barrier();
  if (t == 0) {
    ptx::barrier_arrive_expect_bytes(barrier, kBoxBytes);
    ptx::tma_load(shared_values(), a.source, {0, 0}, barrier, ptx::cache_long());  // first
  }
  if (a.fault == 0) ptx::barrier_wait(barrier, 0);
  a.x[t] = 0.0f;  // second
  ptx::barrier_wait(barrier, 0);
  a.y[t] = shared_values()[t];
}

// cp.async is of the generic proxy. 1: no fence between its wait and a load to the same place; 2:
// the fence stands before the wait.
BERTKERN_KERNEL(128) loaded_over_copies(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  make_barrier(barrier, 1);
  ptx::copy_async_16(values + 4 * t, a.x + 4 * t, true);  // first
  ptx::copy_async_commit();
  if (a.fault == 2) ptx::fence_async_shared();
  ptx::copy_async_wait<0>();
  if (a.fault == 0) ptx::fence_async_shared();
  ptx::block_barrier();
  if (t == 0) {
    ptx::barrier_arrive_expect_bytes(barrier, 1024);
    ptx::bulk_load(values, a.x + 256, 1024, barrier);  // second
  }
  ptx::barrier_wait(barrier, 0);
  a.y[t] = values[t] + values[t + 256];
}

// Stores -----------------------------------------------------------------------------------------

// A tile is written, stored, written again. 1: no fence; 2: no barrier before the store; 3: no
// commit, so that the wait covers nothing; 4: no wait; 5: one that leaves this group out; 6: no
// barrier behind the wait; 7: no wait at all.
BERTKERN_KERNEL(128) stored_tile(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  float* values = shared_values();
  values[t] = 0.0f;
  ptx::fence_async_shared();
  ptx::block_barrier();
  values[t] = a.x[t];  // first
  if (a.fault != 1) ptx::fence_async_shared();
  if (a.fault != 2) ptx::block_barrier();
  if (t == 0) {
    ptx::tma_store(a.target, {0, 0}, values);  // second
    if (a.fault != 3) ptx::bulk_commit();
    if (a.fault == 5) {
      ptx::bulk_wait_read<1>();
    } else if (a.fault != 4 && a.fault != 7) {
      ptx::bulk_wait_read<0>();
    }
  }
  if (a.fault == 7) return;
  if (a.fault != 6) ptx::block_barrier();
  if (t != 0 || a.fault != 6) values[t] = -1.0f;  // third
  if (t == 0) {
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

// What was stored is read, by the thread that waited and by others. 1: the wait is for the reads of
// the store only; 2: no barrier behind it.
BERTKERN_KERNEL(128) stored_then_read(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  float* values = shared_values();
  values[t] = a.x[t];
  ptx::fence_async();
  ptx::block_barrier();
  if (t == 0) {
    ptx::tma_store(a.target, {0, 0}, values);  // first
    ptx::bulk_commit();
    if (a.fault == 1) {
      ptx::bulk_wait_read<0>();
    } else {
      ptx::bulk_wait<0>();
    }
  }
  if (a.fault != 2) ptx::block_barrier();
  a.x[t] = a.y[127 - t];  // second
}

// Two stores of one thread to one place. 1: nothing between them.
BERTKERN_KERNEL(32) stored_twice(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  float* values = shared_values();
  for (int i = t; i < 256; i += 32) values[i] = a.x[i];
  ptx::fence_async_shared();
  ptx::block_barrier();
  if (t == 0) {
    ptx::tma_store(a.target, {0, 0}, values);
    ptx::bulk_commit();
    if (a.fault == 0) ptx::bulk_wait<0>();
    ptx::tma_store(a.target, {0, 0}, values + 128);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

// Places and sizes -------------------------------------------------------------------------------

// Loads by thread 0. 1: not aligned to 128; 2: not to what the swizzle asks for; 3: behind the end
// of shared memory; 4: of no tensor; 5: no multiple of 16 bytes; 6: of a source, 7: to a target,
// that is not aligned; 8: behind the end of x, 9: of shared memory; 10: to global memory; 11: with
// a barrier that is none; 12: a box of another rank than the map's.
BERTKERN_KERNEL(32) load_arguments(BERTKERN_GRID_CONSTANT Arguments a) {
  if (ptx::thread_index() != 0) return;
  ptx::Barrier* barrier = shared_barriers();
  char* tile = ptx::shared_memory() + 1024;
  ptx::barrier_init(barrier, 1);
  ptx::barrier_init_fence();
  const auto load = [&](const TensorMap& map, char* to) {
    ptx::barrier_expect_bytes(barrier, kBoxBytes);
    ptx::tma_load(to, map, {0, 4}, barrier, ptx::cache_normally());  // box
  };
  load(a.source, tile + (a.fault == 1 ? 64 : a.fault == 3 ? 2816 : 128));
  load(a.swizzled, tile + (a.fault == 2 ? 1152 : 1024));
  if (a.fault == 4) load(a.nowhere, tile + 2048);
  if (a.fault == 10) load(a.source, reinterpret_cast<char*>(a.x));
  if (a.fault == 12) {
    ptx::tma_load(tile, a.source, {0, 0, 0}, barrier, ptx::cache_normally());  // rank
  }
  const int bytes = a.fault == 5 ? 24 : 32;
  const float* from = a.x + (a.fault == 6 ? 1 : a.fault == 8 ? 508 : 504);
  char* to = tile + 2048 + (a.fault == 7 ? 8 : a.fault == 9 ? 1008 : 0);
  ptx::barrier_expect_bytes(barrier, bytes);
  ptx::bulk_load(to, from, bytes, a.fault == 11 ? barrier + 1 : barrier);  // row
  ptx::barrier_arrive(barrier);
  ptx::barrier_wait(barrier, 0);
  a.y[0] = *reinterpret_cast<float*>(to);
}

// Stores by thread 0. 1: not aligned to 128; 2: behind the end of shared memory; 3: to no tensor;
// 4: of what nobody has written.
BERTKERN_KERNEL(32) store_arguments(BERTKERN_GRID_CONSTANT Arguments a) {
  float* values = shared_values();
  for (int i = ptx::thread_index(); i < 256; i += 32) values[i] = a.x[i];
  ptx::fence_async_shared();
  ptx::block_barrier();
  if (ptx::thread_index() != 0) return;
  const int offset = a.fault == 1 ? 16 : a.fault == 2 ? 672 : a.fault == 4 ? 256 : 0;
  ptx::tma_store(a.fault == 3 ? a.nowhere : a.target, {0, 0}, values + offset);  // box
  ptx::bulk_commit();
  ptx::bulk_wait<0>();
}

const bool added = add_faults({
    {"loaded_over_writes", loaded_over_writes},
    {"stages_of_loads", stages_of_loads},
    {"written_over_loads", written_over_loads},
    {"loaded_twice", loaded_twice},
    {"loaded_from_writes", loaded_from_writes},
    {"written_where_loaded_from", written_where_loaded_from},
    {"loaded_over_copies", loaded_over_copies},
    {"stored_tile", stored_tile},
    {"stored_then_read", stored_then_read},
    {"stored_twice", stored_twice},
    {"load_arguments", load_arguments},
    {"store_arguments", store_arguments},
});

}  // namespace
}  // namespace bertkern::emulator::test
