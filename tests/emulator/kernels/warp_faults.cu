// What a warp of Hopper does together (ptx/store_matrix.cuh, elect_one of ptx/tma.cuh), rightly and
// with faults; see faults.cuh.
#include "kernels/faults.cuh"

namespace bertkern::emulator::test {
namespace {

// Four matrices from the words of x, rows of 16 bytes side by side. 1: a row is not aligned; 2: it
// is behind the end; 3: a lane does not come; 4: one stores transposed matrices; 5: two lanes give
// the same row; 6: nothing between the stores and a read.
template <bool kTransposed>
BERTKERN_DEVICE void store_matrices(const Arguments& a) {
  const int t = ptx::thread_index();
  char* shared = ptx::shared_memory();
  auto* words = reinterpret_cast<uint32_t*>(shared);
  uint32_t own[4];
  for (int i = 0; i < 4; ++i) own[i] = reinterpret_cast<const uint32_t*>(a.x)[4 * t + i];
  int row = 16 * t;
  if (t == 9) row = a.fault == 1 ? row + 8 : a.fault == 2 ? 4096 : a.fault == 5 ? 0 : row;
  if (a.fault == 3 && t == 9) return;
  if (kTransposed != (a.fault == 4 && t == 9)) {
    ptx::store_matrix_4_transposed(shared + row, own);
  } else {
    ptx::store_matrix_4(shared + row, own);
  }
  if (a.fault != 6) ptx::warp_barrier();
  for (int i = 0; i < 4; ++i) {
    const int other = (4 * t + i + 36) % 128;
    reinterpret_cast<uint32_t*>(a.y)[other] = words[other];  // read
  }
}
BERTKERN_KERNEL(32) matrices_stored(BERTKERN_GRID_CONSTANT Arguments a) {
  store_matrices<false>(a);
}
BERTKERN_KERNEL(32) matrices_stored_transposed(BERTKERN_GRID_CONSTANT Arguments a) {
  store_matrices<true>(a);
}

// 1: a lane does not come.
BERTKERN_KERNEL(128) elected(BERTKERN_GRID_CONSTANT Arguments a) {
  const int t = ptx::thread_index();
  if (a.fault == 1 && t == 40) return;
  a.y[t] = ptx::elect_one() ? 1.0f : 0.0f;  // elects
}

const bool added = add_faults({
    {"matrices_stored", matrices_stored},
    {"matrices_stored_transposed", matrices_stored_transposed},
    {"elected", elected},
});

}  // namespace
}  // namespace bertkern::emulator::test
