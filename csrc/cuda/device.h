// What CUDA devices this process can use, and what they are.
#pragma once

#include <string>

namespace bertkern::cuda {

// Devices that the CUDA runtime inside this module can use; with 0, `reason` says why. Never
// throws.
int device_count(std::string& reason);

// A device's compute capability, 10 · major + minor, and how many multiprocessors it has. They
// throw std::runtime_error for a device that is not there.
int capability(int device);
int multiprocessors(int device);

}  // namespace bertkern::cuda
