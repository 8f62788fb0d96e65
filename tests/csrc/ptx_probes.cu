// Kernels that use each function of csrc/ptx as real ones do. Nothing launches them: test_ptx.py
// compiles them and looks for the instructions in the machine code.
#include "common/tensor_map.h"
#include "ptx/copy_async.cuh"
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/thread.cuh"

using namespace bertkern;

extern "C" BERTKERN_KERNEL(128) probe_threads(float* out, const float* in) {
  const int thread = ptx::thread_index();
  float x = in[ptx::block_index() * ptx::block_count() + thread];
  x += ptx::shuffle_xor(x, 8);
  const uint32_t other = ptx::shuffle_index(__float_as_uint(x), 3);
  if (ptx::vote_any(x > 2.0f)) x += __uint_as_float(other);
  ptx::warp_barrier();
  ptx::block_barrier();
  if (thread < 64) {
    ptx::named_barrier_arrive(1, 128);
  } else {
    ptx::named_barrier_sync(1, 128);
  }
  out[thread] = x;
}

extern "C" BERTKERN_KERNEL(128) probe_math(float* out, const float* in) {
  const float x = in[ptx::thread_index()], y = out[ptx::thread_index()];
  const float powers = ptx::max_nan(ptx::max(ptx::exp2(x), ptx::log2(y)), x);
  out[ptx::thread_index()] = ptx::fma(powers, ptx::reciprocal(x), ptx::rsqrt(y));
}

template <typename T>
BERTKERN_DEVICE void multiply_tile(float* out, const T* in) {
  char* tile = ptx::shared_memory();
  const int thread = ptx::thread_index();
  ptx::copy_async_16(tile + thread * 16, in + thread * 8, in[thread * 8] == T{});
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  ptx::block_barrier();
  uint32_t a[4], b[4], c[2];
  ptx::load_matrix_4(a, tile + thread * 16);
  ptx::load_matrix_4(b, tile + thread * 16 + 512);
  for (int i = 0; i < 4; ++i) a[i] ^= b[i];
  ptx::load_matrix_4_transposed(b, tile + thread * 16);
  ptx::load_matrix_2_transposed(c, tile + thread * 16);
  float d[4] = {};
  ptx::mma_16x8x16(d, a, {b[0], b[1]}, T{});
  ptx::mma_16x8x16(d, a, {b[2] ^ c[0], b[3] ^ c[1]}, T{});
  const ptx::Words4 before = ptx::load_global_16(out + thread * 4);
  ptx::store_global_16(out + thread * 4,
                       {{ptx::pack(d[0], d[1], T{}), ptx::pack(d[2], d[3], T{}),
                         before.word[0] ^ before.word[2], before.word[1] ^ before.word[3]}});
}
extern "C" BERTKERN_KERNEL(32) probe_mma_half(float* out, const ptx::half* in) {
  multiply_tile(out, in);
}
extern "C" BERTKERN_KERNEL(32) probe_mma_bfloat16(float* out, const ptx::bfloat16* in) {
  multiply_tile(out, in);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#include "ptx/cluster.cuh"
#include "ptx/fence.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/store_matrix.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

// Bits 49 to 51 stay 0; the rest by the table of the PTX ISA.
static_assert(matrix_descriptor<Swizzle::k128, 16, 1024>(0x2400).bits == 0x4000004000010240);
static_assert(matrix_descriptor<Swizzle::k64, 4096, 512>(0x400).bits == 0x8000002001000040);
static_assert(matrix_descriptor<Swizzle::k32, 0, 256>(0x3FFF0).bits == 0xC000001000003FFF);
static_assert(matrix_descriptor<Swizzle::kNone, 128, 256>(0).bits == 0x0000001000080000);
static_assert(advance(matrix_descriptor<Swizzle::k128, 16, 1024>(0x2400), 32).bits ==
              0x4000004000010242);
// Row 5, chunk 6; row 5 of 64 bytes, chunk 2; row 5 of 32 bytes, chunk 1.
static_assert(swizzled(5 * 128 + 6 * 16, Swizzle::k128) == 5 * 128 + (6 ^ 5) * 16);
static_assert(swizzled(5 * 64 + 2 * 16, Swizzle::k64) == 5 * 64 + (2 ^ 2) * 16);
static_assert(swizzled(5 * 32 + 1 * 16, Swizzle::k32) == 5 * 32 + (1 ^ 1) * 16);
static_assert(swizzled(5 * 128 + 6 * 16, Swizzle::kNone) == 5 * 128 + 6 * 16);

extern "C" BERTKERN_KERNEL(128) probe_mbarrier(float* out, const float* in) {
  auto* barrier = reinterpret_cast<ptx::Barrier*>(ptx::shared_memory());
  auto* row = reinterpret_cast<float*>(ptx::shared_memory() + 128);
  if (ptx::thread_index() == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::barrier_init(barrier + 1, 128);
    ptx::barrier_init_fence();
  }
  ptx::block_barrier();
  for (int step = 0; step < 4; ++step) {
    if (ptx::thread_index() == 0) {
      ptx::barrier_wait(barrier + 1, (step & 1) ^ 1);
      ptx::barrier_expect_bytes(barrier, 256);
      ptx::bulk_load(row, in + step * 128, 256, barrier);
      ptx::bulk_load(row + 64, in + step * 128 + 64, 256, barrier);
      ptx::barrier_arrive_expect_bytes(barrier, 256);
    }
    while (!ptx::barrier_try_wait(barrier, step & 1)) {
    }
    out[step * 128 + ptx::thread_index()] = row[ptx::thread_index()];
    ptx::barrier_arrive(barrier + 1);
  }
  ptx::block_barrier();
  if (ptx::thread_index() == 0) ptx::barrier_invalidate(barrier);
}

extern "C" BERTKERN_KERNEL(128) probe_cluster(float* out, const float* in) {
  auto* barrier = reinterpret_cast<ptx::Barrier*>(ptx::shared_memory());
  auto* words = reinterpret_cast<ptx::Words4*>(ptx::shared_memory() + 128);
  auto* numbers = reinterpret_cast<float*>(words + 128);
  auto* halves = reinterpret_cast<ptx::half*>(numbers + 128);
  const int thread = ptx::thread_index(), size = ptx::cluster_size();
  const int next = (ptx::cluster_rank() + 1) % size;
  if (thread == 0) {
    ptx::barrier_init(barrier, 128);
    ptx::barrier_init_fence();
  }
  numbers[thread] = in[thread];
  ptx::cluster_arrive();
  ptx::cluster_wait();
  ptx::store_cluster(ptx::cluster_address(words + thread, next),
                     ptx::load_global_16(in + 4 * thread));
  ptx::store_cluster(ptx::cluster_address(numbers + 128 + thread, next), in[thread]);
  ptx::store_cluster(ptx::cluster_address(halves + 512 + thread, next),
                     ptx::from_float(in[thread], ptx::half{}));
  ptx::barrier_arrive_cluster(ptx::cluster_address(barrier, next));
  if (thread < 32 && ptx::elect_one()) {
    ptx::barrier_expect_bytes(barrier, 1024);
    ptx::bulk_copy_cluster(ptx::cluster_address(words + 192, next), words + 128, 1024,
                           ptx::cluster_address(barrier, next));
  }
  ptx::barrier_wait_cluster(barrier, 0);
  ptx::store_global_16(out + 4 * thread, words[thread]);
  const auto far = ptx::load_cluster<ptx::Words4>(ptx::cluster_address(words + thread, next));
  out[512 + thread] = ptx::load_cluster<float>(ptx::cluster_address(numbers + thread, next)) +
                      __uint_as_float(far.word[0] ^ far.word[1] ^ far.word[2] ^ far.word[3]) +
                      ptx::to_float(ptx::load_cluster<ptx::half>(
                          ptx::cluster_address(halves + 512 + thread, next)));
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

extern "C" BERTKERN_KERNEL(128) probe_work(int* work, int* out) {
  const int mine = ptx::atomic_add(work, 1);
  out[mine] = ptx::load_relaxed(work + 1);
}

extern "C" BERTKERN_KERNEL(128) probe_grid(float* sum, const float* in, int* turn) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  if (ptx::thread_index() == 0) ptx::wait_until_equal(turn, ptx::block_index());
  ptx::block_barrier();
  sum[ptx::thread_index()] += in[ptx::thread_index()];
  ptx::block_barrier();
  if (ptx::thread_index() == 0) {
    ptx::store_release(turn, ptx::block_index() + 1);
    if (ptx::atomic_add_acq_rel(turn + 1, 1) == ptx::block_count() - 1) sum[128] = 1.0f;
  }
}

template <int kRank>
struct CopyArguments {
  float scale;
  TensorMap source, target;
};

// Copies a box from one tensor to the other, doubled.
template <int kRank>
BERTKERN_KERNEL(128)
probe_tma(BERTKERN_GRID_CONSTANT CopyArguments<kRank> arguments) {
  char* tile = ptx::shared_memory();
  auto* barrier = reinterpret_cast<ptx::Barrier*>(tile + 16384);
  const int thread = ptx::thread_index();
  int at[kRank];
  for (int i = 0; i < kRank; ++i) at[i] = 1001 + i;
  if (thread == 0) {
    ptx::tma_prefetch(arguments.source);
    ptx::barrier_init(barrier, 1);
    ptx::barrier_init_fence();
    ptx::barrier_arrive_expect_bytes(barrier, 16384);
    ptx::tma_load(tile, arguments.source, at, barrier,
                  kRank == 2   ? ptx::cache_briefly()
                  : kRank == 3 ? ptx::cache_long()
                               : ptx::cache_normally());
  }
  ptx::block_barrier();
  ptx::barrier_wait(barrier, 0);
  for (int byte = thread * 16; byte < 16384; byte += 128 * 16) {
    auto* chunk = reinterpret_cast<ptx::Words4*>(tile + swizzled(byte, Swizzle::k128));
    for (uint32_t& word : chunk->word) {
      word = __float_as_uint(__uint_as_float(word) * arguments.scale);
    }
  }
  ptx::fence_async_shared();
  ptx::block_barrier();
  if (thread == 0) {
    ptx::tma_store(arguments.target, at, tile);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::tma_store(arguments.target, at, tile + 8192);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
    ptx::fence_async();
  }
}
template BERTKERN_KERNEL(128) probe_tma<2>(BERTKERN_GRID_CONSTANT CopyArguments<2>);
template BERTKERN_KERNEL(128) probe_tma<3>(BERTKERN_GRID_CONSTANT CopyArguments<3>);
template BERTKERN_KERNEL(128) probe_tma<4>(BERTKERN_GRID_CONSTANT CopyArguments<4>);
template BERTKERN_KERNEL(128) probe_tma<5>(BERTKERN_GRID_CONSTANT CopyArguments<5>);

// Products of every kind of one N: both operands as they stand, each of them transposed, the left
// one in registers.
template <int kN, typename T>
BERTKERN_KERNEL(128)
probe_products(float* out, const uint32_t* in, bool accumulate) {
  const char* tile = ptx::shared_memory();
  const MatrixDescriptor rows = ptx::describe_tile<Swizzle::k128, 16, 1024>(tile);
  const MatrixDescriptor columns = ptx::describe_tile<Swizzle::k64, 4096, 512>(tile + 65536);
  const int thread = ptx::thread_index();
  float d[kN / 8][4];
  uint32_t a[2][4];
  for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = in[i * 128 + thread];
  for (int i = 0; i < kN / 2; ++i) d[i / 4][i % 4] = out[i * 128 + thread];
  ptx::wgmma_fence(a, d);
  ptx::wgmma<false, false>(d, rows, columns, accumulate, T{});
  ptx::wgmma<true, false>(d, columns, rows, true, T{});
  ptx::wgmma<false, true>(d, rows, advance(columns, 1024), true, T{});
  ptx::wgmma<false>(d, a[0], rows, true, T{});
  ptx::wgmma<true>(d, a[1], advance(columns, 2048), true, T{});
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  for (int i = 0; i < kN / 2; ++i) out[i * 128 + thread] = d[i / 4][i % 4];
}
template BERTKERN_KERNEL(128) probe_products<32, ptx::half>(float*, const uint32_t*, bool);
template BERTKERN_KERNEL(128) probe_products<64, ptx::half>(float*, const uint32_t*, bool);
template BERTKERN_KERNEL(128) probe_products<96, ptx::half>(float*, const uint32_t*, bool);
template BERTKERN_KERNEL(128) probe_products<128, ptx::half>(float*, const uint32_t*, bool);
template BERTKERN_KERNEL(128) probe_products<192, ptx::half>(float*, const uint32_t*, bool);
template BERTKERN_KERNEL(128) probe_products<256, ptx::half>(float*, const uint32_t*, bool);
template BERTKERN_KERNEL(128) probe_products<32, ptx::bfloat16>(float*, const uint32_t*, bool);
template BERTKERN_KERNEL(128) probe_products<64, ptx::bfloat16>(float*, const uint32_t*, bool);
template BERTKERN_KERNEL(128) probe_products<96, ptx::bfloat16>(float*, const uint32_t*, bool);
template BERTKERN_KERNEL(128) probe_products<128, ptx::bfloat16>(float*, const uint32_t*, bool);
template BERTKERN_KERNEL(128) probe_products<192, ptx::bfloat16>(float*, const uint32_t*, bool);
template BERTKERN_KERNEL(128) probe_products<256, ptx::bfloat16>(float*, const uint32_t*, bool);

struct PipelineArguments {
  TensorMap q, k, v, out;
  int tiles;
  float scale;
};

// All of it together: a warpgroup that copies, two that multiply, exponentiate one product while
// the next one runs, and store through shared memory. D = 64, 64 queries a warpgroup, tiles of 128
// keys.
extern "C" BERTKERN_KERNEL(384) probe_pipeline(BERTKERN_GRID_CONSTANT PipelineArguments arguments) {
  constexpr int kStages = 2, kTileBytes = 128 * 128;
  char* q = ptx::shared_memory();
  char* k = q + kTileBytes;
  char* v = k + kStages * kTileBytes;
  auto* barriers = reinterpret_cast<ptx::Barrier*>(v + kStages * kTileBytes);
  ptx::Barrier *q_full = barriers, *full = barriers + 1, *empty = barriers + 1 + kStages;
  const int thread = ptx::thread_index();
  if (thread == 0) {
    ptx::barrier_init(q_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(full + stage, 1);
      ptx::barrier_init(empty + stage, 256);
    }
    ptx::barrier_init_fence();
  }
  ptx::block_barrier();
  const int tiles = arguments.tiles, block = ptx::block_index();
  const int group =
      static_cast<int>(ptx::shuffle_index(static_cast<uint32_t>(thread / 128), 0)) - 1;
  if (group < 0) {
    ptx::lower_registers<24>();
    if (thread < 32 && ptx::elect_one()) {
      ptx::barrier_arrive_expect_bytes(q_full, kTileBytes);
      ptx::tma_load(q, arguments.q, {0, block * 128, 0, 0}, q_full, ptx::cache_briefly());
      for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % kStages;
        ptx::barrier_wait(empty + stage, (tile / kStages & 1) ^ 1);
        ptx::barrier_arrive_expect_bytes(full + stage, 2 * kTileBytes);
        ptx::tma_load(k + stage * kTileBytes, arguments.k, {0, tile * 128, 0, 0}, full + stage,
                      ptx::cache_long());
        ptx::tma_load(v + stage * kTileBytes, arguments.v, {0, tile * 128, 0, 0}, full + stage,
                      ptx::cache_long());
      }
    }
    return;
  }
  ptx::raise_registers<240>();
  char* rows = q + group * 64 * 128;
  const MatrixDescriptor left = ptx::describe_tile<Swizzle::k128, 16, 1024>(rows);
  float out[8][4] = {}, scores[16][4], sum = 0.0f;
  uint32_t p[8][4];
  ptx::barrier_wait(q_full, 0);
  const auto multiply_keys = [&](int stage) {
    const MatrixDescriptor right =
        ptx::describe_tile<Swizzle::k128, 16, 1024>(k + stage * kTileBytes);
    ptx::wgmma_fence(scores);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::wgmma<false, false>(scores, advance(left, step * 32), advance(right, step * 32),
                               step > 0, ptx::bfloat16{});
    }
    ptx::wgmma_commit();
  };
  const auto exponentiate = [&] {
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = ptx::exp2(scores[n][i] * arguments.scale);
        sum += scores[n][i];
      }
      p[n / 2][n % 2 * 2] = ptx::pack(scores[n][0], scores[n][1], ptx::bfloat16{});
      p[n / 2][n % 2 * 2 + 1] = ptx::pack(scores[n][2], scores[n][3], ptx::bfloat16{});
    }
  };
  const auto multiply_values = [&](int stage) {
    const MatrixDescriptor right =
        ptx::describe_tile<Swizzle::k128, kTileBytes, 1024>(v + stage * kTileBytes);
    ptx::wgmma_fence(p, out);
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      ptx::wgmma<true>(out, p[step], advance(right, step * 2048), true, ptx::bfloat16{});
    }
    ptx::wgmma_commit();
  };
  ptx::barrier_wait(full, 0);
  multiply_keys(0);
  ptx::wgmma_wait<0>(scores);
  exponentiate();
  for (int tile = 1; tile < tiles; ++tile) {
    const int stage = tile % kStages, before = (tile - 1) % kStages;
    ptx::barrier_wait(full + stage, tile / kStages & 1);
    multiply_keys(stage);
    multiply_values(before);
    ptx::wgmma_wait<1>(scores);
    ptx::wgmma_wait<0>(out, p);
    ptx::barrier_arrive(empty + before);
    exponentiate();
  }
  multiply_values((tiles - 1) % kStages);
  ptx::wgmma_wait<0>(out, p);
  const float factor = ptx::reciprocal(sum);
  const int lane = thread % 32, warp = thread / 32 % 4;
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const float* pair = out[n + i / 2] + i % 2 * 2;
      words[i] = ptx::pack(pair[0] * factor, pair[1] * factor, ptx::bfloat16{});
    }
    const int row = warp * 16 + lane % 16, chunk = n + lane / 16;
    if (n == 0) {
      ptx::store_matrix_4(rows + swizzled(row * 128 + chunk * 16, Swizzle::k128), words);
    } else {
      ptx::store_matrix_4_transposed(rows + swizzled(row * 128 + chunk * 16, Swizzle::k128), words);
    }
  }
  ptx::fence_async_shared();
  ptx::named_barrier_sync(1 + group, 128);
  if (thread % 128 == 0) {
    ptx::tma_store(arguments.out, {0, block * 128 + group * 64, 0, 0}, rows);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}
#endif
