// All of Hopper's parts together, as an attention kernel uses them: a warpgroup that loads, two
// that multiply one product while the next one runs, stores through shared memory. (q kᵀ) v without
// a softmax, so that the result is exact for small integers.
#include "common/dtype.h"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "kernels/arguments.h"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/registers.cuh"
#include "ptx/store_matrix.cuh"
#include "ptx/thread.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace bertkern::emulator::test {
namespace {

constexpr int kD = 64, kQueries = 64, kKeys = 64;  // of a warpgroup, of a tile
constexpr int kStages = 2, kTileBytes = 64 * kD * 2;
constexpr int kThreads = 3 * 128;
constexpr auto kSwizzle = Swizzle::k128;
// Queries, keys, values, barriers.
constexpr int kSharedBytes = (2 + 2 * kStages) * kTileBytes + (1 + 3 * kStages) * 8;

struct PipelineArguments {
  TensorMap q, k, v, out;
  int tiles;  // of keys
  int fault;  // 0: none; else the call that is left out, numbered below
};

struct Shared {
  char *q, *k, *v;
  ptx::Barrier *q_full, *k_full, *v_full, *empty;
};

BERTKERN_DEVICE Shared divide_shared() {
  char* q = ptx::shared_memory();
  char* k = q + 2 * kTileBytes;
  char* v = k + kStages * kTileBytes;
  auto* barriers = reinterpret_cast<ptx::Barrier*>(v + kStages * kTileBytes);
  return {q, k, v, barriers, barriers + 1, barriers + 1 + kStages, barriers + 1 + 2 * kStages};
}

BERTKERN_DEVICE void load_all(const PipelineArguments& a, const Shared& s) {
  const int block = ptx::block_index();
  ptx::barrier_arrive_expect_bytes(s.q_full, 2 * kTileBytes);
  for (int half = 0; half < 2; ++half) {
    ptx::tma_load(s.q + half * kTileBytes, a.q, {0, (2 * block + half) * kQueries}, s.q_full,
                  ptx::cache_briefly());
  }
  for (int tile = 0; tile < a.tiles; ++tile) {
    const int stage = tile % kStages;
    if (a.fault != 1) ptx::barrier_wait(s.empty + stage, (tile / kStages & 1) ^ 1);
    ptx::barrier_arrive_expect_bytes(s.k_full + stage, kTileBytes);
    ptx::tma_load(s.k + stage * kTileBytes, a.k, {0, tile * kKeys}, s.k_full + stage,
                  ptx::cache_long());
    ptx::barrier_arrive_expect_bytes(s.v_full + stage, kTileBytes);
    ptx::tma_load(s.v + stage * kTileBytes, a.v, {0, tile * kKeys}, s.v_full + stage,
                  ptx::cache_long());
  }
}

BERTKERN_DEVICE void multiply_keys(float (&scores)[8][4], const char* q, const char* k) {
  const MatrixDescriptor left = ptx::describe_tile<kSwizzle, 16, 1024>(q);
  const MatrixDescriptor right = ptx::describe_tile<kSwizzle, 16, 1024>(k);
  ptx::wgmma_fence(scores);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    ptx::wgmma<false, false>(scores, advance(left, step * 32), advance(right, step * 32), step > 0,
                             ptx::half{});
  }
  ptx::wgmma_commit();
}

BERTKERN_DEVICE void multiply_values(float (&out)[8][4], uint32_t (&p)[4][4], const char* v,
                                     int fault) {
  const MatrixDescriptor right = ptx::describe_tile<kSwizzle, kTileBytes, 1024>(v);
  if (fault != 2) ptx::wgmma_fence(p, out);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    ptx::wgmma<true>(out, p[step], advance(right, step * 2048), true, ptx::half{});
  }
  if (fault != 3) ptx::wgmma_commit();
}

BERTKERN_DEVICE void pack_scores(uint32_t (&p)[4][4], const float (&scores)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    p[n / 2][n % 2 * 2] = ptx::pack(scores[n][0], scores[n][1], ptx::half{});
    p[n / 2][n % 2 * 2 + 1] = ptx::pack(scores[n][2], scores[n][3], ptx::half{});
  }
}

BERTKERN_DEVICE void store_out(const PipelineArguments& a, char* rows, const float (&out)[8][4],
                               int group) {
  const int thread = ptx::thread_index() % 128, lane = thread % 32, warp = thread / 32;
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = out[n + i / 2] + i % 2 * 2;
      words[i] = ptx::pack(pair[0], pair[1], ptx::half{});
    }
    const int row = warp * 16 + lane % 16, chunk = n + lane / 16;
    ptx::store_matrix_4(rows + swizzled(row * 128 + chunk * 16, kSwizzle), words);
  }
  if (a.fault != 4) ptx::fence_async_shared();
  if (a.fault != 5) ptx::named_barrier_sync(1 + group, 128);
  if (thread / 32 == 0 && ptx::elect_one()) {
    ptx::tma_store(a.out, {0, (2 * ptx::block_index() + group) * kQueries}, rows);
    if (a.fault != 6) ptx::bulk_commit();
    if (a.fault != 7) ptx::bulk_wait_read<0>();
  }
}

BERTKERN_KERNEL(kThreads) pipeline(BERTKERN_GRID_CONSTANT PipelineArguments a) {
  const Shared s = divide_shared();
  const int thread = ptx::thread_index();
  if (thread == 0) {
    ptx::barrier_init(s.q_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(s.k_full + stage, 1);
      ptx::barrier_init(s.v_full + stage, 1);
      ptx::barrier_init(s.empty + stage, 2 * 128);
    }
    if (a.fault != 8) ptx::barrier_init_fence();
  }
  if (a.fault != 9) ptx::block_barrier();
  const int group =
      static_cast<int>(ptx::shuffle_index(static_cast<uint32_t>(thread / 128), 0)) - 1;
  if (group < 0) {
    if (a.fault != 10) ptx::lower_registers<24>();
    if (thread < 32 && ptx::elect_one()) load_all(a, s);
    return;
  }
  ptx::raise_registers<240>();
  char* rows = s.q + group * kTileBytes;
  float out[8][4] = {}, scores[8][4];
  uint32_t p[4][4];
  if (a.fault != 11) ptx::barrier_wait(s.q_full, 0);
  ptx::barrier_wait(s.k_full, 0);
  multiply_keys(scores, rows, s.k);
  if (a.fault != 12) ptx::wgmma_wait<0>(scores);
  pack_scores(p, scores);
  for (int tile = 1; tile < a.tiles; ++tile) {
    const int stage = tile % kStages, before = (tile - 1) % kStages;
    if (a.fault != 13) ptx::barrier_wait(s.k_full + stage, tile / kStages & 1);
    multiply_keys(scores, rows, s.k + stage * kTileBytes);
    if (a.fault != 14) ptx::barrier_wait(s.v_full + before, (tile - 1) / kStages & 1);
    multiply_values(out, p, s.v + before * kTileBytes, a.fault);
    if (a.fault == 15) ptx::barrier_arrive(s.empty + before);
    ptx::wgmma_wait<1>(scores);
    if (a.fault == 16) pack_scores(p, scores);
    ptx::wgmma_wait<0>(out, p);
    if (a.fault != 15 && a.fault != 17) ptx::barrier_arrive(s.empty + before);
    pack_scores(p, scores);
  }
  const int last = (a.tiles - 1) % kStages;
  ptx::barrier_wait(s.v_full + last, (a.tiles - 1) / kStages & 1);
  multiply_values(out, p, s.v + last * kTileBytes, a.fault);
  if (a.fault != 18) ptx::wgmma_wait<0>(out, p);
  store_out(a, rows, out, group);
}

}  // namespace

void run_pipeline(const Pipeline& p) {
  const auto map = [](const uint16_t* data, int rows) {
    return cuda::make_tensor_map(
        {data, DType::kFloat16, 2, {kD, rows}, {1, kD}, {kD, 64}, kSwizzle}, "pipeline");
  };
  const int blocks = (p.queries + 2 * kQueries - 1) / (2 * kQueries);
  const PipelineArguments arguments{
      map(p.q, p.queries),          map(p.k, p.keys), map(p.v, p.keys), map(p.out, p.queries),
      (p.keys + kKeys - 1) / kKeys, p.fault};
  cuda::launch(pipeline, {blocks, kThreads, kSharedBytes, 1}, arguments, nullptr, "pipeline");
}

}  // namespace bertkern::emulator::test
