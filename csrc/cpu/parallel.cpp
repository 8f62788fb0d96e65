// parallel_for on the GNU OpenMP runtime that is already loaded (torch's), found by name at run
// time: a second OpenMP runtime in the process would double the threads, and torch's own workers
// are warm. Where there is none: std::thread.
#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

namespace bertkern {
namespace {

// The entry point that GCC's `#pragma omp parallel` compiles to; libomp exports it too.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

GompParallel find_gomp() {
  // Looked up again until found: torch may be imported after this module.
  static std::atomic<void*> found{nullptr};
  void* symbol = found.load(std::memory_order_acquire);
  if (symbol == nullptr) {
    symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    found.store(symbol, std::memory_order_release);
  }
  return reinterpret_cast<GompParallel>(symbol);
}

struct Job {
  int64_t items;
  const std::function<void(int64_t)>* work;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
};

void run_job(void* data) {
  Job& job = *static_cast<Job*>(data);
  try {
    for (int64_t item; (item = job.next.fetch_add(1, std::memory_order_relaxed)) < job.items;) {
      (*job.work)(item);
    }
  } catch (...) {  // not through the OpenMP runtime, which is C
    if (!job.failed.exchange(true)) job.error = std::current_exception();
  }
}

void run_on_threads(Job& job, int threads) {
  std::vector<std::thread> helpers;
  helpers.reserve(threads - 1);
  try {
    for (int i = 1; i < threads; ++i) helpers.emplace_back(run_job, &job);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started, and this one, do the work.
  }
  run_job(&job);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void parallel_for(int64_t items, int threads, const std::function<void(int64_t)>& work) {
  threads = static_cast<int>(std::min<int64_t>(threads, items));
  if (threads <= 1) {
    for (int64_t item = 0; item < items; ++item) work(item);
    return;
  }
  Job job;
  job.items = items;
  job.work = &work;
  if (GompParallel gomp = find_gomp()) {
    gomp(run_job, &job, static_cast<unsigned>(threads), 0);
  } else {
    run_on_threads(job, threads);
  }
  if (job.failed) std::rethrow_exception(job.error);
}

int threads_for(int64_t multiply_adds, int threads) {
  constexpr int64_t kLeastWork = 1 << 17;  // of a thread: about what waking it costs
  return static_cast<int>(std::clamp<int64_t>(multiply_adds / kLeastWork, 1, threads));
}

float* thread_scratch(int64_t floats) {
  constexpr int64_t kAlignment = 64 / sizeof(float);
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t size = 0;
  if (size < floats + kAlignment) {
    memory.reset();
    size = 0;
    memory.reset(new float[floats + kAlignment]);
    size = floats + kAlignment;
  }
  const auto address = reinterpret_cast<uintptr_t>(memory.get());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

const char* parallel_backend() {
  return find_gomp() != nullptr ? "OpenMP runtime of the process" : "threads";
}

}  // namespace bertkern
