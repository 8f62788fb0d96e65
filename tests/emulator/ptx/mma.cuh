// csrc/ptx/mma.cuh on the emulator's machine.
#pragma once

#include "ptx/memory.cuh"

namespace bertkern::ptx {

BERTKERN_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 emulator::Format format) {
  const emulator::Accumulators sum = emulator::mma_16x8x16(
      {{d[0], d[1], d[2], d[3]}}, {{a[0], a[1], a[2], a[3]}}, {{b[0], b[1]}}, format);
  d[0] = sum.value[0];
  d[1] = sum.value[1];
  d[2] = sum.value[2];
  d[3] = sum.value[3];
}
BERTKERN_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 half) {
  mma_16x8x16(d, a, b, emulator::Format::kHalf);
}
BERTKERN_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 bfloat16) {
  mma_16x8x16(d, a, b, emulator::Format::kBFloat16);
}

BERTKERN_DEVICE void load_matrix_4(uint32_t (&words)[4], const void* row) {
  const Words4 loaded = emulator::load_matrix(row, 4, false);
  words[0] = loaded.word[0];
  words[1] = loaded.word[1];
  words[2] = loaded.word[2];
  words[3] = loaded.word[3];
}
BERTKERN_DEVICE void load_matrix_4_transposed(uint32_t (&words)[4], const void* row) {
  const Words4 loaded = emulator::load_matrix(row, 4, true);
  words[0] = loaded.word[0];
  words[1] = loaded.word[1];
  words[2] = loaded.word[2];
  words[3] = loaded.word[3];
}
BERTKERN_DEVICE void load_matrix_2_transposed(uint32_t (&words)[2], const void* row) {
  const Words4 loaded = emulator::load_matrix(row, 2, true);
  words[0] = loaded.word[0];
  words[1] = loaded.word[1];
}

}  // namespace bertkern::ptx
