// Boxes of tensors by the copy engine: loaded as they are, and stored.
#include "common/dtype.h"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "kernels/arguments.h"
#include "ptx/fence.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/thread.cuh"
#include "ptx/tma.cuh"

namespace bertkern::emulator::test {
namespace {

constexpr int kTile = 1024;  // bytes before it, of which the first are a barrier's

struct BoxArguments {
  TensorMap map;
  int at[5];
  int bytes;
  uint32_t* tile;  // [bytes / 4]
};

template <int kRank>
BERTKERN_KERNEL(32)
load_box(BERTKERN_GRID_CONSTANT BoxArguments a) {
  auto* barrier = reinterpret_cast<ptx::Barrier*>(ptx::shared_memory());
  auto* tile = reinterpret_cast<uint32_t*>(ptx::shared_memory() + kTile);
  int at[kRank];
  for (int i = 0; i < kRank; ++i) at[i] = a.at[i];
  if (ptx::elect_one()) {
    ptx::tma_prefetch(a.map);
    ptx::barrier_init(barrier, 1);
    ptx::barrier_init_fence();
    ptx::barrier_arrive_expect_bytes(barrier, a.bytes);
    ptx::tma_load(tile, a.map, at, barrier, ptx::cache_normally());
  }
  ptx::block_barrier();
  ptx::barrier_wait(barrier, 0);
  for (int i = ptx::thread_index(); i < a.bytes / 4; i += 32) a.tile[i] = tile[i];
}

template <int kRank>
BERTKERN_KERNEL(32)
store_box(BERTKERN_GRID_CONSTANT BoxArguments a) {
  auto* tile = reinterpret_cast<uint32_t*>(ptx::shared_memory() + kTile);
  int at[kRank];
  for (int i = 0; i < kRank; ++i) at[i] = a.at[i];
  for (int i = ptx::thread_index(); i < a.bytes / 4; i += 32) tile[i] = a.tile[i];
  ptx::fence_async_shared();
  ptx::block_barrier();
  if (ptx::elect_one()) {
    ptx::tma_store(a.map, at, tile);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

template <int kRank>
void run(const BoxArguments& arguments, bool load) {
  cuda::launch(load ? load_box<kRank> : store_box<kRank>, {1, 32, kTile + arguments.bytes, 1},
               arguments, nullptr, "box");
}

}  // namespace

void run_box(const Box& box, uint32_t* tile, bool load) {
  cuda::TensorBoxes boxes{box.data,
                          box.bfloat16 ? DType::kBFloat16 : DType::kFloat16,
                          box.rank,
                          {},
                          {},
                          {},
                          static_cast<Swizzle>(box.swizzle)};
  BoxArguments arguments{{}, {}, 2, tile};
  for (int i = 0; i < box.rank; ++i) {
    boxes.sizes[i] = box.sizes[i];
    boxes.strides[i] = box.strides[i];
    boxes.box[i] = box.box[i];
    arguments.at[i] = box.at[i];
    arguments.bytes *= box.box[i];
  }
  arguments.map = cuda::make_tensor_map(boxes, "box");
  auto* run_rank = box.rank == 2   ? run<2>
                   : box.rank == 3 ? run<3>
                   : box.rank == 4 ? run<4>
                                   : run<5>;
  run_rank(arguments, load);
}

}  // namespace bertkern::emulator::test
