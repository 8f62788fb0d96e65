// What blocks of a grid hand to each other through global memory (ptx/grid.cuh), rightly and with
// faults; see faults.cuh. x holds integers here.
#include "kernels/faults.cuh"

namespace bertkern::emulator::test {
namespace {

BERTKERN_DEVICE int* counters(const Arguments& a) { return reinterpret_cast<int*>(a.x); }

// Every thread takes numbers; what it does with one is its own. 1: a number is no licence to read
// what another thread wrote before it took the one before.
BERTKERN_KERNEL(32) handed_out_work(BERTKERN_GRID_CONSTANT Arguments a) {
  for (;;) {
    const int work = ptx::atomic_add(counters(a), 1);
    if (work >= 128) break;
    a.y[work] = static_cast<float>(work);  // first
    if (a.fault == 1 && work > 0)
      counters(a)[256 + work] = static_cast<int>(a.y[work - 1]);  // second
  }
}

// Blocks take turns at a sum. 1: the turn is passed on by an addition that releases nothing; 2:
// taken by a load that acquires nothing; 3: passed on before the block's threads have come; 4:
// taken by one thread alone; 5: passed on by a plain store.
BERTKERN_KERNEL(64) turns(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index(), block = ptx::block_index();
  int *turn = counters(a), *sums = turn + 64;
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  if (t == 0) {
    if (a.fault == 2) {
      while (ptx::load_relaxed(turn) != block) {
      }
    } else {
      ptx::wait_until_equal(turn, block);
    }
  }
  if (a.fault != 4) ptx::block_barrier();
  sums[t] = 2 * sums[t] + block;  // sum
  if (a.fault != 3) ptx::block_barrier();
  if (t == 0) {
    if (a.fault == 1) {
      ptx::atomic_add(turn, 1);
    } else if (a.fault == 5) {
      *turn = block + 1;  // turn
    } else {
      ptx::store_release(turn, block + 1);
    }
  }
}

// The block that is last adds what all have written. 1: they count without telling; 2: a thread
// counts for the others before they have come; 3: every block reads.
BERTKERN_KERNEL(64) last_block(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index(), block = ptx::block_index(), blocks = ptx::block_count();
  int *count = counters(a), *parts = count + 128;
  auto* is_last = reinterpret_cast<int*>(ptx::shared_memory());
  parts[64 * block + t] = block + t;  // first
  if (a.fault != 2) ptx::block_barrier();
  if (t == 0) {
    const int before = a.fault == 1 ? ptx::atomic_add(count, 1) : ptx::atomic_add_acq_rel(count, 1);
    *is_last = a.fault == 3 || before == blocks - 1 ? 1 : 0;
  }
  ptx::block_barrier();
  if (*is_last == 0) return;
  int sum = 0;
  for (int other = 0; other < blocks; ++other) sum += parts[64 * other + t];  // second
  a.y[t] = static_cast<float>(sum);
}

// Block 0 writes and raises a flag, for which every thread of the others waits on its own. 1: they
// read before; 2: block 0 writes after.
BERTKERN_KERNEL(32) flag(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  int *raised = counters(a), *value = raised + 32;
  if (ptx::block_index() == 0) {
    if (t != 0) return;
    if (a.fault != 2) *value = 7;  // first
    ptx::store_release(raised, 1);
    if (a.fault == 2) *value = 7;  // first
    return;
  }
  int seen = a.fault == 1 ? *value : 0;  // second
  while (ptx::load_acquire(raised) == 0) {
  }
  if (a.fault != 1) seen = *value;  // second
  a.y[32 * (ptx::block_index() - 1) + t] = static_cast<float>(seen);
}

// Block 0 writes what block 1 has loaded by the engine. 1: no fence behind the writes; 2: no
// barrier behind that; 3: nothing is released.
BERTKERN_KERNEL(32) loaded_by_another_block(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  int *turn = counters(a), *values = turn + 128;
  auto* barrier = shared_barriers();
  if (ptx::block_index() == 0) {
    values[t] = 3 * t;  // first
    if (a.fault != 1) ptx::fence_async();
    if (a.fault != 2) ptx::block_barrier();
    if (t == 0 && a.fault == 3) ptx::atomic_add(turn, 1);
    if (t == 0 && a.fault != 3) ptx::store_release(turn, 1);
  } else if (ptx::block_index() == 1) {
    make_barrier(barrier, 1);
    ptx::block_barrier();
    if (t == 0) {
      ptx::wait_until_equal(turn, 1);
      ptx::barrier_arrive_expect_bytes(barrier, 128);
      ptx::bulk_load(shared_values(), values, 128, barrier);  // second
    }
    ptx::barrier_wait(barrier, 0);
    a.y[t] = static_cast<float>(reinterpret_cast<int*>(shared_values())[t]);
  }
}

// Block 0 has the engine store what block 1 reads. 1: released once the tile was read; 2: before
// the wait.
BERTKERN_KERNEL(128) stored_by_another_block(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  int* turn = counters(a);
  if (ptx::block_index() == 0) {
    shared_values()[t] = static_cast<float>(5 * t);
    ptx::fence_async_shared();
    ptx::block_barrier();
    if (t == 0) {
      ptx::tma_store(a.target, {0, 0}, shared_values());  // first
      ptx::bulk_commit();
      if (a.fault == 2) ptx::store_release(turn, 1);
      if (a.fault == 1) {
        ptx::bulk_wait_read<0>();
      } else {
        ptx::bulk_wait<0>();
      }
      if (a.fault != 2) ptx::store_release(turn, 1);
    }
  } else if (ptx::block_index() == 1) {
    if (t == 0) ptx::wait_until_equal(turn, 1);
    ptx::block_barrier();
    turn[128 + t] = static_cast<int>(a.y[127 - t]);  // second
  }
}

// 1: block 0 waits for what nobody stores; 2: for a block of a higher index, which may not be there
// before this one is gone.
BERTKERN_KERNEL(32) waits_for_others(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index(), block = ptx::block_index();
  int* words = counters(a);
  if (t != 0) return;
  if (a.fault == 0 && block != 0) ptx::wait_until_equal(words + block - 1, 1);
  if (a.fault == 1 && block == 0) ptx::wait_until_equal(words + 32, 1);         // waits
  if (a.fault == 2 && block != 3) ptx::wait_until_equal(words + block + 1, 1);  // waits
  ptx::store_release(words + block, 1);
}

const bool added = add_faults({
    {"handed_out_work", handed_out_work},
    {"turns", turns},
    {"last_block", last_block},
    {"flag", flag},
    {"loaded_by_another_block", loaded_by_another_block},
    {"stored_by_another_block", stored_by_another_block},
    {"waits_for_others", waits_for_others},
});

}  // namespace
}  // namespace bertkern::emulator::test
