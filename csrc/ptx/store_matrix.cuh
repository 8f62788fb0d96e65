// stmatrix: ldmatrix (ptx/mma.cuh) the other way round, from sm_90 on.
#pragma once

#include "ptx/memory.cuh"

namespace bertkern::ptx {

// Four matrices of 8 x 8 16-bit elements. Lane l gives the address for 8 elements, a multiple of
// 16, in shared memory: row l % 8 of matrix l / 8. Word i of lane l holds elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4 of matrix i, as accumulators of mma and wgmma do once they are packed.
// All 32 lanes take part.
BERTKERN_DEVICE void store_matrix_4(void* row, const uint32_t (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

// As store_matrix_4, each matrix transposed: word i of lane l holds elements 2 (l % 4) and
// 2 (l % 4) + 1 of column l / 4.
BERTKERN_DEVICE void store_matrix_4_transposed(void* row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

}  // namespace bertkern::ptx
