// Which of the faults that are compiled into the sources is there: mutant(7) is true in a process
// that has called choose_mutant(7).
#pragma once

// Not watched by the machine, and the same all the time.
extern "C" __attribute__((const)) bool mutant(int number);
