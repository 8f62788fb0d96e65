// bertkern's CUDA ops on the emulator, as a Python module with the functions cuda_* of bertkern._C.
#include "bindings.h"
#include "controls.h"
#include "cuda/device.h"

namespace bertkern::cuda {

int device_count(std::string&) { return 1; }
int capability(int) { return emulator::Machine::get().capability(); }
int multiprocessors(int) { return emulator::Machine::get().resident_blocks(); }

}  // namespace bertkern::cuda

PYBIND11_MODULE(_emulated, m) {
  pybind11::module_::import("bertkern._C");  // registers the types of arguments
  bertkern::bind_cuda(m);
  bertkern::emulator::bind_machine(m);
}
