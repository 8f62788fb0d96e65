// Products of a warpgroup and the registers that it takes (ptx/wgmma.cuh, ptx/registers.cuh), used
// rightly and with faults; see faults.cuh.
#include "kernels/faults.cuh"

namespace bertkern::emulator::test {
namespace {

// a [64, 16] and b [32, 16] of halves, K-major in rows of 32 bytes that are swizzled.
constexpr int kRightTile = 64 * 32, kTileBytes = kRightTile + 32 * 32;

BERTKERN_DEVICE MatrixDescriptor describe(const char* tile) {
  return ptx::describe_tile<Swizzle::k32, 16, 256>(tile);
}

BERTKERN_DEVICE void write_tiles(char* tiles, const float* x) {
  for (int i = ptx::thread_index(); i < kTileBytes / 2; i += 128) {
    auto* element = reinterpret_cast<ptx::half*>(tiles + swizzled(2 * i, Swizzle::k32));
    *element = ptx::from_float(x[i % 13], ptx::half{});
  }
}

BERTKERN_DEVICE float sum_of(const float (&d)[4][4]) {
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) sum += d[i / 4][i % 4];
  return sum;
}

// Tiles that threads write, a product, its accumulators. 1: no fence towards the asynchronous
// proxy; 2: no barrier behind it; 3: a warp does not come; 4: a thread has another descriptor; 5:
// the tile is behind the end; 6: no wgmma_fence; 7: registers change behind it, or 8: behind the
// product; 9: so does a tile; 10: no commit; 11: no wait; 12: a wait that leaves this group out;
// 13: a thread does not accumulate; 14: a thread reads the accumulators before the wait; 15: a
// tile starts where no swizzle's pattern does; 16: the wait does not say for which registers.
BERTKERN_KERNEL(128) product_of_tiles(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  char* tiles = ptx::shared_memory();
  write_tiles(tiles, a.x);  // first
  if (a.fault != 1) ptx::fence_async_shared();
  if (a.fault != 2) ptx::block_barrier();
  if (a.fault == 3 && t >= 96) return;
  float d[4][4];
  for (int i = 0; i < 16; ++i) d[i / 4][i % 4] = static_cast<float>(i);
  const MatrixDescriptor left = describe(tiles + (a.fault == 5 ? 4096 : a.fault == 15 ? 128 : 0));
  const MatrixDescriptor right = describe(tiles + kRightTile + (a.fault == 4 && t == 5 ? 256 : 0));
  if (a.fault != 6) ptx::wgmma_fence(d);
  if (a.fault == 7 && t == 77) d[1][2] += 1.0f;
  ptx::wgmma<false, false>(d, left, right, !(a.fault == 13 && t == 9), ptx::half{});  // second
  if (a.fault != 10) ptx::wgmma_commit();
  if (a.fault == 8 && t == 77) d[1][2] = 1.0f;
  if (a.fault == 9 && t == 77) tiles[100] = 0;  // third
  const float early = a.fault == 14 ? d[1][2] : 0.0f;
  if (a.fault == 12) {
    ptx::wgmma_wait<1>(d);
  } else if (a.fault == 16) {
    ptx::wgmma_wait<0>();
  } else if (a.fault == 17 && t < 32) {
    ptx::wgmma_wait<0>(d);
    d[0][0] += 0.0f;
  } else if (a.fault != 11) {
    ptx::wgmma_wait<0>(d);
  }
  a.y[t] = sum_of(d) + early;
}

// Four warps of five. 1: the first of them is not a multiple of four.
BERTKERN_KERNEL(160) warps_of_a_product(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index(), first = a.fault == 1 ? 32 : 0;
  char* tiles = ptx::shared_memory();
  if (t < 128) write_tiles(tiles, a.x);
  ptx::fence_async_shared();
  ptx::block_barrier();
  if (t < first || t >= first + 128) return;
  float d[4][4];
  ptx::wgmma_fence(d);
  ptx::wgmma<false, false>(d, describe(tiles), describe(tiles + kRightTile), false, ptx::half{});
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  a.y[t - first] = sum_of(d);
}

// The left operand in registers. 1: they change behind the fence; 2: behind the product; 3: there
// is no fence.
BERTKERN_KERNEL(128) product_of_registers(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  char* tiles = ptx::shared_memory();
  write_tiles(tiles, a.x);
  ptx::fence_async_shared();
  ptx::block_barrier();
  float d[4][4];
  uint32_t words[1][4];
  for (uint32_t& word : words[0]) word = ptx::pack(a.x[t], a.x[t + 1], ptx::half{});
  if (a.fault != 3) ptx::wgmma_fence(d, words);
  if (a.fault == 1 && t == 60) words[0][3] ^= 1u;
  ptx::wgmma<false>(d, words[0], describe(tiles + kRightTile), false, ptx::half{});
  ptx::wgmma_commit();
  if (a.fault == 2 && t == 60) words[0][3] ^= 1u;
  ptx::wgmma_wait<0>(d, words);
  a.y[t] = sum_of(d);
}

// Two groups, two sets of accumulators; the first is used while the second product runs. 1: the
// second is used; 2: a product's registers have been touched since the last fence.
BERTKERN_KERNEL(128) two_groups(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  char* tiles = ptx::shared_memory();
  write_tiles(tiles, a.x);
  ptx::fence_async_shared();
  ptx::block_barrier();
  const MatrixDescriptor left = describe(tiles), right = describe(tiles + kRightTile);
  float d[4][4], e[4][4];
  ptx::wgmma_fence(d, e);
  ptx::wgmma<false, false>(d, left, right, false, ptx::half{});
  ptx::wgmma<false, false>(d, left, right, true, ptx::half{});
  ptx::wgmma_commit();
  ptx::wgmma<false, false>(e, left, right, false, ptx::half{});
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>(d);
  const float first = a.fault == 1 ? sum_of(e) : sum_of(d);
  for (int i = 0; i < 16; ++i) d[i / 4][i % 4] += 1.0f;
  if (a.fault != 2) ptx::wgmma_fence(d);
  ptx::wgmma<false, false>(d, left, right, true, ptx::half{});  // second
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d, e);
  a.y[t] = first + sum_of(d) + sum_of(e);
}

// A thread of a fifth warp loads tiles for two products, one after the other in one place. 1: the
// place is given back before the wait; 2: the products do not wait for the tiles.
BERTKERN_KERNEL(160) products_of_loads(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  ptx::Barrier *full = shared_barriers(), *empty = full + 1;
  char* tile = ptx::shared_memory() + 1024;
  make_barrier(full, 1);
  make_barrier(empty, 128);
  for (int i = t; i < 256; i += 160) reinterpret_cast<float*>(tile)[i] = 0.0f;
  ptx::fence_async_shared();
  ptx::block_barrier();
  if (warp_index() == 4) {
    if (!ptx::elect_one()) return;
    for (int round = 0; round < 2; ++round) {
      ptx::barrier_wait(empty, round ^ 1);
      ptx::barrier_arrive_expect_bytes(full, 1024);
      ptx::bulk_load(tile, a.x + 256 * round, 1024, full);  // second
    }
    return;
  }
  float d[4][4];
  uint32_t words[1][4];
  for (uint32_t& word : words[0]) word = ptx::pack(1.0f, 0.0f, ptx::half{});
  for (int round = 0; round < 2; ++round) {
    if (a.fault != 2) ptx::barrier_wait(full, round);
    ptx::wgmma_fence(d, words);
    ptx::wgmma<false>(d, words[0], describe(tile), round != 0, ptx::half{});  // first
    ptx::wgmma_commit();
    if (a.fault == 1) ptx::barrier_arrive(empty);
    ptx::wgmma_wait<0>(d, words);
    if (a.fault != 1) ptx::barrier_arrive(empty);
  }
  a.y[t % 128] = d[0][0];
}

// Registers --------------------------------------------------------------------------------------

// Three warpgroups, 168 registers each; the first gives some to the others. 1: it keeps more than
// it has; 2: the others ask for less than they have; 3: for more than there will ever be; 4: the
// first gives none; 5: a warp of the second does not come; 6: the first keeps what others need.
BERTKERN_KERNEL(384) divided_registers(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  if (t < 128) {
    if (a.fault == 1) {
      ptx::lower_registers<176>();  // lowers
    } else if (a.fault == 6) {
      ptx::lower_registers<32>();
    } else if (a.fault != 4) {
      ptx::lower_registers<24>();
    }
  } else if (a.fault == 2) {
    ptx::raise_registers<160>();  // lowers
  } else if (a.fault == 3) {
    ptx::raise_registers<248>();  // raises
  } else if (!(a.fault == 5 && t >= 224 && t < 256)) {
    ptx::raise_registers<240>();  // raises
  }
  if (t < 128) a.y[t] = a.x[t];
}

// A thread has 65536 / threads registers at the start, in eights, and at most 255: `fault` 1 keeps
// 256, 2 keeps 176 and 3 keeps 136, of 248, 168 and 128; 4, 5, 6 keep these.
BERTKERN_KERNEL(512) registers_at_the_start(BERTKERN_GRID_CONSTANT Arguments a) {
  if (a.fault == 1) ptx::lower_registers<256>();
  if (a.fault == 2) ptx::lower_registers<176>();
  if (a.fault == 3) ptx::lower_registers<136>();
  if (a.fault == 4) ptx::lower_registers<248>();
  if (a.fault == 5) ptx::lower_registers<168>();
  if (a.fault == 6) ptx::lower_registers<128>();
}

const bool added = add_faults({
    {"product_of_tiles", product_of_tiles},
    {"warps_of_a_product", warps_of_a_product},
    {"product_of_registers", product_of_registers},
    {"two_groups", two_groups},
    {"products_of_loads", products_of_loads},
    {"divided_registers", divided_registers},
    {"registers_at_the_start", registers_at_the_start},
});

}  // namespace
}  // namespace bertkern::emulator::test
