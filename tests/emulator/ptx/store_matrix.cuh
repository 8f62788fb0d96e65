// csrc/ptx/store_matrix.cuh on the emulator's machine.
#pragma once

#include "ptx/memory.cuh"

namespace bertkern::ptx {

BERTKERN_DEVICE void store_matrix_4(void* row, const uint32_t (&words)[4]) {
  emulator::store_matrix(row, {{words[0], words[1], words[2], words[3]}}, false);
}
BERTKERN_DEVICE void store_matrix_4_transposed(void* row, const uint32_t (&words)[4]) {
  emulator::store_matrix(row, {{words[0], words[1], words[2], words[3]}}, true);
}

}  // namespace bertkern::ptx
