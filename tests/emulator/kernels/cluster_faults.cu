// Clusters, whose blocks reach each other's shared memory (ptx/cluster.cuh, ptx/mbarrier.cuh,
// ptx/tma.cuh), used rightly and with faults; see faults.cuh.
#include "kernels/faults.cuh"

namespace bertkern::emulator::test {
namespace {

BERTKERN_DEVICE int next_rank() { return (ptx::cluster_rank() + 1) % ptx::cluster_size(); }
BERTKERN_DEVICE float* own_y(const Arguments& a) { return a.y + ptx::block_index() * 32; }

BERTKERN_DEVICE void cluster_barrier() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// Which block of its cluster a block is.
BERTKERN_KERNEL(32) ranks(BERTKERN_GRID_CONSTANT Arguments a) {
  own_y(a)[ptx::thread_index()] =
      static_cast<float>(10 * ptx::cluster_rank() + ptx::cluster_size());
}

// Each block writes to the next one. 1: at once, though that may not have started; 2: nobody waits
// before reading; 3: a block that the cluster does not have; 4: the last looks again at the first,
// which may have ended; 5: a thread does not come; 6: one arrives twice; 7: one waits without; 8:
// threads of a block agree, but not those of the cluster.
BERTKERN_KERNEL(32) written_by_others(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  float* values = shared_values();
  values[32 + t] = 0.0f;
  if (a.fault == 5 && t == 7) ptx::block_barrier();
  if (a.fault == 6 && t == 7) ptx::cluster_arrive();
  if (a.fault == 7 && t == 7) ptx::cluster_wait();  // early
  if (a.fault != 1) cluster_barrier();              // waits
  const int rank = a.fault == 3 ? ptx::cluster_size() : next_rank();
  const ptx::ClusterAddress place = ptx::cluster_address(values + 32 + t, rank);  // place
  ptx::store_cluster(place, a.x[t] + static_cast<float>(ptx::cluster_rank()));    // first
  if (a.fault == 8) {
    ptx::block_barrier();
  } else {
    ptx::cluster_arrive();
    if (a.fault != 2) ptx::cluster_wait();
  }
  own_y(a)[t] = values[32 + (t + 1) % 32];  // second
  if (a.fault == 2) ptx::cluster_wait();
  if (a.fault == 4 && ptx::cluster_rank() == 1) own_y(a)[t] = ptx::load_cluster<float>(place);
  if (a.fault == 5 && t != 7) ptx::block_barrier();
}

// Each block reads from the next one, values of every width. 1: no barrier before; 2: none behind,
// so that a block may end; 3: before, one of the block; 4: values are overwritten without one.
BERTKERN_KERNEL(32) read_by_others(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  float* values = shared_values();
  auto* halves = reinterpret_cast<ptx::half*>(values + 128);
  const auto rank = static_cast<float>(ptx::cluster_rank());
  for (int i = 0; i < 4; ++i) values[4 * t + i] = a.x[4 * t + i] + rank;  // first
  halves[t] = ptx::from_float(a.x[t] + rank, ptx::half{});
  if (a.fault == 3) ptx::block_barrier();
  if (a.fault != 1 && a.fault != 3) cluster_barrier();
  const int next = next_rank();
  const auto words =
      ptx::load_cluster<ptx::Words4>(ptx::cluster_address(values + 4 * t, next));  // second
  const auto word = ptx::load_cluster<float>(ptx::cluster_address(values + t, next));
  const auto half = ptx::load_cluster<ptx::half>(ptx::cluster_address(halves + t, next));
  own_y(a)[t] = word + ptx::to_float(half) + static_cast<float>(words.word[3] >> 24);
  if (a.fault == 4) values[4 * t] = 1.0f;  // third
  if (a.fault != 2) cluster_barrier();
}

// Each block writes to the next one and arrives at its barrier. 1: the wait is for threads of the
// block only; 2: no wait; 3: an arrival before the store; 4: only the block knows of the barrier's
// init.
BERTKERN_KERNEL(32) arrivals_of_others(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  values[32 + t] = 0.0f;
  if (a.fault == 4) cluster_barrier();
  make_barrier(barrier, 32);
  if (a.fault == 4) {
    ptx::block_barrier();
  } else {
    cluster_barrier();
  }
  const int next = next_rank();
  const ptx::ClusterAddress arrival = ptx::cluster_address(barrier, next);
  if (a.fault == 3) ptx::barrier_arrive_cluster(arrival);
  ptx::store_cluster(ptx::cluster_address(values + 32 + t, next),  // first
                     a.x[t] + static_cast<float>(ptx::cluster_rank()));
  if (a.fault != 3) ptx::barrier_arrive_cluster(arrival);  // used
  if (a.fault == 1) {
    ptx::barrier_wait(barrier, 0);
  } else if (a.fault != 2) {
    ptx::barrier_wait_cluster(barrier, 0);
  }
  own_y(a)[t] = values[32 + (t + 1) % 32];  // second
  cluster_barrier();
}

// Each block has a row copied to the next one. 1: no fence behind what threads wrote of it; 2: no
// wait; 3: a barrier of the own block counts the bytes; 4: the row is overwritten before anybody
// knows that it has been read; 5: it goes behind the end; 6: the block may end before that.
BERTKERN_KERNEL(32) copied_to_others(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier* barrier = shared_barriers();
  float* values = shared_values();
  make_barrier(barrier, 1);
  values[32 + t] = 0.0f;
  ptx::fence_async();  // the copy of another block will write there
  values[t] = a.x[t] + static_cast<float>(100 * ptx::cluster_rank());  // first
  if (a.fault != 1) ptx::fence_async_shared();
  cluster_barrier();
  const int next = next_rank();
  const int counts = a.fault == 3 ? 1 - next : next;
  if (t == 0) {
    const auto target = ptx::cluster_address(values + (a.fault == 5 ? 752 : 32), next);
    const auto arrival = ptx::cluster_address(barrier, counts);
    ptx::barrier_arrive_expect_bytes(barrier, 128);
    ptx::bulk_copy_cluster(target, values, 128, arrival);  // second
  }
  if (a.fault != 2) ptx::barrier_wait(barrier, 0);
  own_y(a)[t] = values[32 + t];  // third
  if (a.fault == 6) return;
  if (a.fault != 4) cluster_barrier();
  values[t] = 0.0f;  // fourth
  if (a.fault == 4) cluster_barrier();
}

const bool added = add_faults({
    {"ranks", ranks},
    {"written_by_others", written_by_others},
    {"read_by_others", read_by_others},
    {"arrivals_of_others", arrivals_of_others},
    {"copied_to_others", copied_to_others},
});

}  // namespace
}  // namespace bertkern::emulator::test
