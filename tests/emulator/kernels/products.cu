// Products and casts on the machine: one warp's m16n8k16 from operands that come by the layout that
// ptx/mma.cuh documents, or by ldmatrix; every cast of the 16-bit formats.
#include "cuda/launch.h"
#include "kernels/arguments.h"
#include "ptx/copy_async.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/thread.cuh"

namespace bertkern::emulator::test {
namespace {

BERTKERN_DEVICE uint32_t two(uint16_t low, uint16_t high) {
  return static_cast<uint32_t>(high) << 16 | low;
}

// Where element (row, column) of a matrix is, or of its transpose.
template <bool kTransposed>
BERTKERN_DEVICE int at(int row, int column, int rows, int columns) {
  return kTransposed ? column * rows + row : row * columns + column;
}

BERTKERN_DEVICE void multiply(const Product& p, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int g = ptx::thread_index() / 4, t = ptx::thread_index() % 4;
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = p.d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  if (p.bfloat16) {
    ptx::mma_16x8x16(d, a, b, ptx::bfloat16{});
  } else {
    ptx::mma_16x8x16(d, a, b, ptx::half{});
  }
  for (int i = 0; i < 4; ++i) p.d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
}

BERTKERN_KERNEL(32) product_from_global(const Product p) {
  const int g = ptx::thread_index() / 4, t = ptx::thread_index() % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const uint16_t* pair = p.a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
    a[i] = two(pair[0], pair[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const int k = 2 * t + 8 * i;
    b[i] = two(p.b[k * 8 + g], p.b[(k + 1) * 8 + g]);
  }
  multiply(p, a, b);
}

// a [16, 16] and b [16, 8] in shared memory, or a's transpose.
template <bool kTransposed>
BERTKERN_KERNEL(32)
product_of_matrices(const Product p) {
  const int lane = ptx::thread_index();
  auto* a_tile = reinterpret_cast<uint16_t*>(ptx::shared_memory());
  uint16_t* b_tile = a_tile + 256;
  if (kTransposed) {
    for (int i = lane; i < 256; i += 32) a_tile[at<true>(i / 16, i % 16, 16, 16)] = p.a[i];
  } else {
    ptx::copy_async_16(a_tile + 8 * lane, p.a + 8 * lane, true);
  }
  if (lane < 16) ptx::copy_async_16(b_tile + 8 * lane, p.b + 8 * lane, true);
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  ptx::warp_barrier();
  // Matrices of a: rows 0-7 and 8-15 of k 0-7, the same of k 8-15.
  const int row = lane % 8 + lane / 8 % 2 * 8, k = lane / 16 * 8;
  uint32_t a[4], b[2];
  if (kTransposed) {
    ptx::load_matrix_4_transposed(a, a_tile + (k + lane % 8) * 16 + lane / 8 % 2 * 8);
  } else {
    ptx::load_matrix_4(a, a_tile + row * 16 + k);
  }
  ptx::load_matrix_2_transposed(b, b_tile + lane % 16 * 8);
  multiply(p, a, b);
}

BERTKERN_KERNEL(32) cast(const Casts c) {
  const int i = ptx::block_index() * 32 + ptx::thread_index();
  const uint32_t halves = ptx::pack(c.x[i], 1.0f, ptx::half{});
  const uint32_t bfloats = ptx::pack(2.0f, c.x[i], ptx::bfloat16{});
  c.half[i] = static_cast<uint16_t>(halves);
  c.bfloat16[i] = static_cast<uint16_t>(bfloats >> 16);
  const auto pattern = static_cast<uint16_t>(i);
  c.from_half[i] = ptx::to_float(ptx::half{pattern});
  c.from_bfloat16[i] = ptx::to_float(ptx::bfloat16{pattern});
}

}  // namespace

void run_product(const Product& product, Operands operands) {
  const cuda::Launch shape{1, 32, (256 + 128) * 2};
  auto* kernel = operands == Operands::kFromGlobal ? product_from_global
                 : operands == Operands::kMatrices ? product_of_matrices<false>
                                                   : product_of_matrices<true>;
  cuda::launch(kernel, shape, product, nullptr, "product");
}

void run_casts(const Casts& casts) {
  cuda::launch(cast, {casts.count / 32, 32, 0}, casts, nullptr, "cast");
}

}  // namespace bertkern::emulator::test
