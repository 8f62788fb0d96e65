// mma.sync: d += a b for a 16 x 16, b 16 x 8, d 16 x 8, by one warp; and the loads of its operands
// from shared memory.
//
// Fragments, with g = lane / 4 and t = lane % 4; two 16-bit elements in a word, the lower index
// low:
//   d[0], d[1]: row g, columns 2t, 2t + 1;       d[2], d[3]: row g + 8
//   a[0]: row g, k 2t, 2t + 1;  a[1]: row g + 8;  a[2]: row g, k 2t + 8, 2t + 9;  a[3]: row g + 8
//   b[0]: column g, k 2t, 2t + 1;                 b[1]: k 2t + 8, 2t + 9
#pragma once

#include "ptx/memory.cuh"

namespace bertkern::ptx {

// mma.sync.aligned.m16n8k16.row.col, fp32 accumulators. All 32 lanes take part.
BERTKERN_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
BERTKERN_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ldmatrix: matrices of 8 x 8 16-bit elements. Lane l gives the address of 8 elements, a multiple
// of 16, in shared memory: row l % 8 of matrix l / 8. Word i of lane l holds elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4 of matrix i. All 32 lanes take part.
BERTKERN_DEVICE void load_matrix_4(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// As load_matrix_4, each matrix transposed: word i of lane l holds elements 2 (l % 4) and
// 2 (l % 4) + 1 of column l / 4.
BERTKERN_DEVICE void load_matrix_4_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two matrices; the addresses of lanes 0 to 15 count.
BERTKERN_DEVICE void load_matrix_2_transposed(uint32_t (&words)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace bertkern::ptx
