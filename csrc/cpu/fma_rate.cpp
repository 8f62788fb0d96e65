// What the processor can multiply and add: independent chains of its widest multiply-add, from
// registers. The benchmarks' ceiling; no kernel uses it.
//
// Each of kChains accumulators waits for its own last result only: with a latency of 4 clocks and 2
// units, 8 chains fill the units, and 12 leave room for slower ones.
#include "fma_rate.h"

#include <algorithm>
#include <chrono>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define BERTKERN_X86 1
#include <immintrin.h>
#endif

namespace bertkern::cpu {
namespace {

constexpr int kChains = 12;
constexpr int64_t kSteps = 200000;  // of every chain, a call: about 0.5 ms
constexpr int kRepeats = 20;

volatile float sink;  // keeps the sums alive

// The multiply-adds of `kSteps` steps, each counted as two operations.
using Loop = double (*)();

double portable_fp32() {
  constexpr int kLanes = 16;
  float sums[kChains][kLanes] = {};
  const float factor = 1.0f + sink * 0.0f;
  for (int64_t step = 0; step < kSteps; ++step) {
    for (auto& chain : sums) {
      for (float& sum : chain) sum = sum * factor + factor;
    }
  }
  float total = 0.0f;
  for (const auto& chain : sums) {
    for (float sum : chain) total += sum;
  }
  sink = total;
  return 2.0 * kSteps * kChains * kLanes;
}

#ifdef BERTKERN_X86
__attribute__((target("avx2,fma"))) double avx2_fp32() {
  __m256 sums[kChains];
  for (auto& sum : sums) sum = _mm256_setzero_ps();
  const __m256 factor = _mm256_set1_ps(1.0f + sink * 0.0f);
  for (int64_t step = 0; step < kSteps; ++step) {
    for (auto& sum : sums) sum = _mm256_fmadd_ps(sum, factor, factor);
  }
  for (auto& sum : sums) sink = _mm256_cvtss_f32(sum);
  return 2.0 * kSteps * kChains * 8;
}

__attribute__((target("avx512f"))) double avx512_fp32() {
  __m512 sums[kChains];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  const __m512 factor = _mm512_set1_ps(1.0f + sink * 0.0f);
  for (int64_t step = 0; step < kSteps; ++step) {
    for (auto& sum : sums) sum = _mm512_fmadd_ps(sum, factor, factor);
  }
  for (auto& sum : sums) sink = _mm512_cvtss_f32(sum);
  return 2.0 * kSteps * kChains * 16;
}

__attribute__((target("avx512f,avx512bf16"))) double avx512_bf16() {
  __m512 sums[kChains];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_set1_ps(sink), _mm512_set1_ps(1.0f));
  for (int64_t step = 0; step < kSteps; ++step) {
    for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, pairs, pairs);
  }
  for (auto& sum : sums) sink = _mm512_cvtss_f32(sum);
  return 2.0 * kSteps * kChains * 32;
}

__attribute__((target("avx512f,avx512vnni"))) double avx512_int8() {
  __m512i sums[kChains];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  const __m512i bytes = _mm512_set1_epi8(static_cast<char>(1.0f + sink * 0.0f));
  for (int64_t step = 0; step < kSteps; ++step) {
    for (auto& sum : sums) sum = _mm512_dpbusd_epi32(sum, bytes, bytes);
  }
  for (auto& sum : sums) sink = static_cast<float>(_mm512_cvtsi512_si32(sum));
  return 2.0 * kSteps * kChains * 64;
}
#endif

// Null where the processor has no instruction for it.
Loop loop_of(FmaType type) {
#ifdef BERTKERN_X86
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f");
  switch (type) {
    case FmaType::kFloat32:
      if (avx512) return avx512_fp32;
      if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_fp32;
      return portable_fp32;
    case FmaType::kBFloat16:
      return avx512 && __builtin_cpu_supports("avx512bf16") ? avx512_bf16 : nullptr;
    case FmaType::kInt8:
      return avx512 && __builtin_cpu_supports("avx512vnni") ? avx512_int8 : nullptr;
  }
  return nullptr;
#else
  return type == FmaType::kFloat32 ? portable_fp32 : nullptr;
#endif
}

}  // namespace

std::vector<double> fma_rates(FmaType type, int threads) {
  std::vector<double> rates;
  const Loop loop = loop_of(type);
  if (loop == nullptr) return rates;
  const double operations = loop() * threads;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, threads, [loop](int64_t) { loop(); });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    rates.push_back(operations / taken.count());
  }
  return rates;
}

}  // namespace bertkern::cpu
