// wgmma: d (+)= a b for a 64 x 16, b 16 x N, d 64 x N, by a warpgroup: four warps, the first of
// them a multiple of four in its block. It runs on while the threads compute.
//
// Fragments, with w the warp in its group, g = lane / 4, t = lane % 4:
//   d[n][0], d[n][1]: row 16w + g, columns 8n + 2t, 8n + 2t + 1;   d[n][2], d[n][3]: row 16w + g +
//   8 a[0]: row 16w + g, k 2t, 2t + 1;  a[1]: row + 8;  a[2]: k 2t + 8, 2t + 9;  a[3]: row + 8
// So d[n] is what ptx/mma.cuh calls d, and two neighbouring d[n], packed, are an a.
//
// The order of a product: wgmma_fence(registers), wgmma(...) one or more, wgmma_commit(),
// wgmma_wait<n>(registers). In between the program does not touch the registers of d and a, and
// does not write the tiles. All calls are by all 128 threads, with the same descriptors.
#pragma once

#include "common/shared_tile.h"
#include "ptx/memory.cuh"

namespace bertkern::ptx {

// The descriptor (common/shared_tile.h) of the tile at `tile`, a multiple of swizzle_alignment.
template <Swizzle kSwizzle, int kLeadingBytes, int kStrideBytes>
BERTKERN_DEVICE MatrixDescriptor describe_tile(const void* tile) {
  return matrix_descriptor<kSwizzle, kLeadingBytes, kStrideBytes>(shared_address(tile));
}

// Holds the registers at this place of the program: what computed them stays before it, what uses
// them after. The compiler knows no other reason not to move arithmetic across a fence or a wait.
template <int kTiles>
BERTKERN_DEVICE void hold(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]));
  }
}
template <int kSteps>
BERTKERN_DEVICE void hold(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3]));
  }
}

// wgmma.fence: what the threads did to `registers`, accumulators and left operands [steps][4],
// comes before the products that follow. Needed before the first product and whenever the threads
// have touched registers that the next one uses. Tiles that threads wrote need fence_async_shared
// and a barrier as well.
template <typename... Registers>
BERTKERN_DEVICE void wgmma_fence(Registers&... registers) {
  (hold(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group: the products since the last commit become one group.
BERTKERN_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group: waits until all but the newest kPending groups, at most 7, are done.
// `registers` are those of the groups that are: they may be used again, as the tiles may.
template <int kPending, typename... Registers>
BERTKERN_DEVICE void wgmma_wait(Registers&... registers) {
  static_assert(kPending >= 0 && kPending <= 7, "wgmma.wait_group takes 0 to 7");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (hold(registers), ...);
}

// The instruction for one N and one type of 16 bits: one specialisation each, below.
template <int kN, typename T>
struct WarpgroupProduct {
  static_assert(kN < 0, "N is one of 32, 64, 96, 128, 192 and 256, the type half or bfloat16");
};

// wgmma.mma_async.m64nNk16, fp32 accumulators, N = 8 kTiles; d is overwritten unless `accumulate`.
// Transposed operands are M- or N-major (common/shared_tile.h), others K-major.
template <bool kTransposeA, bool kTransposeB, typename T, int kTiles>
BERTKERN_DEVICE void wgmma(float (&d)[kTiles][4], MatrixDescriptor a, MatrixDescriptor b,
                           bool accumulate, T) {
  WarpgroupProduct<8 * kTiles, T>::template multiply<kTransposeA, kTransposeB>(d, a, b, accumulate);
}

// The same, the left operand in registers.
template <bool kTransposeB, typename T, int kTiles>
BERTKERN_DEVICE void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], MatrixDescriptor b,
                           bool accumulate, T) {
  WarpgroupProduct<8 * kTiles, T>::template multiply<kTransposeB>(d, a, b, accumulate);
}

// An asm statement spells every register of d, N / 2 of them: the names that stand for them in the
// instruction (…_NAMES) and the variables (…_D), by 16, each list the one before it and more.
#define BERTKERN_NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define BERTKERN_NAMES_64 \
  BERTKERN_NAMES_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define BERTKERN_NAMES_96 \
  BERTKERN_NAMES_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define BERTKERN_NAMES_128 \
  BERTKERN_NAMES_96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define BERTKERN_NAMES_192                                           \
  BERTKERN_NAMES_128                                                 \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define BERTKERN_NAMES_256                                                                      \
  BERTKERN_NAMES_192                                                                            \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114" \
  ",%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define BERTKERN_D_8(n)                                                            \
  "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), "+f"(d[(n) + 1][0]), \
      "+f"(d[(n) + 1][1]), "+f"(d[(n) + 1][2]), "+f"(d[(n) + 1][3])
#define BERTKERN_D_32 BERTKERN_D_8(0), BERTKERN_D_8(2)
#define BERTKERN_D_64 BERTKERN_D_32, BERTKERN_D_8(4), BERTKERN_D_8(6)
#define BERTKERN_D_96 BERTKERN_D_64, BERTKERN_D_8(8), BERTKERN_D_8(10)
#define BERTKERN_D_128 BERTKERN_D_96, BERTKERN_D_8(12), BERTKERN_D_8(14)
#define BERTKERN_D_192 \
  BERTKERN_D_128, BERTKERN_D_8(16), BERTKERN_D_8(18), BERTKERN_D_8(20), BERTKERN_D_8(22)
#define BERTKERN_D_256 \
  BERTKERN_D_192, BERTKERN_D_8(24), BERTKERN_D_8(26), BERTKERN_D_8(28), BERTKERN_D_8(30)

// P0 to P6 name the operands after d. No "memory": the instruction reads tiles only, and what wrote
// them, or will overwrite them, is held back by the barriers, fences and waits around it.
#define BERTKERN_WGMMA_OF(N, T, TYPE, P0, P1, P2, P3, P4, P5, P6)                             \
  template <>                                                                                 \
  struct WarpgroupProduct<N, T> {                                                             \
    template <bool kTransposeA, bool kTransposeB>                                             \
    static BERTKERN_DEVICE void multiply(float (&d)[N / 8][4], MatrixDescriptor a,            \
                                         MatrixDescriptor b, bool accumulate) {               \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " P2                                       \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE       \
                   " {" BERTKERN_NAMES_##N "}, " P0 ", " P1 ", p, 1, 1, " P3 ", " P4 "; }"    \
                   : BERTKERN_D_##N                                                           \
                   : "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(accumulate)),             \
                     "n"(static_cast<int>(kTransposeA)), "n"(static_cast<int>(kTransposeB))); \
    }                                                                                         \
    template <bool kTransposeB>                                                               \
    static BERTKERN_DEVICE void multiply(float (&d)[N / 8][4], const uint32_t (&a)[4],        \
                                         MatrixDescriptor b, bool accumulate) {               \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " P5                                       \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE       \
                   " {" BERTKERN_NAMES_##N "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4         \
                                           ", p, 1, 1, " P6 "; }"                             \
                   : BERTKERN_D_##N                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits),                 \
                     "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposeB)));  \
    }                                                                                         \
  };
#define BERTKERN_WGMMA(N, ...)                   \
  BERTKERN_WGMMA_OF(N, half, "f16", __VA_ARGS__) \
  BERTKERN_WGMMA_OF(N, bfloat16, "bf16", __VA_ARGS__)

BERTKERN_WGMMA(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
BERTKERN_WGMMA(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
BERTKERN_WGMMA(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
BERTKERN_WGMMA(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
BERTKERN_WGMMA(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
BERTKERN_WGMMA(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef BERTKERN_WGMMA
#undef BERTKERN_WGMMA_OF
#undef BERTKERN_NAMES_32
#undef BERTKERN_NAMES_64
#undef BERTKERN_NAMES_96
#undef BERTKERN_NAMES_128
#undef BERTKERN_NAMES_192
#undef BERTKERN_NAMES_256
#undef BERTKERN_D_8
#undef BERTKERN_D_32
#undef BERTKERN_D_64
#undef BERTKERN_D_96
#undef BERTKERN_D_128
#undef BERTKERN_D_192
#undef BERTKERN_D_256

}  // namespace bertkern::ptx
