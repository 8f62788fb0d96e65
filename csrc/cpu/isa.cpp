// Picks the kernels of the best instruction set that was compiled in and that this processor has.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "params.h"

namespace bertkern {

// BERTKERN_HAS_<ISA> comes from setup.py, one for each set that it compiles.
#define BERTKERN_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels table; \
  }
BERTKERN_DECLARE(isa_baseline)
#ifdef BERTKERN_HAS_AVX2
BERTKERN_DECLARE(isa_avx2)
#endif
#ifdef BERTKERN_HAS_AVX512
BERTKERN_DECLARE(isa_avx512)
#endif
#undef BERTKERN_DECLARE

namespace {

constexpr int kMostIsas = 3;

struct Available {
  const Kernels* tables[kMostIsas];
  const char* names[kMostIsas];
  int count = 0;

  void add(const Kernels& table) {
    tables[count] = &table;
    names[count++] = table.isa;
  }

  Available() {
    add(isa_baseline::table);
#if defined(BERTKERN_HAS_AVX2) || defined(BERTKERN_HAS_AVX512)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef BERTKERN_HAS_AVX2
    // Every processor with AVX2 has F16C; old compilers cannot ask for it by name.
    if (avx2) add(isa_avx2::table);
#endif
#ifdef BERTKERN_HAS_AVX512
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      add(isa_avx512::table);
    }
#endif
  }
};

const Available& available() {
  static const Available found;
  return found;
}

const Kernels* find(const char* name) {
  for (int i = 0; i < available().count; ++i) {
    if (std::strcmp(available().names[i], name) == 0) return available().tables[i];
  }
  return nullptr;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{[] {
    const char* wanted = std::getenv("BERTKERN_CPU_ISA");
    const Kernels* found = wanted != nullptr ? find(wanted) : nullptr;
    return found != nullptr ? found : available().tables[available().count - 1];
  }()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

const char* const* available_isas(int* count) {
  *count = available().count;
  return available().names;
}

bool use_isa(const char* name) {
  const Kernels* found = find(name);
  if (found != nullptr) chosen().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

}  // namespace bertkern
