// csrc/ptx/fence.cuh on the emulator's machine.
#pragma once

#include "ptx/thread.cuh"

namespace bertkern::ptx {

BERTKERN_DEVICE void fence_async_shared() { emulator::fence_async(false); }
BERTKERN_DEVICE void fence_async() { emulator::fence_async(true); }

}  // namespace bertkern::ptx
