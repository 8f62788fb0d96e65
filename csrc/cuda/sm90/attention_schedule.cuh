// Which tiles of queries a block of a persistent grid works on, one after the other, and how the
// warp that finds them hands them to the others.
//
// The tiles of a call are numbered. In round r block b takes number r · G + b, of G blocks, or in
// odd rounds r · G + G - 1 - b: where numbers fall in cost, every block then gets about the same.
// They do where the sequences of a varlen batch are numbered longest first (sequence_order.cuh).
// No counter in memory is needed, and what a block does depends on the call alone.
#pragma once

#include "cuda/attention_score.cuh"

namespace bertkern::sm90 {

using namespace cuda;

// What a schedule needs to know of a call beside its arguments.
struct AttentionSchedule {
  // Batched: how many (sequence, head) pairs take turns, the longest tiles of all of them first;
  // with 1 the tiles of a head follow each other. As many as have their keys in the second-level
  // cache. Varlen: 1, or else all heads of a sequence.
  int pairs;
};

// The number that a block takes in a round.
BERTKERN_DEVICE int number_in_round(int round) {
  const int blocks = ptx::block_count(), block = ptx::block_index();
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

// The tiles of a block in turn; its functions are called by all lanes of one warp.
template <int kRows, int kKeys>
class QueryTiles {
 public:
  BERTKERN_DEVICE QueryTiles(const AttentionKernelArguments& a, AttentionSchedule schedule)
      : a_(a), pairs_(schedule.pairs) {}

  // Whether there is one more, and which.
  BERTKERN_DEVICE bool next(QueryTile& tile) {
    const int number = number_in_round(round_++);
    return a_.cu_seqlens_q == nullptr ? batched(number, tile) : varlen(number, tile);
  }

 private:
  BERTKERN_DEVICE bool batched(int number, QueryTile& tile) const {
    const int turn = pairs_ * a_.blocks, all = a_.heads * a_.batch;
    const int first = number / turn * pairs_;
    if (first >= all) return false;
    const int pairs = first + pairs_ < all ? pairs_ : all - first;
    const int at = number % turn;
    if (at >= pairs * a_.blocks) return false;  // the last turn has fewer
    const int pair = first + at % pairs;
    tile =
        query_tile<kRows, kKeys>(a_, pair / a_.heads, pair % a_.heads, a_.blocks - 1 - at / pairs);
    return true;
  }

  // Lane n of the warp holds how many tiles there are up to and with the sequence whose turn is
  // first_ + n. The rows behind the last sequence are one more, which has no keys.
  BERTKERN_DEVICE bool varlen(int number, QueryTile& tile) {
    for (;;) {
      const int end = static_cast<int>(ptx::shuffle_index(up_to_, ptx::kWarpThreads - 1));
      if (number < end) break;
      first_ += ptx::kWarpThreads;
      if (first_ > a_.batch) return false;
      count_group(end);
    }
    int place = 0;  // how many of them end at or before the number
#pragma unroll
    for (int step = ptx::kWarpThreads / 2; step > 0; step /= 2) {
      const int end = static_cast<int>(ptx::shuffle_index(up_to_, place + step - 1));
      if (end <= number) place += step;
    }
    const int index = sequence_in_turn(a_, first_ + place), own = tiles_of(index);
    const int at = number - static_cast<int>(ptx::shuffle_index(up_to_, place)) + own * a_.heads;
    const int head = pairs_ > 1 ? at % a_.heads : at / own;
    const int turn = pairs_ > 1 ? at / a_.heads : at % own;
    tile = query_tile<kRows, kKeys>(a_, index, head, own - 1 - turn);
    if (index == a_.batch) tile.end_tile = tile.first_tile;
    return true;
  }

  // Of a head of a sequence.
  BERTKERN_DEVICE int tiles_of(int index) const {
    if (index > a_.batch) return 0;
    const int end = index < a_.batch ? a_.cu_seqlens_q[index + 1] : static_cast<int>(a_.total_q);
    return (end - a_.cu_seqlens_q[index] + kRows - 1) / kRows;
  }

  BERTKERN_DEVICE void count_group(int before) {
    const int lane = lane_index();
    uint32_t sum = static_cast<uint32_t>(tiles_of(sequence_in_turn(a_, first_ + lane)) * a_.heads);
#pragma unroll 1  // else the lanes of all steps are kept in registers all the while
    for (int step = 1; step < ptx::kWarpThreads; step *= 2) {
      const uint32_t other = ptx::shuffle_index(sum, lane < step ? lane : lane - step);
      if (lane >= step) sum += other;
    }
    up_to_ = sum + static_cast<uint32_t>(before);
  }

  const AttentionKernelArguments& a_;
  const int pairs_;
  int round_ = 0;
  int first_ = -ptx::kWarpThreads;  // varlen: of the 32 sequences at hand
  uint32_t up_to_ = 0;
};

}  // namespace bertkern::sm90
