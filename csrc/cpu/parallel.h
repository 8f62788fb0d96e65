// parallel_for: work items on threads, reusing the OpenMP workers that the process already has.
#pragma once

#include <cstdint>
#include <functional>

namespace bertkern {

// Calls work(item) once for every item in [0, items), on at most `threads` threads. Items are
// handed out dynamically, so a result must depend on its item alone. Returns when all are done;
// rethrows the first exception.
void parallel_for(int64_t items, int threads, const std::function<void(int64_t)>& work);

// At most `threads`: as many as are worth waking for so many multiply-adds.
int threads_for(int64_t multiply_adds, int threads);

// This thread's scratch memory of at least `floats` floats, 64-byte aligned, contents undefined.
// The next call on this thread may return the same memory. Throws std::bad_alloc.
float* thread_scratch(int64_t floats);

// "OpenMP runtime of the process" or "threads": what parallel_for uses now.
const char* parallel_backend();

}  // namespace bertkern
