// A CUDA block on one CPU thread: every CUDA thread is a fiber, which runs until it waits for
// others.
//
// When no fiber can run, whole warps that wait in a shuffle exchange their values, and a block
// whose threads all wait at the barrier goes on. What then still waits would hang or be undefined
// on the device: it is an error. Threads run in ascending or in descending order: a missing barrier
// shows as a difference between the two.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace bertkern::emulator {

constexpr int kWarpThreads = 32;

class Block {
 public:
  Block(int threads, int shared_bytes, bool descending)
      : fibers_(threads), shared_(shared_bytes + kGuard), descending_(descending) {
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStackBytes]);
  }

  void run(int64_t index, int64_t count, const std::function<void()>& kernel) {
    index_ = index;
    count_ = count;
    kernel_ = &kernel;
    std::memset(shared_.data(), 0xFF, shared_.size());  // NaN as a float
    current_block_ = this;
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
      fiber.state = State::kReady;
    }
    while (run_ready() || release_shuffles() || release_barrier()) {
    }
    for (const Fiber& fiber : fibers_) {
      if (fiber.state != State::kDone) throw std::runtime_error("threads wait for ever: " + name());
    }
    for (size_t i = shared_.size() - kGuard; i < shared_.size(); ++i) {
      if (shared_[i] != '\xFF') throw std::runtime_error("shared memory overrun: " + name());
    }
  }

  static Block& current() { return *current_block_; }
  int thread() const { return running_; }
  int64_t index() const { return index_; }
  int64_t count() const { return count_; }
  char* shared() { return shared_.data(); }

  void barrier() { wait(State::kBarrier); }

  float shuffle_xor(float value, int mask) {
    Fiber& fiber = fibers_[running_];
    fiber.value = value;
    fiber.mask = mask;
    wait(State::kShuffle);
    return fibers_[running_].received;
  }

 private:
  static constexpr size_t kStackBytes = 1 << 16, kGuard = 64;
  enum class State { kReady, kBarrier, kShuffle, kDone };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    float value, received;
    int mask;
  };

  std::string name() const { return "block " + std::to_string(index_); }

  static void enter() {
    Block& block = *current_block_;
    (*block.kernel_)();
    block.fibers_[block.running_].state = State::kDone;
  }

  void wait(State state) {
    Fiber& fiber = fibers_[running_];
    fiber.state = state;
    swapcontext(&fiber.context, &scheduler_);
  }

  bool run_ready() {
    bool any = false;
    const int threads = static_cast<int>(fibers_.size());
    for (int i = 0; i < threads; ++i) {
      running_ = descending_ ? threads - 1 - i : i;
      if (fibers_[running_].state != State::kReady) continue;
      any = true;
      swapcontext(&scheduler_, &fibers_[running_].context);
    }
    return any;
  }

  bool release_shuffles() {
    bool any = false;
    for (size_t first = 0; first < fibers_.size(); first += kWarpThreads) {
      bool all = true;
      for (int lane = 0; lane < kWarpThreads; ++lane) {
        const Fiber& fiber = fibers_[first + lane];
        all = all && fiber.state == State::kShuffle && fiber.mask == fibers_[first].mask;
      }
      if (!all) continue;
      any = true;
      for (int lane = 0; lane < kWarpThreads; ++lane) {
        Fiber& fiber = fibers_[first + lane];
        fiber.received = fibers_[first + (lane ^ fiber.mask)].value;
        fiber.state = State::kReady;
      }
    }
    return any;
  }

  bool release_barrier() {
    for (const Fiber& fiber : fibers_) {
      if (fiber.state != State::kBarrier) return false;
    }
    for (Fiber& fiber : fibers_) fiber.state = State::kReady;
    return true;
  }

  inline static Block* current_block_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<char> shared_;
  bool descending_;
  int running_ = 0;
  int64_t index_ = 0, count_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  ucontext_t scheduler_;
};

}  // namespace bertkern::emulator
