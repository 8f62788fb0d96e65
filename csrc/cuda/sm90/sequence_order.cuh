// In which order the sequences of a varlen batch are taken: the longest first, so that the blocks
// of a grid that come last have little to do, and a persistent grid's get about the same. Their
// lengths are on the device alone, so a kernel before the others finds it:
//
//   turn_i = |{j: len_j > len_i, or len_j = len_i and j < i}|,  order[turn_i] = i
//
// Each sequence has another turn, whatever the lengths, and the same in every run. A thread counts
// for one sequence, B · B comparisons in all; lengths pass through shared memory.
#pragma once

#include "cuda/attention_score.cuh"

namespace bertkern::sm90 {

using namespace cuda;

struct SequenceOrderArguments {
  const int32_t* cu_seqlens;  // [B + 1]
  int32_t* order;             // [B]
  int batch;
};

constexpr int kOrderThreads = 128;  // and as many lengths in shared memory at a time
constexpr int kOrderBytes = 4 * kOrderThreads;

BERTKERN_KERNEL(kOrderThreads)
sequence_order_kernel(const SequenceOrderArguments a) {
  const auto length_of = [&](int index) { return a.cu_seqlens[index + 1] - a.cu_seqlens[index]; };
  int* lengths = reinterpret_cast<int*>(ptx::shared_memory());
  const int thread = ptx::thread_index(), own = ptx::block_index() * kOrderThreads + thread;
  const int length = own < a.batch ? length_of(own) : 0;
  int turn = 0;
  for (int first = 0; first < a.batch; first += kOrderThreads) {
    ptx::block_barrier();  // nobody reads the lengths before these any more
    if (first + thread < a.batch) lengths[thread] = length_of(first + thread);
    ptx::block_barrier();  // these are there
    const int left = a.batch - first, count = left < kOrderThreads ? left : kOrderThreads;
    for (int n = 0; n < count; ++n) {
      const int other = lengths[n];
      const bool earlier = first + n < own ? other >= length : other > length;
      if (earlier) ++turn;
    }
  }
  if (own < a.batch) a.order[turn] = own;
}

}  // namespace bertkern::sm90
