// Barriers of phases (ptx/mbarrier.cuh), used rightly and with faults; see faults.cuh.
#include "kernels/faults.cuh"

namespace bertkern::emulator::test {
namespace {

// Arrivals and waits -----------------------------------------------------------------------------

// Three phases. 1: no wait; 2: a wait for the other parity; 3: the barrier expects one arrival
// less; 4: threads arrive before they write; 5: one does not arrive.
BERTKERN_KERNEL(128) arrive_and_wait(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  make_barrier(barrier, a.fault == 3 ? 127 : 128);
  values[t] = 0.0f;
  ptx::block_barrier();
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    if (a.fault == 4) ptx::barrier_arrive(barrier);
    values[t] = a.x[t] + static_cast<float>(round);  // first
    if (a.fault != 4 && !(a.fault == 5 && t == 70)) ptx::barrier_arrive(barrier);
    if (a.fault != 1) ptx::barrier_wait(barrier, (round & 1) ^ (a.fault == 2 ? 1 : 0));  // waits
    sum += values[(t + 40) % 128];                                                       // second
    ptx::block_barrier();
  }
  a.y[t] = sum;
}

// 1: whether the phase is over is asked once, before this thread arrives, and the answer ignored.
BERTKERN_KERNEL(128) try_wait(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  make_barrier(barrier, 128);
  values[t] = 0.0f;
  ptx::block_barrier();
  values[t] = a.x[t];  // first
  if (a.fault == 1) {
    ptx::barrier_try_wait(barrier, 0);
    ptx::barrier_arrive(barrier);
  } else {
    ptx::barrier_arrive(barrier);
    while (!ptx::barrier_try_wait(barrier, 0)) {
    }
  }
  a.y[t] = values[(t + 40) % 128];  // second
}

// Warp 0 produces, the others consume; two stages. 1: it does not wait for an empty stage; 2: the
// others do not say that one is empty; 3: it waits for a phase before the first; 4: the others wait
// for the same parity when a stage comes again.
BERTKERN_KERNEL(128) roles_of_warps(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index(), lane = lane_index();
  ptx::Barrier *full = shared_barriers(), *empty = full + 2;
  float* values = shared_values();
  for (int stage = 0; stage < 2; ++stage) {
    make_barrier(full + stage, 32);
    make_barrier(empty + stage, 96);
  }
  if (t < 64) values[t] = 0.0f;
  ptx::block_barrier();
  float sum = 0.0f;
  for (int round = 0; round < 5; ++round) {
    const int stage = round % 2, parity = round / 2 & 1;
    if (warp_index() == 0) {
      if (a.fault != 1) ptx::barrier_wait(empty + stage, parity ^ (a.fault == 3 ? 0 : 1));  // waits
      values[stage * 32 + lane] = a.x[lane] + static_cast<float>(round);
      ptx::barrier_arrive(full + stage);
    } else {
      ptx::barrier_wait(full + stage, a.fault == 4 ? 0 : parity);
      sum += values[stage * 32 + (lane + t / 32) % 32];
      if (a.fault != 2) ptx::barrier_arrive(empty + stage);
    }
  }
  a.y[t] = sum;
}

// Thread 0 ends two phases, thread 32 waits for the first. 1: nothing makes it look before the
// second is over, and the third has its parity; 2: it looks when the second is over.
BERTKERN_KERNEL(64) missed_phase(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier *barrier = shared_barriers(), *seen = barrier + 1;
  make_barrier(barrier, 1);
  make_barrier(seen, 1);
  ptx::block_barrier();
  if (t == 0) {
    ptx::barrier_arrive(barrier);
    if (a.fault == 0) ptx::barrier_wait(seen, 0);
    ptx::barrier_arrive(barrier);
    if (a.fault == 1) ptx::barrier_arrive(barrier);
  }
  if (a.fault == 2) ptx::block_barrier();
  if (t == 32) {
    ptx::barrier_wait(barrier, 0);  // waits
    ptx::barrier_arrive(seen);
  }
}

// What a thread learned from one barrier it hands on by the next, of whatever kind: thread 0
// writes, thread 32 hands on, warp 2 reads. 1: thread 32 does not wait for thread 0; 2: warp 2 not
// for it.
BERTKERN_KERNEL(96) handed_on(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier *first = shared_barriers(), *second = first + 1;
  float* values = shared_values();
  make_barrier(first, 1);
  make_barrier(second, 32);
  if (t == 0) values[0] = 0.0f;
  ptx::block_barrier();
  if (t == 0) {
    values[0] = a.x[1];  // first
    ptx::barrier_arrive(first);
  }
  if (warp_index() == 1) {
    if (t == 32 && a.fault != 1) ptx::barrier_wait(first, 0);
    ptx::warp_barrier();
    ptx::barrier_arrive(second);
  }
  if (warp_index() == 2) {
    if (t == 64 && a.fault != 2) ptx::barrier_wait(second, 0);
    ptx::named_barrier_sync(1, 32);
    a.y[t] = values[0];  // second
  }
}

// Warp 0 loads, warps 1 and 2 compute and tell each other, warp 3 adds. 1: the named barrier is
// missing; 2: those who compute do not arrive; 3: warp 3 waits for what was loaded only.
BERTKERN_KERNEL(128) roles_and_named_barriers(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier *loaded = shared_barriers(), *computed = loaded + 1;
  float *values = shared_values(), *halves = values + 512, *sums = halves + 64;
  make_barrier(loaded, 1);
  make_barrier(computed, 64);
  if (t < 64) halves[t] = sums[t] = 0.0f;
  ptx::block_barrier();
  if (warp_index() == 0) {
    if (ptx::elect_one()) {
      ptx::barrier_arrive_expect_bytes(loaded, 2048);
      ptx::bulk_load(values, a.x, 2048, loaded);
    }
  } else if (warp_index() < 3) {
    const int own = t - 32;
    ptx::barrier_wait(loaded, 0);
    halves[own] = values[own] + values[own + 64];  // written
    if (a.fault != 1) ptx::named_barrier_sync(1, 64);
    sums[own] = halves[own] + halves[own ^ 32];  // first
    if (a.fault != 2) ptx::barrier_arrive(computed);
  } else {
    ptx::barrier_wait(a.fault == 3 ? loaded : computed, 0);  // waits
    a.y[t] = sums[t - 96];                                   // second
  }
}

// The life of a barrier --------------------------------------------------------------------------

// 1: no fence behind init; 2: no barrier of the block; 3: no init; 4: two threads init; 5: an
// arrival at what was invalidated; 6: other use of the bytes without that; 7: init of what is a
// barrier.
BERTKERN_KERNEL(128) life_of_a_barrier(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* words = shared_floats();
  if (a.fault != 3 && (t == 0 || (a.fault == 4 && t == 32))) {
    ptx::barrier_init(barrier, 128);  // init
    if (a.fault != 1) ptx::barrier_init_fence();
  }
  if (a.fault != 2) ptx::block_barrier();
  if (a.fault == 7 && t == 64) ptx::barrier_init(barrier, 128);  // again
  if (a.fault == 7) ptx::block_barrier();
  ptx::barrier_arrive(barrier);  // used
  ptx::barrier_wait(barrier, 0);
  ptx::block_barrier();
  if (t == 0 && a.fault != 6) ptx::barrier_invalidate(barrier);
  ptx::block_barrier();
  if (a.fault == 5 && t == 40) ptx::barrier_arrive(barrier);  // late
  if (t < 2) words[t] = a.x[t];                               // words
  ptx::block_barrier();
  a.y[t] = words[t % 2];
}

// 1, 2: arrivals, 3, 4: bytes, 7: a parity that no barrier has; 5: half a barrier; 6: in global
// memory; 8: behind the end.
BERTKERN_KERNEL(32) barrier_arguments(BERTKERN_GRID_CONSTANT Arguments a) {
  if (ptx::thread_index() != 0) return;
  char* place = ptx::shared_memory() + (a.fault == 5 ? 4 : a.fault == 8 ? 4096 : 0);
  void* barrier_place = a.fault == 6 ? static_cast<void*>(a.x) : place;
  auto* barrier = static_cast<ptx::Barrier*>(barrier_place);
  ptx::barrier_init(barrier, a.fault == 1 ? 0 : a.fault == 2 ? 1 << 20 : (1 << 20) - 1);
  ptx::barrier_init_fence();
  if (a.fault == 3) ptx::barrier_expect_bytes(barrier, -1);
  if (a.fault == 4) ptx::barrier_expect_bytes(barrier, 1 << 20);
  ptx::barrier_expect_bytes(barrier, 0);
  ptx::barrier_wait(barrier, a.fault == 7 ? 2 : 1);
}

// 1: a thread, 2: a copy writes where a barrier is.
BERTKERN_KERNEL(64) overwritten_barrier(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier *barrier = shared_barriers(), *other = barrier + 2;
  make_barrier(barrier, 64);
  make_barrier(other, 1);
  ptx::block_barrier();
  if (a.fault == 1 && t == 40) barrier->bits = 0;  // first
  if (t == 0) {
    ptx::barrier_arrive_expect_bytes(other, 16);
    ptx::bulk_load(a.fault == 2 ? reinterpret_cast<float*>(barrier) : shared_values(), a.x, 16,
                   other);
  }
  ptx::barrier_wait(other, 0);
  ptx::barrier_arrive(barrier);
  ptx::barrier_wait(barrier, 0);
}

// Bytes ------------------------------------------------------------------------------------------

// 1: fewer bytes are expected than come; 2: more; 3: nobody waits before reading; 4: none are
// expected; 5: nobody waits at all; 6: a wait for the other parity; 7: they are expected by the
// phase after.
BERTKERN_KERNEL(128) expected_bytes(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  make_barrier(barrier, 1);
  for (int i = t; i < 512; i += 128) values[i] = 0.0f;
  ptx::fence_async_shared();
  ptx::block_barrier();
  if (t == 0) {
    const int bytes = a.fault == 1 ? 1024 : a.fault == 2 ? 2064 : 2048;
    if (a.fault == 4 || a.fault == 7) {
      ptx::barrier_arrive(barrier);
    } else {
      ptx::barrier_arrive_expect_bytes(barrier, bytes);
    }
    if (a.fault == 7) ptx::barrier_expect_bytes(barrier, bytes);
    ptx::bulk_load(values, a.x, 2048, barrier);  // first
  }
  if (a.fault == 5) return;
  if (a.fault != 3) ptx::barrier_wait(barrier, a.fault == 6 ? 1 : 0);  // waits
  a.y[t] = values[4 * t + 1];                                          // second
  ptx::barrier_wait(barrier, 0);
}

// Bytes that are announced in parts and come before all are; the phase waits for the arrival.
BERTKERN_KERNEL(64) bytes_in_parts(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  make_barrier(barrier, 2);
  ptx::block_barrier();
  if (t == 0) {
    ptx::barrier_expect_bytes(barrier, 512);
    ptx::bulk_load(values, a.x, 512, barrier);
    ptx::barrier_arrive(barrier);
    ptx::bulk_load(values + 128, a.x + 128, 512, barrier);
  }
  if (t == 32) ptx::barrier_arrive_expect_bytes(barrier, 512);
  ptx::barrier_wait(barrier, 0);
  a.y[t] = values[t] + values[t + 128];
}

// 1: an arrival more than the phase expects, which goes on for its bytes.
BERTKERN_KERNEL(32) too_many_arrivals(BERTKERN_GRID_CONSTANT Arguments a) {
  ptx::Barrier* barrier = shared_barriers();
  make_barrier(barrier, 1);
  ptx::block_barrier();
  if (ptx::thread_index() == 0) {
    ptx::barrier_arrive_expect_bytes(barrier, 16);
    if (a.fault == 1) ptx::barrier_arrive(barrier);  // first
    ptx::bulk_load(shared_values(), a.x, 16, barrier);
  }
  ptx::barrier_wait(barrier, 0);
}

// Lane 1 writes and expects bytes, lane 0 has them copied and arrives. 1: lane 1 does not arrive.
BERTKERN_KERNEL(64) expecting_orders_nothing(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  make_barrier(barrier, a.fault == 1 ? 1 : 2);
  if (t == 1) values[0] = 0.0f;
  ptx::block_barrier();
  if (warp_index() == 0) {
    if (t == 1) {
      values[0] = a.x[1];  // first
      if (a.fault == 1) {
        ptx::barrier_expect_bytes(barrier, 16);
      } else {
        ptx::barrier_arrive_expect_bytes(barrier, 16);
      }
    }
    ptx::shuffle_index(0, 1);
    if (t == 0) {
      ptx::bulk_load(values + 4, a.x, 16, barrier);
      ptx::barrier_arrive(barrier);
    }
  } else {
    ptx::barrier_wait(barrier, 0);
    a.y[t] = values[0] + values[7];  // second
  }
}

const bool added = add_faults({
    {"arrive_and_wait", arrive_and_wait},
    {"try_wait", try_wait},
    {"roles_of_warps", roles_of_warps},
    {"missed_phase", missed_phase},
    {"handed_on", handed_on},
    {"roles_and_named_barriers", roles_and_named_barriers},
    {"life_of_a_barrier", life_of_a_barrier},
    {"barrier_arguments", barrier_arguments},
    {"overwritten_barrier", overwritten_barrier},
    {"expected_bytes", expected_bytes},
    {"bytes_in_parts", bytes_in_parts},
    {"too_many_arrivals", too_many_arrivals},
    {"expecting_orders_nothing", expecting_orders_nothing},
});

}  // namespace
}  // namespace bertkern::emulator::test
