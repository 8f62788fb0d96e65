// A small generator of random numbers (splitmix64; Steele, Lea & Flood, Fast splittable
// pseudorandom number generators, 2014).
#pragma once

#include <cstdint>

namespace bertkern::emulator {

class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  // Uniform in [0, end).
  uint32_t below(uint32_t end) { return static_cast<uint32_t>(((bits() >> 32) * end) >> 32); }

 private:
  uint64_t state_;
};

}  // namespace bertkern::emulator
