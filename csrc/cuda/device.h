// What CUDA devices this process can use.
#pragma once

#include <string>

namespace bertkern::cuda {

// Devices that the CUDA runtime inside this module can use; with 0, `reason` says why. Never
// throws.
int device_count(std::string& reason);

}  // namespace bertkern::cuda
