#include "mutant.h"

namespace {
int chosen = 0;  // 0: none
}

extern "C" bool mutant(int number) { return number == chosen; }

extern "C" __attribute__((visibility("default"))) void choose_mutant(int number) {
  chosen = number;
}
